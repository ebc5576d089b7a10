"""How does a batch of training go through the model?

As `MiniClip.forward` says, with three things in between that concern training only: the images come as levels and are
normalised where the model is, a batch too large for memory goes through in chunks, and where a tower is locked, its
features come instead of what it would make them of.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from miniclip.model import ClipOutput, MiniClip


def batch_forward(
    model: MiniClip,
    normalize,
    chunk_size: int = 0,
    pixel_values: Tensor | None = None,
    input_ids: Tensor | None = None,
    image_features: Tensor | None = None,
    text_features: Tensor | None = None,
) -> ClipOutput:
    """Embeds a batch: `pixel_values` (B, 3, S, S), levels or normalised already, or `image_features` (B, W); and
    `input_ids` (B, L) or `text_features` (B, W).

    With a `chunk_size` the whole batch is contrasted while the memory is that of a chunk (GradCache: Gao et al., arXiv
    2101.06983): the embeddings of all chunks are computed and nothing else of them is kept; the loss gives each its
    gradient; then chunk by chunk the tower runs again, with the same random numbers, and that gradient goes back
    through it. This is what `checkpoint` does. It costs one forward pass more, and the gradients are those of the
    whole batch. Because all of it lies within one forward pass, DistributedDataParallel and autocast need no care.
    """

    def image_tower(part: Tensor) -> Tensor:
        part = normalize(part) if part.dtype == torch.uint8 else part
        return model.encode_image(part, normalize=True)

    def text_tower(part: Tensor) -> Tensor:
        return model.encode_text(part, normalize=True)

    def in_chunks(tower, batch: Tensor) -> Tensor:
        if not chunk_size or len(batch) <= chunk_size:
            return tower(batch)
        return torch.cat([checkpoint(tower, part, use_reentrant=False) for part in batch.split(chunk_size)])

    if image_features is not None:
        image_embeds = F.normalize(model.visual.proj(image_features), dim=-1)
    else:
        image_embeds = None if pixel_values is None else in_chunks(image_tower, pixel_values)
    if text_features is not None:
        text_embeds = F.normalize(model.text.text_projection(text_features), dim=-1)
    else:
        text_embeds = None if input_ids is None else in_chunks(text_tower, input_ids)
    return ClipOutput(image_embeds, text_embeds, model.logit_scale.exp(), model.logit_bias)
