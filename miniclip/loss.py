"""What is CLIP trained to do?

In a batch of image-caption pairs, every image has to pick its own caption among all captions, and every caption its
own image: two classifications, whose logits are cosine similarities times the learned scale.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

DUPLICATES = ("positive", "exclude", "ignore")


def clip_loss(
    image_embeds: Tensor,
    text_embeds: Tensor,
    logit_scale: Tensor,
    ids: Tensor | None = None,
    duplicates: str = "positive",
) -> Tensor:
    """Symmetric InfoNCE: the mean of the two cross-entropies, in nats (paper, figure 3).

    `image_embeds` and `text_embeds` are (B, E), of unit length, row i of one belonging to row i of the other;
    `logit_scale` is a scalar. With several processes each holds its own B rows, and the rows of all N = processes x B
    are contrasted: a process scores its own rows against everybody's, which takes B x N numbers instead of N x N,
    and the mean over the processes is the loss of the whole batch, gradients included. It is computed in float32 also
    under autocast: a logit of 30 in bf16 is off by up to 0.06.

    `ids` (B, 2) are whole numbers, equal in the first column where the images are the same and in the second where the
    captions are. Pairs of the batch that are the same in either are duplicates. With l_ij the logits of row i, and P_i
    the row itself and its duplicates, a direction's loss of row i is

        "positive"   -1/|P_i| sum over j in P_i of log(exp l_ij / sum over all k of exp l_ik)     (UniCL: Yang et al.,
                     arXiv 2204.03610, equations 2 to 4): what is wanted is an equal share for each of P_i
        "exclude"    -log(exp l_ii / sum over k outside P_i, and i, of exp l_ik): duplicates are left out
        "ignore"     -log(exp l_ii / sum over all k of exp l_ik): duplicates are negatives, as in CLIP
    """
    if duplicates not in DUPLICATES:
        raise ValueError(f"duplicates {duplicates!r} is none of {', '.join(DUPLICATES)}")
    with torch.autocast(image_embeds.device.type, enabled=False):
        return _clip_loss(image_embeds.float(), text_embeds.float(), logit_scale.float(), ids, duplicates)


def _clip_loss(image_embeds: Tensor, text_embeds: Tensor, logit_scale: Tensor, ids, duplicates) -> Tensor:
    all_images, all_texts, first = gather(image_embeds), gather(text_embeds), process_index() * len(image_embeds)
    logits_per_image = logit_scale * image_embeds @ all_texts.T
    logits_per_text = logit_scale * text_embeds @ all_images.T
    target = torch.arange(first, first + len(image_embeds), device=image_embeds.device)
    if ids is not None and duplicates != "ignore":
        same = find_duplicates(ids, gather(ids))
        if duplicates == "positive":
            target = same / same.sum(dim=1, keepdim=True)
        else:
            left_out = same.scatter(1, target[:, None], False)
            logits_per_image = logits_per_image.masked_fill(left_out, -torch.inf)
            logits_per_text = logits_per_text.masked_fill(left_out, -torch.inf)
    return (F.cross_entropy(logits_per_image, target) + F.cross_entropy(logits_per_text, target)) / 2


def find_duplicates(ids: Tensor, all_ids: Tensor) -> Tensor:
    """Which pairs are the same, in the image or the caption: ids (B, 2) against (N, 2) gives booleans (B, N)."""
    return (ids[:, None, 0] == all_ids[:, 0]) | (ids[:, None, 1] == all_ids[:, 1])


def gather(embeds: Tensor) -> Tensor:
    """Rows of all processes, in their order: (B, E) to (processes x B, E). Gradients flow back to their owners."""
    return _Gather.apply(embeds) if dist.is_initialized() and dist.get_world_size() > 1 else embeds


def process_index() -> int:
    """This process's place in that order."""
    return dist.get_rank() if dist.is_initialized() else 0


class _Gather(torch.autograd.Function):
    """all_gather, whose plain form stops gradients. Backwards, every process holds a gradient for every row: they are
    summed, and each process takes the rows that are its own."""

    @staticmethod
    def forward(ctx, embeds: Tensor) -> Tensor:
        rows = [torch.empty_like(embeds) for _ in range(dist.get_world_size())]
        dist.all_gather(rows, embeds.contiguous())
        return torch.cat(rows)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size())[dist.get_rank()]
