"""What can a model be trained to do? The losses by the names that `train.py --loss` knows them by."""

from functools import partial
from pathlib import Path

from torch import Tensor

from miniclip.inference.load import load
from miniclip.loss import clip_loss
from miniclip.model import ClipOutput, MiniClip
from miniclip.training.distill import Distillation
from miniclip.training.siglip import add_logit_bias, siglip_loss
from miniclip.utils.errors import InputError


def make_objective(
    loss: str,
    duplicates: str,
    model: MiniClip,
    teacher: list[str] | None = None,
    bf16: bool = False,
):
    """What ClipTrainer calls with (outputs, ids, inputs) for the loss of a batch.

    "clip" (`clip_loss`), "siglip" (`siglip_loss`; a model without a bias gets one), "distill" (`clip_loss` and
    `affinity_loss`) or "affinity" (that alone). The last two need a `teacher`: a folder, or a config and its weights.
    Raises InputError for other names.
    """
    if loss != "siglip" and model.logit_bias is not None:
        model.logit_bias.requires_grad_(False)  # these losses do not read it
    if loss == "clip":
        return partial(_clip, duplicates=duplicates)
    if loss == "siglip":
        if model.logit_bias is None:
            add_logit_bias(model)
        return partial(_siglip, duplicates=duplicates)
    if loss in ("distill", "affinity"):
        if len(teacher) == 1 and not Path(teacher[0]).is_dir():
            raise InputError(
                f"the teacher {teacher[0]} has no weights. Use --teacher FOLDER or --teacher CONFIG WEIGHTS"
            )
        large, preprocess, _ = load(*teacher)
        return Distillation(large, preprocess, model, contrast=loss == "distill", duplicates=duplicates, bf16=bf16)
    raise InputError(f"loss {loss!r} is none of clip, siglip, distill and affinity")


def _clip(outputs: ClipOutput, ids: Tensor, inputs: dict, duplicates: str) -> Tensor:
    return clip_loss(*outputs[:3], ids, duplicates)


def _siglip(outputs: ClipOutput, ids: Tensor, inputs: dict, duplicates: str) -> Tensor:
    return siglip_loss(*outputs, ids, duplicates)
