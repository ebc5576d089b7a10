"""SigLIP's sigmoid loss: each image and caption is a yes-or-no question (Zhai et al., arXiv 2303.15343)."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from miniclip.loss import DUPLICATES, find_duplicates, gather, process_index
from miniclip.model import ClipOutput, MiniClip

INIT_LOGIT_SCALE, INIT_LOGIT_BIAS = math.log(10), -10.0  # section 3.2: the bias says that most pairs do not match


def siglip(model: MiniClip, options, args) -> Callable[[ClipOutput, dict], Tensor]:
    """SigLIP's loss, with `--duplicates`. A model without a bias gets one."""
    if model.logit_bias is None:
        add_logit_bias(model)
    model.logit_bias.requires_grad_(True)
    return lambda outputs, batch: siglip_loss(outputs, batch.get("pair_ids"), options.duplicates)


def add_logit_bias(model: MiniClip):
    """Gives a model the bias and the initial temperature of this loss, unless the temperature is fixed."""
    model.config.init_logit_scale, model.config.init_logit_bias = INIT_LOGIT_SCALE, INIT_LOGIT_BIAS
    if model.logit_scale.requires_grad:
        model.logit_scale.data.fill_(INIT_LOGIT_SCALE)
    model.logit_bias = nn.Parameter(torch.full_like(model.logit_scale, INIT_LOGIT_BIAS))


def siglip_loss(outputs: ClipOutput, ids: Tensor | None = None, duplicates="positive", chunk_size=1024) -> Tensor:
    """-1/B sum over i, j of log sigmoid(z_ij (scale x_i . y_j + bias)), in nats (algorithm 1).

    z_ij is 1 if image i and caption j are a pair, otherwise -1. Duplicates are pairs too ("positive"), dropped from the
    sum ("exclude") or negatives ("ignore"). Embeddings and processes as for `clip_loss`; the bias is a scalar. At most
    B x `chunk_size` logits exist at once, recomputed in the backward pass: memory grows linearly with the batch."""
    if duplicates not in DUPLICATES:
        raise ValueError(f"duplicates {duplicates!r} is not one of {', '.join(DUPLICATES)}")
    with torch.autocast(outputs.image_embeds.device.type, enabled=False):
        images, texts = outputs.image_embeds.float(), gather(outputs.text_embeds.float())
        scale, bias = outputs.logit_scale.float(), outputs.logit_bias.float()
        own = torch.arange(len(images), device=images.device) + process_index() * len(images)  # each image's caption
        all_ids = None if ids is None else gather(ids)
        loss = images.new_zeros(())
        for start in range(0, len(texts), chunk_size):
            part = slice(start, start + chunk_size)
            inputs = images, texts[part], scale, bias, own - start, duplicates
            pair_ids = () if ids is None else (ids, all_ids[part])
            loss = loss + checkpoint(_chunk_loss, *inputs, *pair_ids, use_reentrant=False)
        return loss / len(images)


def _chunk_loss(images, texts, scale, bias, own, duplicates: str, *ids) -> Tensor:
    pair = own[:, None] == torch.arange(len(texts), device=own.device)
    same = find_duplicates(*ids) if ids and duplicates != "ignore" else pair
    logits = scale * images @ texts.T + bias
    losses = -F.logsigmoid(torch.where(same if duplicates == "positive" else pair, logits, -logits))
    return (losses * (pair | ~same)).sum() if duplicates == "exclude" else losses.sum()
