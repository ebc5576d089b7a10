"""Default hyperparameters of training, by what learns: all weights, pretrained ones, or only projections."""

import os

from miniclip.config import MiniClipConfig
from miniclip.utils.errors import InputError

# Fine-tuning risks destroying what the weights know: a low rate and few epochs. Training from scratch on little data
# risks learning too slowly: the rate of OpenCLIP's small models and a strong weight decay. Weights that were trained
# with large batches still fine-tune well with 64; from scratch every negative counts, and 128 pairs fit in a laptop.
FINE_TUNE = {
    "learning_rate": 1e-5,
    "weight_decay": 0.1,
    "num_train_epochs": 5.0,
    "per_device_train_batch_size": 64,
    "warmup_steps": 0.1,
}
FROM_SCRATCH = {
    "learning_rate": 1e-3,
    "weight_decay": 0.2,
    "num_train_epochs": 30.0,
    "per_device_train_batch_size": 128,
    "warmup_steps": 0.05,
}
# Between two frozen encoders only projections learn, from features that are computed once: an epoch takes about a
# second, and a high rate cannot damage the encoders.
PROJECTIONS = {
    "learning_rate": 1e-3,
    "weight_decay": 0.1,
    "num_train_epochs": 30.0,
    "per_device_train_batch_size": 128,
    "warmup_steps": 0.05,
}


def default_freeze(given: dict) -> dict[str, str]:
    """How pretrained encoders are frozen: all but their projections, unless the options differ or name a teacher, whose
    student must see images and captions itself."""
    name = given.get("model") or ""
    try:
        config = MiniClipConfig.from_name(os.path.join(name, "config.json") if os.path.isdir(name) else name)
    except InputError:
        return {}  # reported when the model is made
    default = "tower" if given.get("teacher") is None else "none"
    return {
        f"freeze_{tower}": given.get(f"freeze_{tower}", default)
        for tower, section in (("image", config.vision_cfg), ("text", config.text_cfg))
        if section.pretrained
    }


def usual_values(freeze: dict[str, str], tuned: bool) -> dict:
    """The list above that applies: to projections alone, to pretrained weights, or from scratch."""
    frozen = [how in ("tower", "all", "all_but_0") for how in freeze.values()]
    if len(frozen) == 2 and all(frozen):
        return PROJECTIONS
    return FINE_TUNE if tuned or not all(frozen) else FROM_SCRATCH


def early_stopping(given: dict) -> dict:
    """Defaults that early stopping needs: a checkpoint at each evaluation, so that the best model can be restored.
    Raises InputError if the options given do not allow that."""
    when = given.get("eval_strategy", "epoch")
    save = given.get("save_strategy", when)
    steps = given.get("eval_steps") or given.get("logging_steps", 10)  # the interval of Trainer's evaluations
    if when == "no" or save not in (when, "best"):
        raise InputError(
            "early_stopping_patience and load_best_model_at_end need a checkpoint at each evaluation, but eval_strategy"
            f" is {when!r} and save_strategy is {save!r}. Remove both or set both to epoch or steps"
        )
    if save == when == "steps" and float(given.get("save_steps", steps)) % float(steps):
        raise InputError(
            f"save_steps {given['save_steps']} must be a multiple of {steps}, the steps between evaluations"
        )
    return {"eval_strategy": when, "save_strategy": when, "save_steps": steps, "load_best_model_at_end": True}
