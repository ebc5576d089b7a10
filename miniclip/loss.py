"""What is CLIP trained to do?

In a batch of pairs, every image has to pick its own caption among all captions, and every caption its own image: two
classifications, whose logits are cosine similarities times the learned scale. All other pairs are the negatives."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


def clip_loss(image_embeds: Tensor, text_embeds: Tensor, logit_scale: Tensor) -> Tensor:
    """Symmetric InfoNCE: the mean of two cross-entropies, in nats (paper, figure 3).

    `image_embeds` and `text_embeds` (B, E) are of unit length, and row i of one belongs to row i of the other;
    `logit_scale` is a scalar. Of several processes each holds B rows and scores them against the rows of all: the mean
    over the processes is the loss of the whole batch, gradients included."""
    logits_per_image, logits_per_text, target = clip_logits(image_embeds, text_embeds, logit_scale)
    return (F.cross_entropy(logits_per_image, target) + F.cross_entropy(logits_per_text, target)) / 2


def clip_logits(image_embeds: Tensor, text_embeds: Tensor, logit_scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """This process's rows against everybody's: logits of images (B, N) and of texts (B, N), and the right columns (B,).
    N counts the rows of all processes. In float32 also under autocast: a logit of 30 in bf16 is off by up to 0.06."""
    with torch.autocast(image_embeds.device.type, enabled=False):
        image_embeds, text_embeds, logit_scale = image_embeds.float(), text_embeds.float(), logit_scale.float()
        logits_per_image = logit_scale * image_embeds @ gather(text_embeds).T
        logits_per_text = logit_scale * text_embeds @ gather(image_embeds).T
    own = torch.arange(len(image_embeds), device=image_embeds.device)
    return logits_per_image, logits_per_text, own + process_index() * len(image_embeds)


DUPLICATES = ("positive", "exclude", "ignore")


def clip_loss_with_duplicates(
    image_embeds: Tensor, text_embeds: Tensor, logit_scale: Tensor, ids: Tensor, duplicates: str = "positive"
) -> Tensor:
    """InfoNCE for batches in which an image or a caption occurs more than once. The rest is as in `clip_loss`.

    `ids` (B, 2) are equal in the first column for the same image and in the second for the same caption; pairs that
    share either are duplicates. With l_ij the logits of row i, and P_i the row itself and its duplicates, the loss of
    row i in one direction is

        "positive"   -1/|P_i| sum over j in P_i of log(exp l_ij / sum over all k of exp l_ik): all of P_i are right
                     answers, with equal shares (UniCL: Yang et al., arXiv 2204.03610, equations 2 to 4)
        "exclude"    -log(exp l_ii / sum over k outside P_i, and i, of exp l_ik): duplicates do not count
        "ignore"     -log(exp l_ii / sum over all k of exp l_ik): duplicates are negatives, as in CLIP"""
    if duplicates not in DUPLICATES:
        raise ValueError(f"duplicates {duplicates!r} is not one of {', '.join(DUPLICATES)}")
    logits_per_image, logits_per_text, target = clip_logits(image_embeds, text_embeds, logit_scale)
    if duplicates != "ignore":
        same = find_duplicates(ids, gather(ids))
    if duplicates == "positive":
        target = same / same.sum(dim=1, keepdim=True)
    if duplicates == "exclude":
        others = same.scatter(1, target[:, None], False)
        logits_per_image = logits_per_image.masked_fill(others, -torch.inf)
        logits_per_text = logits_per_text.masked_fill(others, -torch.inf)
    return (F.cross_entropy(logits_per_image, target) + F.cross_entropy(logits_per_text, target)) / 2


def find_duplicates(ids: Tensor, all_ids: Tensor) -> Tensor:
    """Which pairs have the same image or caption: ids (B, 2) against (N, 2), booleans (B, N)."""
    return (ids[:, None, 0] == all_ids[:, 0]) | (ids[:, None, 1] == all_ids[:, 1])


def gather(embeds: Tensor) -> Tensor:
    """Rows of all processes, in their order: (B, E) to (processes x B, E). Gradients flow back to their owners."""
    return _Gather.apply(embeds) if dist.is_initialized() and dist.get_world_size() > 1 else embeds


def process_index() -> int:
    """This process's place in that order."""
    return dist.get_rank() if dist.is_initialized() else 0


class _Gather(torch.autograd.Function):
    """all_gather with gradients: backwards, those of all processes are summed, and each takes its own rows."""

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
