"""Resuming with other options: each does what the message says, or is refused."""

import json
import shutil
from contextlib import nullcontext
from dataclasses import fields

import pytest
import torch

from miniclip.run.checkpoints import checkpoints
from miniclip.run.folder import check_place
from miniclip.run.metadata import RECORD
from miniclip.run.resume import BEST, EFFECTS, SAME, check_same_run
from miniclip.training.arguments import RunArguments
from miniclip.training.options import TrainOptions
from miniclip.training.trainer import check_features
from miniclip.utils.errors import InputError
from tests.survival_trainer import make_trainer
from tests.training.test_training import recipe  # noqa: F401


def resumed(folder, before: dict, now: dict, lost: int = 0):
    """Trains, forgets the last `lost` steps, and resumes with other arguments. Returns the second trainer."""
    make_trainer(folder, **before).train()
    for old in checkpoints(folder)[len(checkpoints(folder)) - lost :]:
        shutil.rmtree(old)
    trainer = make_trainer(folder, **before | now)
    trainer.train(True)
    return trainer


def rates(trainer) -> dict[int, float]:
    return {entry["step"]: entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry}


@pytest.mark.parametrize("schedule, factor", [("constant", lambda n: 1), ("linear", lambda n: 1 - n / 6)])
def test_another_learning_rate_is_the_peak_from_then_on(schedule, factor, tmp_path, caplog):
    before = {"steps": 6, "lr_scheduler_type": schedule, "warmup_steps": 0, "learning_rate": 1e-3}
    trainer = resumed(tmp_path, before, {"learning_rate": 1e-5}, lost=1)
    got = rates(trainer)
    assert got[5] == pytest.approx(1e-3 * factor(4)) and got[6] == pytest.approx(1e-5 * factor(5))
    assert "the learning rate of the next step is" in caplog.text


def test_a_prolonged_run_has_the_rates_of_a_long_one(tmp_path):
    """The steps that are added are on the schedule of the new length: the first has no rate of 0."""
    how = {"lr_scheduler_type": "cosine", "learning_rate": 1e-3}
    trainer = resumed(tmp_path / "a", {**how, "steps": 4}, {"steps": 8})
    whole = make_trainer(tmp_path / "b", **how, steps=8)
    whole.train()
    assert {n: rates(trainer)[n] for n in range(5, 9)} == {n: rates(whole)[n] for n in range(5, 9)}
    assert rates(trainer)[5] > 1e-4 and trainer.state.global_step == 8


def test_what_the_optimizer_holds_is_what_the_arguments_say(tmp_path):
    now = {"weight_decay": 0.7, "adam_beta2": 0.5, "adam_epsilon": 0.1, "save_steps": 2, "logging_steps": 3, "steps": 6}
    trainer = resumed(tmp_path, {"steps": 2, "adam_beta1": 0.8}, now)
    groups = trainer.optimizer.param_groups
    assert [group["weight_decay"] for group in groups] == [0.7, 0]
    assert {(group["betas"], group["eps"]) for group in groups} == {((0.8, 0.5), 0.1)}
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-4", "checkpoint-6"]
    assert list(rates(trainer)) == [1, 2, 3, 6]


@pytest.mark.parametrize("steps", [2, 3, 4])
def test_a_finished_run_makes_no_other_step(steps, tmp_path):
    """Also in the middle of an epoch of four steps, and when it is to be shorter than it is."""
    before = {"steps": 3, "batch": 2}
    trainer = resumed(tmp_path, before, {"steps": steps})
    assert trainer.state.global_step == max(steps, 3)


def test_a_finished_stream_makes_no_other_step(recipe, caption_set, run_script):  # noqa: F811
    datasets = pytest.importorskip("datasets")
    rows = json.loads((caption_set / "captions.json").read_text())
    rows = [{"image": str(caption_set / row["image"]), "caption": row["caption"][0]} for row in rows]
    datasets.Dataset.from_list(rows).cast_column("image", datasets.Image()).to_parquet(caption_set / "t.parquet")
    stream = ["--streaming", "--train_file", caption_set / "t.parquet", "--max_steps", "3"]
    stream += ["--save_strategy", "steps", "--save_steps", "1"]
    run_script("train.py", recipe, *stream)
    run_script("train.py", recipe, *stream, "--resume")
    log = [json.loads(line) for line in (caption_set / "run" / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log if "loss" in entry] == [1, 2, 3]
    assert json.loads((caption_set / "run" / "trainer_state.json").read_text())["global_step"] == 3


def compare(folder, before: dict, now: dict) -> dict[str, str]:
    (folder / RECORD).write_text(json.dumps(before))
    return check_same_run(folder, now)


@pytest.mark.parametrize("name, old, new", [
    ("options.loss", "clip", "siglip"), ("options.duplicates", "positive", "ignore"), ("options.ema", None, 0.9),
    ("options.freeze_image", "none", "tower"), ("options.fixed_logit_scale", None, 1), ("options.layer_decay", 1, 0.5),
    ("options.train_num_samples", 20, 30), ("arguments.optim", "sgd", "adafactor"), ("arguments.data_seed", None, 1),
    ("arguments.lr_scheduler_type", "cosine", "linear"), ("arguments.gradient_accumulation_steps", 1, 2),
    ("arguments.lr_scheduler_kwargs", {"min_lr": 1e-5}, {"min_lr": 1e-6}),
    ("arguments.dataloader_drop_last", True, False),
    ("arguments.train_sampling_strategy", "random", "sequential"),
])  # fmt: skip
def test_what_would_make_it_another_run_is_refused(name, old, new, tmp_path):
    part, _, key = name.partition(".")
    with pytest.raises(InputError, match=f"(?s)from a different run:.*{name}.* was .* and is .*: .*--model"):
        compare(tmp_path, {part: {key: old}}, {part: {key: new}})


def test_the_best_checkpoint_is_chosen_by_one_measure(tmp_path):
    metric = {"arguments": {"metric_for_best_model": "MRR"}}
    assert compare(tmp_path, {"eval_data": {"records": 1}}, {"eval_data": {"records": 2}})
    assert compare(tmp_path, {}, metric), "nothing was chosen yet"
    with pytest.raises(InputError, match="eval_data.records was 1 and is 2: the best checkpoint"):
        compare(tmp_path, metric | {"eval_data": {"records": 1}}, metric | {"eval_data": {"records": 2}})


def test_every_option_says_what_it_does_on_resuming(tmp_path, caplog):
    """Those in no table apply from the next step on, or only to what is logged, saved, read or measured."""
    later = {
        "options": "image_root columns on_bad_sample allow_outside_image_root crop_scale hflip color_jitter "
        "patch_dropout early_stopping_patience feature_cache train_file eval_file holdout overwrite_output_dir",
        "arguments": "weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm seed torch_empty_cache_steps",
    }
    for part, cls in (("options", TrainOptions), ("arguments", RunArguments)):
        known = {n.partition(".")[2] for n in (*SAME, *BEST, *EFFECTS) if n.startswith(part)} | {*later[part].split()}
        trained = {f.name for f in fields(cls)} if part == "options" else {"learning_rate", "optim", *known}
        assert trained <= known and known <= {f.name for f in fields(cls)}, trained ^ known
    compare(tmp_path, {"arguments": {"max_grad_norm": 1}, "options": {"pretrained": "a"}},
            {"arguments": {"max_grad_norm": 2}, "options": {"pretrained": "b"}})  # fmt: skip
    assert "max_grad_norm was 1 and is 2: from this step on" in caplog.text
    assert 'pretrained was "a" and is "b": without effect: the weights come from the checkpoint' in caplog.text


def test_hidden_files_that_come_to_the_data_make_no_other_run(recipe, caption_set, run_script):  # noqa: F811
    run_script("-m", "miniclip", "convert_data", caption_set / "captions.json", caption_set / "s" / "0.tar")
    how = ["--train_file", caption_set / "s", "--save_strategy", "steps", "--save_steps", "1"]
    run_script("train.py", recipe, *how, "--max_steps", "1")
    (caption_set / "s" / ".DS_Store").write_text("a file manager's")
    next((caption_set / "s").glob(".miniclip*")).unlink()
    done = run_script("train.py", recipe, *how, "--max_steps", "2", "--resume")
    assert "resuming from" in done.stderr and "max_steps was 1" in done.stderr


@pytest.mark.parametrize("more, place, words", [
    ({}, "photos/run", "run lies in the data .*photos, where"), ({}, "photos2", None),
    ({"train_file": "a.json::{}/photos:train[:9]"}, "photos", "lies in"),
    ({"train_file": "a.json", "eval_file": ["none", "{}/photos"]}, "photos/a", "lies in the data"),
    ({"train_file": "{}/photos/a.json"}, "photos/run", None), ({"model": "{}/run/m.json"}, "run", None),
    ({"model": "{}/run/checkpoint-2"}, "run", "checkpoint-2 is in .*run, whose run overwrite_output_dir deletes"),
    ({"model": "{}/run/checkpoint-2", "overwrite_output_dir": False}, "run", None),
    ({"pretrained": "{}/run/model.safetensors"}, "run", "model.safetensors is in"),
    ({"loss": "distill", "teacher": ["{}/run"]}, "run", "run is in"),
])  # fmt: skip
def test_an_output_folder_is_not_in_the_data_and_holds_nothing_to_begin_with(more, place, words, tmp_path):
    for folder in ("photos/train", "run/checkpoint-2"):
        (tmp_path / folder).mkdir(parents=True)
    for file in ("run/m.json", "run/model.safetensors", "photos/a.json"):
        (tmp_path / file).write_text("{}")
    values = {"train_file": "{}/photos", "overwrite_output_dir": True} | more
    fill = {name: json.loads(json.dumps(value).replace("{}", str(tmp_path))) for name, value in values.items()}
    with pytest.raises(InputError, match=words) if words else nullcontext():
        check_place(TrainOptions(**fill), str(tmp_path / place))


def test_features_of_other_weights_are_refused(tiny_model):
    """The features of a frozen tower are computed before the checkpoint's weights are read."""

    class Dataset:
        image_features, text_features = torch.zeros(1), None

    weights = {name: tensor.clone() for name, tensor in tiny_model.state_dict().items()}
    tiny_model.visual.requires_grad_(False)
    check_features(Dataset, tiny_model, weights, "run/checkpoint-1")
    next(tiny_model.visual.parameters()).data += 1
    with pytest.raises(InputError, match="run/checkpoint-1 has other weights.*visual.*--pretrained"):
        check_features(Dataset, tiny_model, weights, "run/checkpoint-1")
