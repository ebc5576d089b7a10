"""TODO docstring."""

import os

from miniclip.config import MiniClipConfig
from miniclip.utils.errors import InputError

# Sound values where the command line says nothing. Starting from somebody's weights, the danger is to destroy what
# they know: a low rate, few epochs. Starting from nothing, with little data, the danger is to learn too slowly: the
# rate is that of OpenCLIP's small models, the decay strong. Weights that were trained with large batches still do
# well when tuned with 64; from scratch every negative counts, and 128 pairs fit a laptop.
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
# Between two encoders that stay as they are, only projections learn, from features that were computed once: an epoch
# takes about a second, and a high rate harms nothing that was learned elsewhere.
PROJECTIONS = {
    "learning_rate": 1e-3,
    "weight_decay": 0.1,
    "num_train_epochs": 30.0,
    "per_device_train_batch_size": 128,
    "warmup_steps": 0.05,
}


def default_locks(given: dict) -> dict[str, str]:
    """How pretrained encoders are locked: they stay as they are unless the options say that
    they learn, or name a teacher, whose pupil has to see pictures and captions itself."""
    name = given.get("model_config") or ""
    try:
        config = MiniClipConfig.from_name(os.path.join(name, "config.json") if os.path.isdir(name) else name)
    except InputError:
        return {}  # it will be said when the model is made
    learn = given.get("teacher") is not None
    return {
        f"lock_{tower}": given.get(f"lock_{tower}")
        or ("none" if learn or given.get(f"unlock_{tower}_blocks") else "tower")
        for tower, section in (("image", config.vision_cfg), ("text", config.text_cfg))
        if section.pretrained
    }


def usual_values(locks: dict[str, str], tuned: bool) -> dict:
    """Which of the three lists above applies, by what learns: pretrained weights, projections alone, or others."""
    if "none" in locks.values():
        return FINE_TUNE
    if len(locks) == 2:
        return PROJECTIONS
    return FINE_TUNE if tuned else FROM_SCRATCH


def early_stopping(given: dict) -> dict:
    """What early stopping needs, as defaults beside the options given: checkpoints are saved when recall is measured,
    so that the best one can be taken back. Raises InputError where the options given do not allow that."""
    when = given.get("eval_strategy", "epoch")
    save = given.get("save_strategy", when)
    steps = given.get("eval_steps") or given.get("logging_steps", 10)  # what Trainer evaluates by
    if when == "no" or save not in (when, "best"):
        raise InputError(
            "early_stopping_patience and load_best_model_at_end need evaluations and a checkpoint at each, but"
            f" eval_strategy is {when!r} and save_strategy {save!r}: leave both out, or say the same, epoch or steps"
        )
    if save == when == "steps" and float(given.get("save_steps", steps)) % float(steps):
        raise InputError(f"save_steps {given['save_steps']} is no multiple of {steps}, the steps between evaluations")
    return {"eval_strategy": when, "save_strategy": when, "save_steps": steps, "load_best_model_at_end": True}
