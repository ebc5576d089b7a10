"""SuperCLIP's loss: an image also has to name the words of its caption (Zhao et al., arXiv 2512.14480).

    L = L_CLIP - 1/B sum over images i, tokens c of y_ic log softmax over c of (scale x_i . w_c)

y_i are the tokens of image i's caption, each once, weighted by how rare they are, log(B / captions that have c), and
divided by their sum. x_i is the image's embedding, w_c what the text tower's projection makes of the embedding of token
c, of unit length; `scale` is the logit scale, without a gradient. Tokens are those of the whole batch, on all
processes. The paper has a linear classifier on the image tower's features, for the whole vocabulary, and counts words
in all captions seen so far. This one adds neither weights nor state to a model."""

from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from miniclip.model import ClipOutput, MiniClip, TextTransformer
from miniclip.towers.huggingface import HfTextTower
from miniclip.training.fsdp import uses_fsdp
from miniclip.training.losses import clip
from miniclip.utils.errors import InputError


def superclip(model: MiniClip, options, args) -> Callable[[ClipOutput, dict], Tensor]:
    """CLIP's loss, with `--duplicates`, and that of the words. Raises InputError for a model without embeddings of
    tokens that its text projection can read, or with FSDP."""
    text = model.text
    if isinstance(text, TextTransformer):
        table = text.token_embedding
    elif isinstance(text, HfTextTower):
        table = text.trunk.get_input_embeddings()
    else:
        raise InputError(f"loss superclip finds no embeddings of tokens in {type(text).__name__}. Choose another loss")
    if table.embedding_dim != text.width:
        wrong = f"the embeddings of tokens are {table.embedding_dim} wide, the text tower {text.width}"
        raise InputError(f"loss superclip: {wrong}. Choose another loss or text tower")
    if uses_fsdp(args):
        raise InputError("loss superclip reads the embeddings of tokens, which FSDP divides. Remove fsdp")
    words = {"table": table, "projection": text.projection, "pad": text.tokenizer.pad_token_id}
    return partial(superclip_loss, contrast=clip(model, options, args), **words)


def superclip_loss(outputs: ClipOutput, batch: dict, contrast: Callable, **words) -> Tensor:
    return contrast(outputs, batch) + word_loss(outputs, batch["input_ids"], **words)


def word_loss(outputs: ClipOutput, input_ids: Tensor, table: nn.Embedding, projection: nn.Module, pad: int) -> Tensor:
    """The loss of the words alone, in nats: images (B, E) against the tokens (B, L) of their captions."""
    bags = torch.zeros(len(input_ids), table.num_embeddings, device=input_ids.device).scatter_(1, input_ids, 1.0)
    bags[:, pad] = 0
    captions = bags.sum(dim=0)
    if dist.is_initialized():
        dist.all_reduce(captions)
    total = len(bags) * (dist.get_world_size() if dist.is_initialized() else 1)
    tokens = captions.nonzero().squeeze(1)
    weights = bags[:, tokens] * (total / captions[tokens]).log()
    with torch.autocast(input_ids.device.type, enabled=False):
        words = F.normalize(projection(table(tokens).float()), dim=1)
        logits = outputs.logit_scale.detach().float() * outputs.image_embeds.float() @ words.T
        return F.cross_entropy(logits, weights / weights.sum(dim=1, keepdim=True).clamp_min(1e-6))
