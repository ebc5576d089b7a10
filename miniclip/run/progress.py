"""Progress of a training run: a bar or lines on the terminal, `log.jsonl`, curves and warnings.

python -m miniclip progress runs/mine     # draws curves.png from log.jsonl, also while the run is going"""

import json
import logging
import math
import os
import sys
import time
from contextlib import ExitStack, suppress
from datetime import datetime, timezone
from importlib.util import find_spec
from pathlib import Path

from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

from miniclip.reports.charts import draw_curves
from miniclip.run.diagnose import recall_falls, scale_at_limit, scale_collapses, stays_at_chance
from miniclip.utils.errors import InputError
from miniclip.utils.files import write_text

logger = logging.getLogger(__name__)
LOG, CURVES = "log.jsonl", "curves.png"
# Services of transformers whose package has another name.
REPORTERS = {"azure_ml": "azureml-core", "comet_ml": "comet-ml", "flyte": "flytekit"}


def check_reporters(args: TrainingArguments):
    """Raises InputError if `--report_to` names an unknown service, or one whose package is not installed."""
    installed = {*get_available_reporting_integrations(), *(["flyte"] if find_spec("flytekit") else [])}
    for name in args.report_to:
        if name not in INTEGRATION_TO_CALLBACK:
            raise InputError(f"report_to {name!r} is not one of {', '.join(INTEGRATION_TO_CALLBACK)}, all or none")
        if name not in installed:
            package = REPORTERS.get(name, name)
            raise InputError(f"--report_to {name} needs a package that is not installed: pip install {package}")


class Progress(TrainerCallback):
    """Shows and logs a training run inside its `with` block, instead of the Trainer's own output. Every process
    measures, the first one writes. `contrasts`: whether the loss is InfoNCE, ln(batch) for a model that guesses.

    `log.jsonl` has one object for each entry of the Trainer's log: step, epoch and what was logged (loss,
    learning_rate, grad_norm, logit_scale, samples_per_second of all processes, metrics), the run's `seconds` so far and
    the `time`. Other lines have a step and an `event` (start, resumed), a `warning` or an `error`. Numbers that are not
    finite are "NaN", "Infinity" or "-Infinity", with a `reason`."""

    def __init__(self, trainer: Trainer, contrasts: bool = True):
        args = trainer.args
        self.args, self.trainer, self.model = args, trainer, trainer.model
        self.folder, self.is_main = Path(args.output_dir), trainer.is_world_process_zero()
        self.samples = trainer.get_total_train_batch_size(args)  # per step
        self.batch = self.samples // args.gradient_accumulation_steps if contrasts else None  # pairs contrasted at once
        self.bar, self.warned, self.cleanup = tqdm(disable=True), set(), ExitStack()
        self.start, self.earlier = time.monotonic(), 0.0  # of training; seconds before the run was resumed

    def __enter__(self):
        self.trainer.remove_callback(ProgressCallback)
        self.trainer.remove_callback(PrinterCallback)
        self.trainer.add_callback(self)
        self.trainer.log_extras.append(self.before_log)
        self.has_bar = self.is_main and not self.args.disable_tqdm and sys.stderr.isatty()
        if self.has_bar:
            loggers = [logging.getLogger(), logging.getLogger("transformers")]
            self.cleanup.enter_context(logging_redirect_tqdm(loggers))  # messages appear above the bar
        return self

    def __exit__(self, kind, error, traceback):
        self.cleanup.close()
        self.bar.close()
        if not self.is_main:
            return
        try:  # errors in here must not hide how the run ended
            if error is not None:
                self.write(error=f"{kind.__name__}: {error}" if str(error) else kind.__name__)
        except OSError as full:  # the disk may be full, which may be the error itself
            logger.warning("%s could not be written: %s", LOG, full)
        try:
            draw_log(self.folder)
        except Exception as failure:
            logger.warning("the curves could not be drawn: %s", failure)

    def on_train_begin(self, args, state, control, **kwargs):
        self.start, self.first_step = time.monotonic(), state.global_step
        self.busy, self.seen, self.all = 0.0, 0, 0  # seconds of training and samples since the last entry; all samples
        if self.is_main:
            path, step, event = self.folder / LOG, state.global_step, {"event": "start"}
            self.folder.mkdir(parents=True, exist_ok=True)
            if step:
                self.earlier, cut = continue_log(path, step, state.log_history)
                event = {"event": "resumed", "cut": cut}
                if cut:
                    logger.warning("%s: %d entries after step %d are replaced", path, cut, step)
            else:
                path.write_text("")
            self.write(**event, batch=self.batch, processes=args.world_size, max_steps=state.max_steps)
            self.warned = set(self.diagnose())  # before the run was interrupted
            self.bar.close()
            self.bar = tqdm(
                total=state.max_steps, initial=step, dynamic_ncols=True, smoothing=0, file=sys.stderr,
                bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}, {remaining} left",
                disable=not self.has_bar,
            )  # fmt: skip
        self.mark = time.monotonic()  # the begin of the interval being measured

    def on_step_end(self, args, state, control, **kwargs):
        self._count_time()
        batches = self.trainer.current_gradient_accumulation_steps  # the last step of an epoch may have fewer
        self.seen += self.samples * batches // args.gradient_accumulation_steps
        self.bar.update()

    def on_evaluate(self, args, state, control, **kwargs):
        self.mark = time.monotonic()  # the time of an evaluation or of saving does not count as training

    on_save = on_evaluate

    def before_log(self, logs: dict):
        """Adds what was measured to an entry with a loss. GuardedTrainer calls it on every process."""
        if "loss" in logs:
            self._count_time()  # the trainer has just read the loss from the device: all its work is in this time
            scale = self.model.logit_scale.detach()
            scale = scale.full_tensor() if hasattr(scale, "full_tensor") else scale  # sharded by FSDP
            logs["logit_scale"] = scale.exp().item()
            if self.seen and self.busy:
                logs["samples_per_second"] = self.seen / self.busy
            self.busy, self.seen, self.all = 0.0, 0, self.all + self.seen
        if seconds := logs.get("train_runtime"):  # Trainer counts the samples that are dropped too
            logs["train_samples_per_second"] = round((self.all + self.seen) / seconds, 3)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not self.is_main:
            return
        self.write(**logs)
        if self.has_bar and "loss" in logs:
            self.bar.set_postfix_str(_measured(logs))
        else:
            try:
                tqdm.write(self.line(logs))
                sys.stdout.flush()
            except BrokenPipeError:  # the reader has ended; the log has the line anyway
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        active = self.diagnose()
        for name in active.keys() - self.warned:
            self.write(warning=active[name])
            logger.warning("step %d: %s", state.global_step, active[name])
        self.warned = set(active)

    def on_train_end(self, *args, **kwargs):
        self.bar.close()

    def diagnose(self) -> dict[str, str]:
        """The warnings that apply now, by the name of their check."""
        history = self.trainer.state.log_history
        warmup = self.args.get_warmup_steps(self.trainer.state.max_steps)
        found = {"stays_at_chance": stays_at_chance(history, self.batch, warmup)} if self.batch else {}
        if self.model.logit_scale.requires_grad:
            found |= {"scale_at_limit": scale_at_limit(history), "scale_collapses": scale_collapses(history)}
        found["recall_falls"] = recall_falls(history)
        return {name: warning for name, warning in found.items() if warning}

    def line(self, logs: dict) -> str:
        """An entry of the log in one line."""
        state = self.trainer.state
        head = f"step {state.global_step}/{state.max_steps}"
        if "loss" in logs:
            done, left = state.global_step - self.first_step, state.max_steps - state.global_step
            seconds = (time.monotonic() - self.start) * left / done if done else math.nan
            rest = f", {tqdm.format_interval(seconds)} left" if math.isfinite(seconds) else ""
            return f"{head}, epoch {state.epoch:.2f}: {_measured(logs)}, rate {logs.get('learning_rate', 0):.2e}{rest}"
        if "eval_mean_recall" in logs:
            text = f"{head}: mean recall {100 * logs['eval_mean_recall']:.1f}%"
            for way in ("text_to_image", "image_to_text"):
                recalls = {k.split("@")[1]: f"{100 * v:.1f}" for k, v in logs.items() if k.startswith(f"eval_{way}_R@")}
                text += f", {way.replace('_', ' ')} R@{' / '.join(recalls)}: {' / '.join(recalls.values())}%"
            if "eval_zero_shot_top1" in logs:
                text += f", zero-shot top1 {100 * logs['eval_zero_shot_top1']:.1f}%"
            return text
        if "train_runtime" in logs:
            return f"{head}: trained for {tqdm.format_interval(logs['train_runtime'])}"
        return f"{head}: {logs}"

    def write(self, **entry):
        """Appends an entry to log.jsonl."""
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        seconds = self.earlier + time.monotonic() - self.start
        entry = {"step": self.trainer.state.global_step, **entry, "seconds": round(seconds, 2), "time": now}
        with open(self.folder / LOG, "a", encoding="utf-8") as file:
            file.write(to_json(entry) + "\n")

    def _count_time(self):
        now = time.monotonic()
        self.busy, self.mark = self.busy + now - self.mark, now


def _measured(logs: dict) -> str:
    """What the bar and the lines show of an entry with a loss."""
    scale, speed = logs["logit_scale"], logs.get("samples_per_second", 0)
    speed = f"{speed:,.{0 if speed >= 10 else 1}f} samples/s"
    return f"loss {logs['loss']:.4g}, temperature {1 / scale:.3g} (scale {scale:.3g}), {speed}"


def to_json(entry: dict) -> str:
    """An entry as a line of JSON. NaN and infinity become strings, and a `reason` is added for them."""
    if odd := {name: json.dumps(v) for name, v in entry.items() if isinstance(v, float) and not math.isfinite(v)}:
        fix = "the computation overflowed. Lower --learning_rate or raise --warmup_steps"
        odd["reason"] = f"{', '.join(odd)} not finite: {fix}"
    return json.dumps(entry | odd, allow_nan=False)


def continue_log(path: Path, step: int, history: list[dict]) -> tuple[float, int]:
    """Cuts from a log the entries after the step at which its run resumes, and a half-written last line; without a log,
    writes one from `history`, the Trainer's own. Returns the run's seconds so far and the number of entries cut."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else [to_json(entry) for entry in history]
    kept, seconds = [], 0.0
    for line in lines:
        with suppress(ValueError, KeyError):
            entry = json.loads(line)
            if entry["step"] <= step:
                kept.append(line)
                seconds = entry.get("seconds", seconds)
    write_text(path, "".join(f"{line}\n" for line in kept))
    return seconds, len(lines) - len(kept)


def read_log(folder: str | Path) -> list[dict]:
    """The entries of a run's log.jsonl, without a last line that is still being written."""
    path = Path(folder) / LOG
    if not path.is_file():
        raise InputError(f"there is no {LOG} in {folder}. Name the output_dir of a run")
    entries, lines = [], path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            entries.append(json.loads(line))
        except ValueError:
            if number < len(lines):
                raise InputError(f"{path}, line {number} is not JSON. Remove the line") from None
    return entries


def draw_log(folder: str | Path) -> Path:
    """Draws curves.png from the log.jsonl in a run's folder and returns its path."""
    entries = read_log(folder)
    batch = next((entry["batch"] for entry in reversed(entries) if "batch" in entry), None)
    draw_curves(Path(folder) / CURVES, entries, batch, str(folder))
    return Path(folder) / CURVES
