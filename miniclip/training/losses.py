"""Registry of the losses of `train.py --loss`."""

import pkgutil
from collections.abc import Callable
from functools import partial


def clip(model, options, args) -> Callable:
    """CLIP's loss, with `--duplicates`."""
    from miniclip.trainer import contrastive_loss  # imports torch, which --help does without

    return partial(contrastive_loss, duplicates=options.duplicates)


# A loss by name: a function (model, options, args) -> loss(outputs, batch), or "module:function", imported on use.
# `options` is a TrainOptions, `args` the RunArguments, `outputs` a ClipOutput, `batch` a dict of tensors.
LOSSES: dict[str, Callable | str] = {
    "clip": clip,
    "siglip": "miniclip.training.siglip:siglip",
    "superclip": "miniclip.training.superclip:superclip",
    "coca": "miniclip.training.coca:coca",
    "distill": "miniclip.training.distill:distill",
    "affinity": "miniclip.training.distill:affinity",
    "late_interaction": "miniclip.training.late_interaction:late_interaction",
}
HELP = {  # for `train.py --help`
    "clip": "symmetric InfoNCE", "siglip": "SigLIP's sigmoid loss",
    "superclip": "InfoNCE plus the caption's words, which the image has to name",
    "coca": "InfoNCE plus captions written by the model; coca:2:1 weights first captions, then InfoNCE",
    "distill": "InfoNCE plus a teacher's scores", "affinity": "a teacher's scores alone (TinyCLIP)",
    "late_interaction": "word-to-patch embeddings that re-rank a trained model's results (ColBERT)",
}  # fmt: skip
NEED_TEACHER = {"distill", "affinity"}


def make_loss(model, options, args) -> Callable:
    """Returns the loss that `options.loss` names, a function of (outputs, batch), and prepares the model for it."""
    if model.logit_bias is not None:
        model.logit_bias.requires_grad_(False)  # only SigLIP's loss reads it
    make = LOSSES[options.loss.partition(":")[0]]
    return (pkgutil.resolve_name(make) if isinstance(make, str) else make)(model, options, args)
