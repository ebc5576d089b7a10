"""CoCa's loss: CLIP's, and the cross-entropy of each next token of the caption (Yu et al., arXiv 2205.01917)."""

from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from miniclip.model import MiniClip
from miniclip.towers.coca import CoCa, CocaOutput
from miniclip.towers.coca_encoder import CocaHfVisionTower
from miniclip.training.fsdp import uses_fsdp
from miniclip.training.losses import clip
from miniclip.utils.errors import InputError


def coca(model: MiniClip, options, args) -> Callable[[CocaOutput, dict], Tensor]:
    """The loss of `--loss coca` and `--loss coca:CAPTION:CONTRASTIVE`, two weights, 2 and 1 as in OpenCLIP. Raises
    InputError for a model without a decoder, and for what cannot be together with it."""
    if not isinstance(model, CoCa):
        raise InputError("loss coca needs a model that writes captions, and this one has no decoder: use coca_ViT-B-32")
    image, text = options.frozen
    if text or image and not isinstance(model.visual, CocaHfVisionTower):  # whose features are a whole feature map
        kept = "but a tower is frozen and only its features are kept. Freeze all_but_N blocks, or none"
        raise InputError(f"loss coca reads whole sequences, {kept}")
    if args.grad_cache_chunk_size:
        needs = "the logits of all words of all captions of a batch are in memory at once"
        raise InputError(f"grad_cache_chunk_size does not help loss coca: {needs}. Remove it, or take smaller batches")
    args.chunks_help = False
    if options.check_gradients or uses_fsdp(args):
        raise InputError("check_gradients and fsdp do not know the captions of loss coca. Remove them")
    model.train_captions()
    weights = tuple(map(float, options.loss.split(":")[1:] or (2, 1)))
    return partial(coca_loss, contrast=clip(model, options, args), pad=model.config.text_cfg.pad_id, weights=weights)


def coca_loss(outputs: CocaOutput, batch: dict[str, Tensor], contrast: Callable, pad: int, weights: tuple) -> Tensor:
    """CoCa's loss of a batch, in nats, a scalar: both losses, each times its weight: (captions, `contrast`, CLIP's)."""
    words = caption_loss(outputs.caption_logits, batch["input_ids"], pad)
    return weights[1] * contrast(outputs, batch) + weights[0] * words


def caption_loss(logits: Tensor, input_ids: Tensor, pad: int) -> Tensor:
    """The mean cross-entropy, in nats, of the tokens after the first of captions (B, L), by logits (B, L - 1,
    vocabulary); padding does not count. Of several processes the mean of their losses is that of all their tokens,
    where OpenCLIP takes the mean of their means."""
    labels = input_ids[:, 1:]
    count = (labels != pad).sum()
    if dist.is_initialized():
        dist.all_reduce(count)
    processes = dist.get_world_size() if dist.is_initialized() else 1
    with torch.autocast(logits.device.type, enabled=False):
        total = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=pad, reduction="sum")
    return total * processes / count
