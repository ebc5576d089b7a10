"""Default training arguments, by what learns: all weights, pretrained ones, or only projections."""

import ast
import os
from pathlib import Path

from miniclip.config import MiniClipConfig
from miniclip.utils.errors import InputError

NAMES = "learning_rate", "weight_decay", "num_train_epochs", "per_device_train_batch_size", "warmup_steps"


def core_defaults() -> dict:
    """The defaults of ClipTrainingArguments, from its source: --help shows them, and importing it takes seconds."""
    source = Path(__file__).parents[1] / "trainer.py"
    arguments = next(n for n in ast.parse(source.read_text("utf-8")).body if isinstance(n, ast.ClassDef))
    values = {field.target.id: field.value for field in arguments.body if isinstance(field, ast.AnnAssign)}
    return {name: ast.literal_eval(values[name]) for name in NAMES}


# From scratch every negative counts, and little data calls for a high rate and weight decay. Fine-tuning may destroy
# what the weights know: a low rate and few epochs; weights that were trained with large batches tune well with 64.
FROM_SCRATCH = core_defaults()
FINE_TUNE = dict(zip(NAMES, (1e-5, 0.1, 5.0, 64, 0.1)))
# Between two frozen encoders only projections learn, from features that are computed once: an epoch takes about a
# second, and a high rate cannot damage the encoders.
PROJECTIONS = FROM_SCRATCH | {"weight_decay": 0.1}


def defaults(given: dict) -> dict:
    """The defaults that follow from the options given. Raises InputError for those that do not go together."""
    freeze = default_freeze(given)
    frozen = [how in ("tower", "all", "all_but_0") for how in freeze.values()]
    usual = FROM_SCRATCH
    if len(frozen) == 2 and all(frozen):
        usual = PROJECTIONS
    elif not all(frozen) or given.get("pretrained") or os.path.isdir(given.get("model") or ""):
        usual = FINE_TUNE
    evaluation = {"eval_strategy": "epoch"} if given.get("eval_file") else {}
    if given.get("early_stopping_patience") or given.get("load_best_model_at_end"):
        evaluation |= early_stopping(given)
    return usual | freeze | evaluation


def default_freeze(given: dict) -> dict[str, str]:
    """How pretrained encoders are frozen: all but their projections, unless the options differ or name a teacher."""
    name = given.get("model") or ""
    try:
        config = MiniClipConfig.from_name(os.path.join(name, "config.json") if os.path.isdir(name) else name)
    except InputError:
        return {}  # reported when the model is made
    default = "tower" if given.get("teacher") is None else "none"  # a student must see images and captions itself
    towers = {"freeze_image": config.vision_cfg, "freeze_text": config.text_cfg}
    return {option: given.get(option, default) for option, section in towers.items() if section.pretrained}


def early_stopping(given: dict) -> dict:
    """What early stopping needs: a checkpoint at each evaluation, so that the best model can be restored."""
    when = given.get("eval_strategy", "epoch")
    save = given.get("save_strategy", when)
    steps = given.get("eval_steps") or given.get("logging_steps", 10)  # the interval of Trainer's evaluations
    if when == "no" or save not in (when, "best"):
        raise InputError(
            "early_stopping_patience and load_best_model_at_end need a checkpoint at each evaluation, but eval_strategy"
            f" is {when!r} and save_strategy is {save!r}. Remove both or set both to epoch or steps"
        )
    if save == when == "steps" and float(given.get("save_steps", steps)) % float(steps):
        raise InputError(f"save_steps {given['save_steps']} is not a multiple of the {steps} steps between evaluations")
    return {"eval_strategy": when, "save_strategy": when, "save_steps": steps, "load_best_model_at_end": True}
