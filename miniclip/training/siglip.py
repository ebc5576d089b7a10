"""What if every pair is a question of its own?

CLIP asks which of all captions belongs to an image; SigLIP asks of each image and each caption whether they belong
together, yes or no (Zhai et al., arXiv 2303.15343). No row has to be complete before it counts, so that the logits need
not be held all at once.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from miniclip.loss import DUPLICATES, find_duplicates, gather, process_index
from miniclip.model import MiniClip

INIT_LOGIT_SCALE, INIT_LOGIT_BIAS = math.log(10), -10.0  # section 3.2: nearly all pairs are a "no", which the bias says
CHUNK = 1024  # captions that are scored at once


def siglip_loss(
    image_embeds: Tensor,
    text_embeds: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    ids: Tensor | None = None,
    duplicates: str = "positive",
    chunk_size: int = CHUNK,
) -> Tensor:
    """The sigmoid loss: -1/B sum over i, j of log sigmoid(z_ij (scale x_i . y_j + bias)), in nats (algorithm 1).

    z_ij is 1 where image i and caption j are a pair, and -1 elsewhere. For "positive" duplicates z_ij is 1 too; those
    to "exclude" count nothing, and to "ignore" them makes them a "no". Arguments are as of `clip_loss`; `logit_bias` is
    a scalar. A process scores its own B images against everybody's captions, and the mean over the processes is
    the loss of the whole batch. At most B x `chunk_size` logits exist at once: they are computed again for the
    backward pass, so that memory grows with the batch and not with its square.
    """
    if duplicates not in DUPLICATES:
        raise ValueError(f"duplicates {duplicates!r} is none of {', '.join(DUPLICATES)}")
    with torch.autocast(image_embeds.device.type, enabled=False):
        images, texts = image_embeds.float(), gather(text_embeds.float())
        rows = torch.arange(len(images), device=images.device)
        all_ids = None if ids is None else gather(ids)
        loss = images.new_zeros(())
        for start in range(0, len(texts), chunk_size):
            part = slice(start, start + chunk_size)
            own = rows + process_index() * len(images) - start  # the place of each image's own caption, if it is here
            others = None if ids is None or duplicates == "ignore" else (ids, all_ids[part], duplicates)
            inputs = (images, texts[part], logit_scale.float(), logit_bias.float(), own, others)
            loss = loss + checkpoint(_chunk_loss, *inputs, use_reentrant=False)
        return loss / len(images)


def _chunk_loss(images: Tensor, texts: Tensor, logit_scale: Tensor, logit_bias: Tensor, own: Tensor, others) -> Tensor:
    pair = own[:, None] == torch.arange(len(texts), device=own.device)
    logits = logit_scale * images @ texts.T + logit_bias
    if others is None:
        return -F.logsigmoid(torch.where(pair, logits, -logits)).sum()
    ids, their_ids, duplicates = others
    same = find_duplicates(ids, their_ids)
    if duplicates == "positive":
        return -F.logsigmoid(torch.where(same, logits, -logits)).sum()
    return -(F.logsigmoid(torch.where(pair, logits, -logits)) * (pair | ~same)).sum()


def add_logit_bias(model: MiniClip):
    """Makes a CLIP model one for this loss: with a bias, and the loss's own initial temperature beside it."""
    device = model.logit_scale.device
    model.config.init_logit_scale, model.config.init_logit_bias = INIT_LOGIT_SCALE, INIT_LOGIT_BIAS
    model.logit_scale.data.fill_(INIT_LOGIT_SCALE)
    model.logit_bias = nn.Parameter(torch.tensor(INIT_LOGIT_BIAS, device=device))
