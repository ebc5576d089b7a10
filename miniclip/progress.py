"""How is training going?

`watch(trainer)` shows it while it lasts: one progress bar, or a line at each logging step where there is no terminal,
and `log.jsonl` in output_dir with a line of JSON for whatever is logged. At the end, however that comes, the curves are
drawn into `curves.png`. Where the numbers look like a failure that is known, a warning says so and what to try.

    python -m miniclip.progress runs/mine     # draws curves.png from log.jsonl; also of a run that was killed, or runs
"""

import importlib.util
import json
import logging
import math
import os
import sys
import time
from contextlib import ExitStack
from datetime import datetime, timezone
from itertools import islice
from pathlib import Path

from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainingArguments

from miniclip.config import InputError
from miniclip.files import write_text
from miniclip.model import MAX_LOGIT_SCALE
from miniclip.report import curve, draw_curves, is_finite

logger = logging.getLogger(__name__)
LOG, CURVES = "log.jsonl", "curves.png"
MAX_SCALE = round(math.exp(MAX_LOGIT_SCALE))


def watch(trainer: Trainer, contrasts: bool = True) -> "Progress":
    """Puts a `Progress` into the place of the Trainer's own bar. To be used around training:

        with watch(trainer) as progress:
            trainer.train()
        progress.summary()

    `contrasts`: the loss is InfoNCE, which is ln(batch) for a model that guesses.
    """
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    progress = Progress(trainer, contrasts)
    trainer.add_callback(progress)
    return progress


def check_reporters(args: TrainingArguments):
    """Raises InputError where `--report_to` names a service whose package is not installed."""
    for name, packages in (("tensorboard", ("tensorboard", "tensorboardX")), ("wandb", ("wandb",))):
        if name in args.report_to and not any(map(importlib.util.find_spec, packages)):
            raise InputError(f"--report_to {name} needs a package that is not installed: pip install {name}")


# What goes wrong. Each function takes the log's entries, oldest first, and gives a warning or None.


def best_loss(batch: int, scale: float) -> float:
    """The lowest contrastive loss that a batch of B pairs can have at a logit scale s: ln(1 + (B - 1) e^(-sB/(B-1))).

    In nats. It takes matching vectors that are equal, and others that form a simplex with cosines of -1 / (B - 1) (Lu
    and Steinerberger, arXiv 2012.08465). At a scale of 14 or more it is next to nothing; at a scale of 1, bare cosines,
    128 pairs cannot get below 3.86, where guessing gives 4.85.
    """
    return math.log1p((batch - 1) * math.exp(-scale * batch / (batch - 1)))


def stays_at_chance(history: list[dict], batch: int, warmup: int = 0, entries: int = 10, steps: int = 40) -> str | None:
    """Is the loss no better than guessing, ln(batch)?

    It is where each of the last `entries` losses, logged after the warm-up and `steps` steps or more apart in all, has
    come less than 2% of the way from ln(batch) down to `best_loss`; a loss above ln(batch) has come none of it. `batch`
    counts the pairs that are contrasted with one another, of all processes.
    """
    last = _last(history, "loss", entries)
    after = [entry for entry in last if entry["step"] > warmup]
    if batch < 2 or len(after) < entries or after[-1]["step"] - after[0]["step"] < steps:
        return None
    chance = math.log(batch)
    for entry in after:
        lowest = best_loss(batch, entry.get("logit_scale", MAX_SCALE))
        if not entry["loss"] > chance - 0.02 * (chance - lowest):
            return None
    where = "at" if after[-1]["loss"] < 1.02 * chance else "above"
    return (
        f"the loss stays {where} that of guessing, ln({batch}) = {chance:.3f}: {after[0]['loss']:.3f} at step"
        f" {after[0]['step']}, {after[-1]['loss']:.3f} at step {after[-1]['step']}. Nothing is learned. Try to learn"
        " 128 pairs by heart first (a caption file with those alone): if that fails too, look whether the captions"
        " belong to their images; if not, change --learning_rate by a factor of 10 (too low leaves the loss where it"
        " is, too high drives it there; sound are 1e-3 from scratch and 1e-5 to fine-tune) and raise --warmup_steps"
    )


def scale_at_limit(history: list[dict], entries: int = 5) -> str | None:
    """Has the logit scale come to its limit? It has where the last `entries` are within half a percent of 100."""
    last = _last(history, "logit_scale", entries)
    if len(last) < entries or not all(entry["logit_scale"] >= 0.995 * MAX_SCALE for entry in last):
        return None
    first = next(entry for entry in history if "logit_scale" in entry)
    if first["logit_scale"] >= 0.995 * MAX_SCALE:
        return (
            "the logit scale has been at its limit of 100 (temperature 0.01) since the start, where OpenAI's weights"
            " come from: that is no fault while recall rises. Where it does not, lower --learning_rate"
        )
    return (
        f"the logit scale has come to its limit of 100 (temperature 0.01) from {first['logit_scale']:.3g}: the model"
        " tells the pairs of a batch apart, and the loss falls only by being surer. With millions of pairs that is"
        " usual; with few it means learning by heart. Try a larger batch (harder negatives), fewer epochs, more"
        " augmentation (--crop_scale 0.5, --hflip 0.5), or keep the scale by --fixed_logit_scale"
    )


def scale_collapses(history: list[dict], entries: int = 5) -> str | None:
    """Does the logit scale fall towards 1? It does where the last `entries` are below half of the first, or below 2,
    and the last is not above the others. Of a scale that is kept fixed the log is level: no warning."""
    last = [entry["logit_scale"] for entry in _last(history, "logit_scale", entries)]
    first = next((entry["logit_scale"] for entry in history if "logit_scale" in entry), 0)
    level = max(first / 2, 2)
    if len(last) < entries or max(last) > level or last[-1] > min(last) or first == last[-1]:
        return None
    return (
        f"the logit scale has fallen to {last[-1]:.3g} (temperature {1 / last[-1]:.2g}) from {first:.3g}, and goes on:"
        " the model takes back its bets because its embeddings became worse, as a rate does that is too high. Lower"
        " --learning_rate, raise --warmup_steps, and look whether the captions belong to their images"
    )


def recall_falls(history: list[dict], evaluations: int = 2) -> str | None:
    """Does recall fall while the loss falls? It does where the last `evaluations` gave a mean recall at least 2% of the
    best one's below it, and the mean loss between the last two is at least 1% below that before the best one."""
    recalls, losses = curve(history, "eval_mean_recall"), curve(history, "loss")
    if not recalls:
        return None
    best = max(range(len(recalls)), key=lambda n: recalls[n][1])
    ago, ends = len(recalls) - 1 - best, [step for step, _ in recalls]
    if ago < evaluations or max(value for _, value in recalls[-evaluations:]) > 0.98 * recalls[best][1]:
        return None

    def mean_loss(n: int) -> float:  # of the stretch that evaluation n closes
        stretch = [loss for step, loss in losses if (ends[n - 1] if n else -1) < step <= ends[n]]
        return sum(stretch) / len(stretch) if stretch else math.nan

    before, now = mean_loss(best), mean_loss(len(recalls) - 1)
    before = mean_loss(best + 1) if math.isnan(before) else before  # an evaluation before the first step
    if not now < 0.99 * before:
        return None
    return (
        f"mean recall was best at step {ends[best]}, {ago} evaluations ago, {recalls[best][1]:.1%}, and is"
        f" {recalls[-1][1]:.1%} now, while the loss fell from {before:.3f} to {now:.3f}: the model learns the training"
        " pairs by heart. Take the best checkpoint (--load_best_model_at_end with the same --eval_strategy and"
        " --save_strategy), or fewer epochs; against it help a lower --learning_rate, a higher --weight_decay, more"
        " augmentation (--crop_scale 0.5, --hflip 0.5) and more pairs"
    )


def _last(history: list[dict], key: str, n: int) -> list[dict]:
    """The last n entries that have a key, oldest first."""
    return list(islice((entry for entry in reversed(history) if key in entry), n))[::-1]


class Progress(TrainerCallback):
    """Shows and writes down how a training run goes; made by `watch`. Measures on all processes, speaks on the first.

    `log.jsonl` has one object for each entry of the Trainer's log: its step and epoch, what was logged (loss,
    learning_rate, grad_norm, logit_scale, samples_per_second of all processes; what an evaluation gave), `seconds` of
    the run so far and the `time`. Other lines have a step and an `event` (start, resumed), a `warning` or an `error`.
    Numbers that are not finite are written as "NaN", "Infinity" or "-Infinity", with a `reason` beside them.
    """

    def __init__(self, trainer: Trainer, contrasts: bool = True):
        args = trainer.args
        self.args, self.trainer, self.model = args, trainer, trainer.model
        self.folder, self.speaks = Path(args.output_dir), trainer.is_world_process_zero()
        self.samples = trainer.get_total_train_batch_size(args)  # of a step
        # Pairs that are contrasted with one another, if any are.
        self.batch = self.samples // args.gradient_accumulation_steps if contrasts else None
        self.bar, self.said, self.cleanup = None, set(), ExitStack()
        self.begun = self.mark = time.monotonic()  # of training; of the stretch that is being measured
        self.earlier = self.busy = 0.0  # seconds: of attempts before a resume; of training since the last entry
        self.steps = self.first_step = 0  # since the last entry; at the start
        self.drawn = False  # are the curves those of the log?

    # Around training

    def __enter__(self):
        if self.has_bar():
            loggers = [logging.getLogger(), logging.getLogger("transformers")]
            self.cleanup.enter_context(logging_redirect_tqdm(loggers))  # lines come above the bar
        return self

    def __exit__(self, kind, error, traceback):
        self.cleanup.close()
        self._close_bar()
        if not self.speaks:
            return
        if error is not None:
            try:
                self.write(error=f"{kind.__name__}: {error}" if str(error) else kind.__name__)
            except OSError as full:  # which may be the error itself
                logger.warning("%s could not be written: %s", LOG, full)
        self.draw()

    def summary(self):
        """Says where everything is; draws the curves again if more was logged after training."""
        if self.speaks:
            if not self.drawn:
                self.draw()
            print(f"log     {self.folder / LOG}\ncurves  {self.folder / CURVES}\nmodel   {self.folder}", flush=True)

    def draw(self):
        """Draws `curves.png`. A picture that fails must not hide how the run ended: it is said, and that is all."""
        try:
            draw_log(self.folder)
            self.drawn = True
        except Exception as error:
            logger.warning("the curves could not be drawn: %s", error)

    # What the Trainer calls

    def on_train_begin(self, args, state, control, **kwargs):
        self.begun, self.first_step, self.busy, self.steps = time.monotonic(), state.global_step, 0.0, 0
        if not self.speaks:
            self.mark = time.monotonic()
            return
        about = {"batch": self.batch, "processes": args.world_size, "max_steps": state.max_steps}
        if state.global_step:
            self.earlier, cut = continue_log(self.folder / LOG, state.global_step, state.log_history)
            self.write(event="resumed", cut=cut, **about)
            if cut:
                logger.warning("%s: %d entries after step %d are replaced", self.folder / LOG, cut, state.global_step)
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / LOG).write_text("")
            self.earlier = 0.0
            self.write(event="start", **about)
        self.said = set(self.diagnose())  # these were said before the run was interrupted
        self._close_bar()
        if self.has_bar():
            self.bar = tqdm(
                total=state.max_steps, initial=state.global_step, dynamic_ncols=True, smoothing=0, file=sys.stderr,
                bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}, {remaining} left",
            )  # fmt: skip
        self.mark = time.monotonic()

    def on_step_end(self, args, state, control, **kwargs):
        self._count_time()
        self.steps += 1
        if self.bar is not None:
            self.bar.update()

    def on_evaluate(self, args, state, control, **kwargs):
        self.mark = time.monotonic()  # an evaluation, or saving, is no time of training

    on_save = on_evaluate

    def before_log(self, logs: dict):
        """Adds what was measured to an entry that has a loss. Called by ClipTrainer, on every process."""
        if "loss" in logs:
            self._count_time()  # the loss has just been waited for: so this is the time of the device too
            scale = self.model.logit_scale.detach()
            scale = scale.full_tensor() if hasattr(scale, "full_tensor") else scale  # sharded by FSDP
            logs["logit_scale"] = scale.exp().item()
            if self.steps and self.busy:
                logs["samples_per_second"] = self.samples * self.steps / self.busy
            self.busy, self.steps = 0.0, 0
        if self.speaks and not all(is_finite(logs.get(name, 0.0)) for name in ("loss", "train_loss")):
            self.write(**logs)  # the trainer stops before it logs this

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not self.speaks:
            return
        self.write(**logs)
        if self.bar is not None and "loss" in logs:
            self.bar.set_postfix_str(_measured(logs))
        else:
            self._print(self.line(logs))
        active = self.diagnose()
        for name in active.keys() - self.said:
            self.write(warning=active[name])
            logger.warning("step %d: %s", state.global_step, active[name])
        self.said = set(active)

    def on_train_end(self, args, state, control, **kwargs):
        self._close_bar()

    # Helpers

    def has_bar(self) -> bool:
        return self.speaks and not self.args.disable_tqdm and sys.stderr.isatty()

    def diagnose(self) -> dict[str, str]:
        """The warnings that apply now, by the name of their function."""
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
            seconds = (time.monotonic() - self.begun) * left / done if done else math.nan
            rest = f", {tqdm.format_interval(seconds)} left" if math.isfinite(seconds) else ""
            return f"{head}, epoch {state.epoch:.2f}: {_measured(logs)}, rate {logs.get('learning_rate', 0):.2e}{rest}"
        if "eval_mean_recall" in logs:
            ways = []
            for way in ("text_to_image", "image_to_text"):
                found = {name.split("@")[1]: v for name, v in logs.items() if name.startswith(f"eval_{way}_R@")}
                shares = " / ".join(f"{100 * value:.1f}" for value in found.values())
                ways.append(f"{way.replace('_', ' ')} R@{' / '.join(found)}: {shares}%")
            return f"{head}: mean recall {100 * logs['eval_mean_recall']:.1f}%, {', '.join(ways)}"
        if "train_runtime" in logs:
            return f"{head}: trained for {tqdm.format_interval(logs['train_runtime'])}"
        return f"{head}: {logs}"

    def write(self, **entry):
        """Appends an entry to log.jsonl."""
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        seconds = self.earlier + time.monotonic() - self.begun
        entry = {"step": self.trainer.state.global_step, **entry, "seconds": round(seconds, 2), "time": now}
        with open(self.folder / LOG, "a", encoding="utf-8") as file:
            file.write(to_json(entry) + "\n")
        self.drawn = False

    def _count_time(self):
        now = time.monotonic()
        self.busy, self.mark = self.busy + now - self.mark, now

    def _print(self, line: str):
        try:
            tqdm.write(line) if self.bar is not None else print(line, flush=True)
        except BrokenPipeError:  # whoever read it is gone; the log has it all the same
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def _close_bar(self):
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def _measured(logs: dict) -> str:
    """What the bar and the lines show of an entry with a loss."""
    scale, speed = logs["logit_scale"], logs.get("samples_per_second", 0)
    speed = f"{speed:,.{0 if speed >= 10 else 1}f} samples/s"
    return f"loss {logs['loss']:.4g}, temperature {1 / scale:.3g} (scale {scale:.3g}), {speed}"


def to_json(entry: dict) -> str:
    """An entry as a line of JSON; numbers that are not finite become strings, and a `reason` is added for them."""
    odd = {name: value for name, value in entry.items() if isinstance(value, float) and not math.isfinite(value)}
    words = {name: "NaN" if math.isnan(v) else "Infinity" if v > 0 else "-Infinity" for name, v in odd.items()}
    if words:
        words["reason"] = (
            f"{', '.join(words)}: no finite number; the model's numbers have overflowed. Lower --learning_rate or raise"
            " --warmup_steps"
        )
    return json.dumps(entry | words, allow_nan=False)


def continue_log(path: Path, step: int, history: list[dict]) -> tuple[float, int]:
    """Makes a log ready for a run that is resumed from a step, and gives the seconds that it has come to and the number
    of entries that were cut.

    Entries of later steps are cut, because those steps are made again and give entries again; so is a last line that
    was being written when the run was killed. Where there is no log it begins with the entries of the Trainer's own.
    """
    lines, kept, seconds = [to_json(entry) for entry in history], [], 0.0
    if path.is_file():
        lines = path.read_text(encoding="utf-8").splitlines()
    for line in lines:
        try:
            entry = json.loads(line)
            if entry["step"] <= step:
                kept.append(line)
                seconds = entry.get("seconds", seconds)
        except (ValueError, KeyError):
            pass
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(f"{line}\n" for line in kept))
    return seconds, len(lines) - len(kept)


def read_log(folder: str | Path) -> list[dict]:
    """The entries of a run's log.jsonl; a last line that is still being written is left out."""
    path = Path(folder) / LOG
    if not path.is_file():
        raise InputError(f"there is no {LOG} in {folder}: is it the output_dir of a run?")
    entries = []
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            entries.append(json.loads(line))
        except ValueError:
            if number < len(lines):
                raise InputError(f"{path}, line {number} is no JSON: remove it") from None
    return entries


def draw_log(folder: str | Path) -> Path:
    """Draws curves.png of the log.jsonl in a run's folder, and gives its path."""
    entries = read_log(folder)
    batch = next((entry["batch"] for entry in reversed(entries) if "batch" in entry), None)
    draw_curves(Path(folder) / CURVES, entries, batch, str(folder))
    return Path(folder) / CURVES


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m miniclip.progress FOLDER")
    try:
        print(f"drawn in {draw_log(sys.argv[1])}")
    except InputError as error:
        sys.exit(str(error))
