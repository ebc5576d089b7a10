"""InfoNCE and SigLIP's loss as functions of a batch's outputs and the batch."""

from collections.abc import Callable

from torch import Tensor

from miniclip.loss import clip_loss, clip_loss_with_duplicates
from miniclip.model import ClipOutput, MiniClip
from miniclip.training.siglip import add_logit_bias, siglip_loss


def clip(model: MiniClip, options, args) -> Callable[[ClipOutput, dict], Tensor]:
    """CLIP's loss, with `--duplicates`."""

    def loss(outputs: ClipOutput, batch: dict) -> Tensor:
        if "pair_ids" not in batch:  # data without ids: duplicates cannot be found
            return clip_loss(*outputs[:3])
        return clip_loss_with_duplicates(*outputs[:3], batch["pair_ids"], options.duplicates)

    return loss


def siglip(model: MiniClip, options, args) -> Callable[[ClipOutput, dict], Tensor]:
    """SigLIP's loss, with `--duplicates`. A model without a bias gets one."""
    if model.logit_bias is None:
        add_logit_bias(model)
    model.logit_bias.requires_grad_(True)
    return lambda outputs, batch: siglip_loss(*outputs[:4], batch.get("pair_ids"), options.duplicates)
