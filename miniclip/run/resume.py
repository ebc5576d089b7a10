"""Resuming with other options: which differences from the checkpoint's run are refused, and what the others do."""

import json
import logging
from pathlib import Path

from torch.optim.lr_scheduler import LambdaLR

from miniclip.run.metadata import RECORD, differences
from miniclip.utils.errors import InputError

logger = logging.getLogger(__name__)

_ORDER = "the order of the pairs, and which have been seen, would change"
_DRAWS = "the random draws for the rest of the epoch would change"
_LOSS = "the rest of the run would minimise another loss"
_OPTIMIZER = "the checkpoint has the state of another optimizer"
_TRAINED = "the checkpoint has the state of an optimizer for other weights, or with other rates"
_SCHEDULE = "the learning rate would jump from one schedule into the middle of another"
_BEST = "the best checkpoint so far was chosen by it"
# What must be the same for a run to resume, by its name in the metadata, and why.
SAME = {
    "data": _ORDER, "holdout": "images would move between training and evaluation", "seed": _DRAWS,
    "arguments.data_seed": _ORDER, "arguments.train_sampling_strategy": _ORDER, "options.streaming": _ORDER,
    "options.train_num_samples": _ORDER, "options.train_data_upsampling_factors": _ORDER,
    "arguments.dataloader_drop_last": "an epoch would have another number of steps",
    "pairs_per_step": "the position in the epoch is counted in steps of the old size",
    "arguments.gradient_accumulation_steps": "each pair would be contrasted with another number of pairs",
    "model": "the checkpoint has the weights of another model",
    "readers": "each worker of each process reads a share of the stream, and the shares would change",
    "options.loss": _LOSS, "options.teacher": _LOSS, "options.duplicates": _LOSS, "options.fixed_logit_scale": _LOSS,
    "options.freeze_image": _TRAINED, "options.freeze_text": _TRAINED, "options.tower_lr_scales": _TRAINED,
    "options.layer_decay": _TRAINED, "options.ema": "the average would mix two decays, or lack the steps so far",
    "arguments.optim": _OPTIMIZER, "arguments.optim_args": _OPTIMIZER, "arguments.lr_scheduler_type": _SCHEDULE,
    "arguments.lr_scheduler_kwargs": _SCHEDULE,
}  # fmt: skip
# The same, if both runs choose a best checkpoint.
BEST = ("eval_data", "eval_classes", "arguments.metric_for_best_model", "arguments.greater_is_better")
_LENGTH = "the schedule is computed anew, so the learning rate may jump (see below)"
_ROUNDING = "the rest is rounded differently, so the weights will not equal those of an uninterrupted run bit for bit"
_START = "without effect: the weights come from the checkpoint"
# What the other differences do. Those not listed apply from this step on.
EFFECTS = {
    "arguments.learning_rate": "the schedule goes on from this step, with the new rate as its peak",
    "arguments.num_train_epochs": _LENGTH, "arguments.max_steps": _LENGTH, "arguments.warmup_steps": _LENGTH,
    "options.model": _START, "options.pretrained": _START,
    "arithmetic": _ROUNDING, "machine": _ROUNDING, "versions": _ROUNDING, "commit": _ROUNDING, "processes": _ROUNDING,
    "arguments.per_device_train_batch_size": _ROUNDING, "arguments.grad_cache_chunk_size": _ROUNDING,
    "arguments.fast": _ROUNDING, "arguments.bf16": _ROUNDING, "arguments.fp16": _ROUNDING, "arguments.tf32": _ROUNDING,
    "arguments.torch_compile": _ROUNDING, "arguments.use_cpu": _ROUNDING, "arguments.fsdp": _ROUNDING,
    "arguments.ignore_data_skip": "a resumed run reads its epoch from the start again, and a pair may be seen twice",
}  # fmt: skip
NOW = ("initial_lr", "weight_decay", "betas", "eps")  # what the optimizer takes from the arguments, not the checkpoint


def _lookup(table: dict[str, str], name: str) -> str | None:
    """The entry for a name in the metadata, or for what it is part of."""
    parts = name.split(".")
    return next((table[key] for n in range(len(parts), 0, -1) if (key := ".".join(parts[:n])) in table), None)


def check_same_run(checkpoint: str | Path, metadata: dict) -> dict[str, str]:
    """Raises InputError if a run differs from its checkpoint where it must not. Warns of others and returns them."""
    path = Path(checkpoint) / RECORD
    if not path.is_file():
        logger.warning("%s has no %s: data and options cannot be compared with those of this run", checkpoint, RECORD)
        return {}
    before = json.loads(path.read_text(encoding="utf-8"))
    found, same = differences(before, metadata), SAME
    if all(run.get("arguments", {}).get("metric_for_best_model") for run in (before, metadata)):
        same = SAME | dict.fromkeys(BEST, _BEST)
    if wrong := [f"  {line}: {_lookup(same, name)}" for name, line in found.items() if _lookup(same, name)]:
        fix = f"Use its options, or start a new run from its weights: --model {checkpoint} --output_dir ..."
        raise InputError("\n".join([f"{checkpoint} is from a different run:", *wrong, fix]))
    if found:
        lines = (f"  {line}: {_lookup(EFFECTS, name) or 'from this step on'}" for name, line in found.items())
        logger.warning("changed since %s:\n%s", checkpoint, "\n".join(lines))
    return found


def use_arguments(trainer, fresh: list[dict], changed: dict[str, str]):
    """Makes the rest of a resumed run follow its arguments where the checkpoint has those of the run before: Trainer's
    schedule would begin at the old learning rate, and its optimizer keep the old weight decay and the like. `fresh` are
    the optimizer's groups before the checkpoint was loaded."""
    schedule, groups = trainer.lr_scheduler, trainer.optimizer.param_groups
    for group, own in zip(groups, fresh):
        group.update({name: own[name] for name in NOW if name in own})
    old = [group["lr"] for group in groups]
    if isinstance(schedule, LambdaLR):
        schedule.base_lrs = [group["initial_lr"] for group in groups]
        rates = [base * rate(schedule.last_epoch) for base, rate in zip(schedule.base_lrs, schedule.lr_lambdas)]
    elif "arguments.learning_rate" in changed:  # the rate follows a metric: it starts again
        rates = [group["lr"] for group in fresh]
    else:
        return
    for group, rate in zip(groups, rates):
        group["lr"] = rate
    schedule._last_lr = rates
    if rates != old:
        logger.warning("the learning rate of the next step is %.3g; before the changes it was %.3g", rates[0], old[0])
