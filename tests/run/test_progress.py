"""The bar, log.jsonl, curves.png and the warnings of a run, from logs made by hand and from real runs."""

import json
import logging
import math
import os
import pty
import re
import sys

import pytest
import torch
from PIL import Image
from transformers import TrainerCallback

import miniclip
from miniclip.inference.evaluator import RetrievalEvaluator
from miniclip.reports import charts as report
from miniclip.run.diagnose import best_loss, recall_falls, scale_at_limit, scale_collapses, stays_at_chance
from miniclip.run.progress import Progress, check_reporters, continue_log, read_log, to_json
from miniclip.training.arguments import RunArguments
from miniclip.training.dataset import RunDataset
from miniclip.training.trainer import RunTrainer
from miniclip.utils.errors import InputError


def losses(*values: float, first: int = 10, every: int = 10, **more) -> list[dict]:
    return [{"loss": value, "step": first + every * n, **more} for n, value in enumerate(values)]


# The warnings, on logs made by hand


def test_the_best_loss_there_can_be():
    """Reached by a simplex, and by nothing below it: the loss of matching vertices, computed."""
    for batch, scale in ((3, 1.0), (5, 2.0), (128, 1.0)):
        vertices = torch.eye(batch) - 1 / batch
        vertices = vertices / vertices.norm(dim=1, keepdim=True)
        logits = scale * vertices @ vertices.T
        computed = torch.nn.functional.cross_entropy(logits, torch.arange(batch)).item()
        assert best_loss(batch, scale) == pytest.approx(computed, abs=1e-5)
    assert best_loss(128, 1.0) == pytest.approx(3.858, abs=1e-3)
    assert best_loss(128, 14.3) < 1e-3


def test_a_loss_that_stays_at_chance():
    ln = math.log(128)  # 4.852; 2% of the way to 0 is 0.097
    stuck = losses(*[ln] * 10)
    assert "stays at chance level, ln(128) = 4.852" in stays_at_chance(stuck, 128)
    assert "stays above chance level" in stays_at_chance(losses(*[5.5] * 10), 128), "worse is no better"
    assert stays_at_chance(losses(*[ln - 0.09] * 10), 128)
    assert stays_at_chance(losses(*[ln] * 9, ln - 0.1), 128) is None, "it has begun to learn"
    assert stays_at_chance(losses(*[ln] * 9), 128) is None, "too few entries"
    assert stays_at_chance(losses(*[ln] * 10, every=2), 128) is None, "too few steps"
    assert stays_at_chance(stuck, 128, warmup=10) is None, "the first entry is of the warm-up"
    assert stays_at_chance(losses(*[ln] * 11), 128, warmup=10)
    assert stays_at_chance(stuck, 256) is None, "half a nat below ln(256), that is learning"
    assert stays_at_chance(losses(*[3.0] * 5, *[ln] * 10), 128), "it has fallen back"


def test_chance_where_the_scale_is_one():
    """Bare cosines: between guessing at 4.852 and perfection at 3.858 a tenth of a nat is a tenth of the way."""
    ln = math.log(128)
    assert stays_at_chance(losses(*[ln - 0.09] * 10, logit_scale=1.0), 128) is None
    assert stays_at_chance(losses(*[ln - 0.01] * 10, logit_scale=1.0), 128)


def scales(*values: float) -> list[dict]:
    return [{"logit_scale": value, "loss": 1.0, "step": 10 * n} for n, value in enumerate(values, 1)]


def test_the_scale_at_its_maximum():
    assert "reached its maximum of 100" in scale_at_limit(scales(14.3, 60, 99.6, 100, 100, 100, 100))
    assert "14.3" in scale_at_limit(scales(14.3, 60, 99.6, 100, 100, 100, 100))
    assert scale_at_limit(scales(14.3, 60, 99.4, 100, 100, 100, 100)) is None
    assert scale_at_limit(scales(14.3, 100, 100, 100, 100)) is None
    assert "since the start" in scale_at_limit(scales(100, 100, 100, 100, 100))


def test_a_scale_that_falls():
    assert "to 2.5" in scale_collapses(scales(14.3, 10, 6, 5, 4, 3, 2.5))
    assert scale_collapses(scales(14.3, 10, 6, 5, 4, 3, 3.5)) is None, "it rises again"
    assert scale_collapses(scales(14.3, 12, 11, 10, 9, 8)) is None, "not yet half"
    assert scale_collapses(scales(2, 1, 1, 1, 1, 1)), "at its lowest"
    assert scale_collapses(scales(1, 1, 1, 1, 1, 1)) is None, "kept there"
    assert scale_collapses(scales(1, 1.1, 1.2, 1.3, 1.4, 1.5)) is None, "and rising"


def run_log(recalls: list[float], loss: list[float]) -> list[dict]:
    """Evaluation n at step 100 n, and two losses before each."""
    entries = []
    for n, (recall, value) in enumerate(zip(recalls, loss)):
        entries += losses(value + 0.01, value - 0.01, first=100 * n - 50, every=50) if n else []
        entries.append({"eval_mean_recall": recall, "step": 100 * n})
    return entries


def test_recall_that_falls_while_the_loss_falls():
    warning = recall_falls(run_log([0.1, 0.5, 0.48, 0.45], [0, 2.0, 1.5, 1.0]))
    assert "best at step 100, 2 evaluations ago, 50.0%, and is 45.0% now" in warning
    assert "from 2.000 to 1.000" in warning and "--load_best_model_at_end" in warning
    assert recall_falls(run_log([0.1, 0.5, 0.45], [0, 2.0, 1.5])) is None, "one worse evaluation may be chance"
    assert recall_falls(run_log([0.1, 0.5, 0.495, 0.495], [0, 2.0, 1.5, 1.0])) is None, "within 2%"
    assert recall_falls(run_log([0.1, 0.5, 0.48, 0.495, 0.45], [0, 2.0, 1.5, 1.0, 0.9])) is None, "one within 2%"
    assert recall_falls(run_log([0.1, 0.5, 0.48, 0.45], [0, 2.0, 2.0, 2.0])) is None, "the loss does not fall"
    assert recall_falls(run_log([0.1, 0.5, 0.48, 0.45], [0, 2.0, 2.5, 3.0])) is None, "it rises: that is another fault"
    assert recall_falls(run_log([0.5, 0.4, 0.3], [0, 2.0, 1.0])), "best before the first step"
    assert recall_falls(run_log([0.1, 0.5, 0.4, 0.3, 0.6], [0, 4, 3, 2, 1])) is None, "a new best"
    assert recall_falls([]) is None and recall_falls(losses(1.0)) is None


# Real runs


@pytest.fixture
def make(caption_set, tiny_model):
    """A trainer of the tiny model on the 24 pairs, and its Progress."""

    def make(eval_records=None, model=tiny_model, pairs=24, **more):
        values = {
            "per_device_train_batch_size": 12, "learning_rate": 3e-3, "logging_steps": 1, "save_strategy": "no",
            "lr_scheduler_type": "constant", "use_cpu": True, "bf16": False, "max_steps": 6,
        }  # fmt: skip
        args = RunArguments(str(caption_set / "run"), **(values | more))
        records = miniclip.read_captions(caption_set / "captions.json")[:pairs]
        preprocess, tokenizer = miniclip.Preprocess(model.config.preprocess_cfg), miniclip.Tokenizer(16)
        dataset = RunDataset(records, preprocess, seed=args.seed)
        trainer = RunTrainer(
            model, args, dataset, preprocess=preprocess, tokenizer=tokenizer,
            evaluator=eval_records and RetrievalEvaluator(eval_records, preprocess, tokenizer),
        )  # fmt: skip
        return trainer, Progress(trainer)

    return make


def run(trainer, progress, resume=None) -> list[dict]:
    with progress:
        trainer.train(resume)
    return read_log(progress.folder)


def warnings(entries: list[dict]) -> list[str]:
    return [entry["warning"] for entry in entries if "warning" in entry]


def test_the_log_has_what_was_logged(make, caption_set, capsys):
    records = miniclip.read_captions(caption_set / "captions.json")
    trainer, progress = make(records, eval_strategy="steps", eval_steps=3, gradient_accumulation_steps=2)
    entries = run(trainer, progress)
    assert entries[0]["event"] == "start"
    assert {name: entries[0][name] for name in ("batch", "processes", "max_steps")} == {
        "batch": 12, "processes": 1, "max_steps": 6
    }  # fmt: skip
    logged = [{**entry} for entry in trainer.state.log_history]
    assert [{k: v for k, v in e.items() if k not in ("seconds", "time")} for e in entries[1:]] == logged
    steps = [entry for entry in entries if "loss" in entry]
    assert [entry["step"] for entry in steps] == [1, 2, 3, 4, 5, 6]
    wanted = {"epoch", "loss", "learning_rate", "grad_norm", "logit_scale", "samples_per_second", "seconds", "time"}
    assert all(wanted < entry.keys() for entry in steps)
    assert steps[-1]["logit_scale"] == pytest.approx(trainer.model.logit_scale.exp().item())
    total = 24 * sum(1 / entry["samples_per_second"] for entry in steps)  # seconds: a step is of 2 x 12 samples
    assert 0.3 * steps[-1]["seconds"] < total < steps[-1]["seconds"]
    lines = capsys.readouterr().out.splitlines()
    pattern = r"step 2/6, epoch 2\.00: loss \d\.\d+, temperature 0\.0\d+ \(scale 14\.\d\), [\d,.]+ samples/s, "
    pattern += r"rate 3.00e-03, 00:\d\d left"
    assert sum(bool(re.fullmatch(pattern, line)) for line in lines) == 1
    assert sum(line.startswith("step 3/6: mean recall ") for line in lines) == 1
    assert not any(line.startswith("{") for line in lines), "the Trainer's own printing is gone"
    curves = (caption_set / "run" / "curves.png").read_bytes()
    assert curves == drawn(caption_set, entries, 12) != drawn(caption_set, entries, None), "with the loss by chance"


def test_rates_count_the_samples_that_were_seen(make):
    """Not those of a batch that was dropped, and in the last step of an epoch no batch that is not there."""
    how = {"max_steps": -1, "num_train_epochs": 2, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    entries = run(*make(pairs=23, **how))  # 5 batches of 4 an epoch, in steps of 2, 2 and 1
    steps, (end,) = [e for e in entries if "loss" in e], [e for e in entries if "train_runtime" in e]
    assert len(steps) == 6 and end["train_samples_per_second"] == pytest.approx(40 / end["train_runtime"], rel=1e-3)
    seconds = [n / entry["samples_per_second"] for n, entry in zip([8, 8, 4] * 2, steps)]
    assert sum(seconds) < end["train_runtime"]


def drawn(folder, entries: list[dict], batch: int | None) -> bytes:
    report.draw_curves(folder / "expected.png", entries, batch, str(folder / "run"))
    return (folder / "expected.png").read_bytes()


def test_curves_show_the_loss_by_chance(tmp_path):
    entries = losses(4.9, 4.0, 3.0, logit_scale=60.0, learning_rate=1e-5)
    loss, _, rate, scale = report.draw_curves(tmp_path / "with.png", entries, 128, "a run").axes
    curve, chance = loss.lines
    assert curve.get_xydata().tolist() == [[10, 4.9], [20, 4.0], [30, 3.0]]
    assert set(chance.get_ydata()) == {math.log(128)} and chance.get_linestyle() == "--"
    assert chance.get_label() == "chance, ln(128) = 4.85"
    assert rate.lines[0].get_ydata().tolist() == [1e-5] * 3
    assert scale.lines[0].get_ydata().tolist() == [60.0] * 3 and scale.lines[1].get_label() == "limit, 100"
    without = report.draw_curves(tmp_path / "without.png", entries[:1], None, "a run")
    assert len(without.axes[0].lines) == 1
    report.draw_curves(tmp_path / "empty.png", [], 128, "a run")
    assert Image.open(tmp_path / "empty.png").size == Image.open(tmp_path / "with.png").size


class Stop(TrainerCallback):
    """An error in the middle of a run."""

    def __init__(self, step: int, error: type):
        self.step, self.error = step, error

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise self.error("the power went")


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_a_run_that_breaks_off_leaves_log_and_curves_and_goes_on(error, make, caption_set):
    saving = {"save_strategy": "steps", "save_steps": 3, "max_steps": 8}
    trainer, progress = make(**saving)
    trainer.add_callback(Stop(6, error))
    with pytest.raises(error):
        run(trainer, progress)
    log, curves = caption_set / "run" / "log.jsonl", caption_set / "run" / "curves.png"
    before = read_log(caption_set / "run")
    assert [entry["step"] for entry in before if "loss" in entry] == [1, 2, 3, 4, 5]
    assert before[-1]["error"] == f"{error.__name__}: the power went"
    assert curves.read_bytes() == drawn(caption_set, before, 12)
    with open(log, "a") as file:
        file.write('{"step": 6, "los')  # killed while it wrote
    curves.unlink()

    trainer, progress = make(**saving)
    after = run(trainer, progress, str(caption_set / "run" / "checkpoint-3"))
    assert [entry["step"] for entry in after if "loss" in entry] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert after[:4] == before[:4], "what was there stays"
    assert (after[4]["event"], after[4]["step"], after[4]["cut"]) == ("resumed", 3, 4)  # steps 4, 5, error, half a line
    assert [a["loss"] for a in after[5:7]] == pytest.approx([b["loss"] for b in before[4:6]], abs=1e-6)
    seconds = [entry["seconds"] for entry in after]
    assert seconds == sorted(seconds), "they continue"
    assert curves.is_file()


def test_a_log_that_was_lost_begins_with_the_trainers_own(tmp_path):
    history = [{"loss": 2.0, "step": 1}, {"loss": math.nan, "step": 2}]
    assert continue_log(tmp_path / "log.jsonl", 2, history) == (0.0, 0)
    entries = read_log(tmp_path)
    assert [entry["loss"] for entry in entries] == [2.0, "NaN"]


def test_nan_and_infinity_in_the_log(tmp_path):
    entry = json.loads(to_json({"loss": math.nan, "grad_norm": -math.inf, "step": 3}))
    assert (entry["loss"], entry["grad_norm"], entry["step"]) == ("NaN", "-Infinity", 3)
    assert entry["reason"].startswith("loss, grad_norm not finite: ") and "--learning_rate" in entry["reason"]


def test_a_nan_loss_is_in_the_log(make, caption_set):
    trainer, progress = make(learning_rate=1e30, max_grad_norm=0)
    with pytest.raises(FloatingPointError):
        run(trainer, progress)
    *_, broken, last = read_log(caption_set / "run")
    assert broken["loss"] == "NaN" and "overflowed" in broken["reason"] and broken["step"] == last["step"]
    assert "Lower --learning_rate" in last["error"]
    assert (caption_set / "run" / "curves.png").is_file()


@pytest.mark.parametrize("rate", [1e-7, 0.3])
def test_a_run_that_learns_nothing_gets_a_warning(rate, make, caplog):
    """At a rate that is too low the loss stays where it began; one that is too high drives it to ln(12)."""
    trainer, progress = make(learning_rate=rate, max_steps=60, logging_steps=5)
    entries = run(trainer, progress)
    word = "above" if rate < 1 / 1000 else "at"
    warned = [entry for entry in entries if f"stays {word} chance level, ln(12) = 2.485" in entry.get("warning", "")]
    assert [entry["step"] for entry in warned] == [50], "once, with the tenth entry"
    assert caplog.text.count("chance level, ln(12)") == 1
    assert len(warnings(entries)) == (1 if rate < 1 / 1000 else 2), "at the high rate the scale falls too"


def test_a_scale_that_reaches_its_maximum_gets_a_warning(make):
    """Four memorised pairs, then a scale that may move fast."""
    few = {"pairs": 4, "per_device_train_batch_size": 4}
    trainer, progress = make(max_steps=30, logging_steps=30, **few)
    run(trainer, progress)
    for p in trainer.model.parameters():
        p.requires_grad_(p is trainer.model.logit_scale)
    trainer, progress = make(max_steps=14, learning_rate=0.5, model=trainer.model, **few)
    warned = warnings(run(trainer, progress))
    assert len(warned) == 1 and "reached its maximum of 100" in warned[0]


def test_a_scale_that_falls_gets_a_warning(make):
    """Frozen random towers: the scale alone can lower the loss, by dropping."""
    trainer, progress = make(max_steps=20, learning_rate=0.2)
    for p in trainer.model.parameters():
        p.requires_grad_(p is trainer.model.logit_scale)
    torch.nn.init.normal_(trainer.model.visual.proj.weight)
    warned = warnings(run(trainer, progress))
    assert len(warned) == 1 and "does not recover" in warned[0]


def test_recall_that_falls_while_the_loss_falls_gets_a_warning(make, caption_set):
    """The evaluation set contradicts the training set: what is memorised there is wrong here."""
    records = miniclip.read_captions(caption_set / "captions.json")
    captions = [record["caption"] for record in records]
    contrary = [{**record, "caption": captions[(i + 12 + 5) % 24]} for i, record in enumerate(records)]
    trainer, progress = make(contrary, max_steps=60, eval_strategy="steps", eval_steps=10, eval_on_start=True)
    warned = warnings(run(trainer, progress))
    assert warned and all("mean recall was best at step" in warning for warning in warned)


# A terminal


def test_one_bar_in_a_terminal(make, caption_set, monkeypatch, capsys):
    """Standard error is a real terminal of 120 columns; what is printed comes above the bar, which is one."""
    import fcntl
    import struct
    import termios

    screen, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    records = miniclip.read_captions(caption_set / "captions.json")
    trainer, progress = make(records, eval_strategy="steps", eval_steps=3, learning_rate=0.0, weight_decay=0.0)
    handler = logging.StreamHandler(os.fdopen(terminal, "w"))
    monkeypatch.setattr(sys, "stderr", handler.stream)
    run(trainer, progress)
    handler.stream.flush()
    text = os.read(screen, 1_000_000).decode()
    bars = re.findall(r"(\d+)%\|[^|]*\| (\d)/6(.*?), (\d\d:\d\d|\?) left", text)
    assert bars and len({line for line in text.splitlines() if "%|" in line}) > 0
    assert re.search(r"100%\|█+\| 6/6, loss \d\.\d+, temperature 0\.07 \(scale 14\.3\), [\d,.]+ samples/s", text)
    assert "mean recall" in capsys.readouterr().out
    assert "'loss'" not in text, "the Trainer's own bar is gone"


# Services


def test_a_service_that_is_not_installed_is_named(tmp_path):
    args = RunArguments(str(tmp_path), use_cpu=True, report_to=["tensorboard", "wandb"])
    missing = [name for name in ("tensorboard", "wandb") if not __import__("importlib.util").util.find_spec(name)]
    if not missing:
        pytest.skip("both are installed")
    with pytest.raises(InputError, match=f"pip install {missing[0]}"):
        check_reporters(args)


def test_tensorboard(make, caption_set):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    records = miniclip.read_captions(caption_set / "captions.json")
    trainer, progress = make(records, report_to="tensorboard", eval_strategy="steps", eval_steps=3)
    entries = run(trainer, progress)
    folder = next((caption_set / "run" / "runs").iterdir())
    events = EventAccumulator(str(folder)).Reload()
    tags = events.Tags()["scalars"]
    assert {"train/loss", "train/logit_scale", "train/samples_per_second", "eval/mean_recall"} <= set(tags)
    logged = [entry["logit_scale"] for entry in entries if "loss" in entry]
    assert [event.value for event in events.Scalars("train/logit_scale")] == pytest.approx(logged)


def test_weights_and_biases_offline(make, caption_set, monkeypatch):
    pytest.importorskip("wandb")
    for name, value in {"MODE": "offline", "DIR": str(caption_set), "SILENT": "true"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    trainer, progress = make(report_to="wandb")
    run(trainer, progress)
    import wandb

    assert wandb.run.summary["train/logit_scale"] == pytest.approx(trainer.model.logit_scale.exp().item())
    wandb.finish()
    assert list(caption_set.glob("wandb/offline-run-*/run-*.wandb"))
