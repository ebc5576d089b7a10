"""The real scripts in real processes: training, resuming after a kill, two processes, evaluation."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import miniclip
from miniclip.inference.evaluator import RetrievalEvaluator
from miniclip.training.arguments import RunArguments
from miniclip.training.dataset import RunDataset
from miniclip.training.trainer import RunTrainer, check_metric
from miniclip.utils.errors import InputError
from miniclip.utils.files import sha256

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def recipe(caption_set, tiny_config):
    """A recipe that trains a tiny model for 8 epochs of 2 steps on 24 images, with everything that is random on."""
    (caption_set / "tiny.json").write_text(json.dumps(tiny_config.to_dict()))
    values = {
        "model": str(caption_set / "tiny.json"),
        "train_file": str(caption_set / "captions.json"),
        "output_dir": str(caption_set / "run"),
        "per_device_train_batch_size": 12, "num_train_epochs": 8, "learning_rate": 3e-3, "hflip": 0.5,
        "color_jitter": 0.1, "logging_steps": 1, "use_cpu": True, "bf16": False, "save_strategy": "no", "seed": 3,
        "disable_tqdm": True, "holdout": 0,
    }  # fmt: skip
    (caption_set / "recipe.json").write_text(json.dumps(values))
    return caption_set / "recipe.json"


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "model.safetensors")


def trained_and_resumed(recipe, caption_set, run_script, options) -> dict[str, torch.Tensor]:
    """The weights after two steps on two processes, which a run resumed after the first step has to equal."""
    steps = ["--max_steps", "2", "--save_strategy", "steps", "--save_steps", "1", "--per_device_train_batch_size", "6"]
    run_script("train.py", recipe, *options, *steps, processes=2)
    trained = weights(caption_set / "run")
    shutil.rmtree(caption_set / "run" / "checkpoint-2")
    (caption_set / "run" / "model.safetensors").unlink()
    run_script("train.py", recipe, *options, *steps, "--resume", processes=2)
    again = weights(caption_set / "run")
    assert all(torch.equal(again[name], trained[name]) for name in trained)
    return trained


def largest_difference(a, b) -> float:
    a, b = weights(a), weights(b)
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


def test_train_then_load_then_evaluate(recipe, caption_set, run_script):
    out = caption_set / "run"
    done = run_script(
        "train.py", recipe, "--eval_file", caption_set / "captions.json", "--eval_strategy", "epoch",
        "--save_strategy", "epoch", "--load_best_model_at_end", "--num_train_epochs", "30",
    )  # fmt: skip
    assert "24 images, 48 captions, 0 of them cut off" in done.stdout
    state = json.loads((out / "trainer_state.json").read_text())
    losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    recalls = [entry["eval_mean_recall"] for entry in state["log_history"] if "eval_mean_recall" in entry]
    assert min(losses[-3:]) < 0.5 * losses[0]
    assert max(recalls) > 0.7 > recalls[0]
    # the best checkpoint was taken back at the end, and is the one in the folder
    assert state["best_metric"] == pytest.approx(max(recalls)) == pytest.approx(recalls[-1])
    assert largest_difference(out, state["best_model_checkpoint"]) == 0

    model, preprocess, tokenizer = miniclip.load(out)
    images = [caption_set / f"{i}.png" for i in range(24)]
    image = miniclip.embed_images(model, preprocess, images, batch_size=7)
    text = miniclip.embed_texts(model, tokenizer, [f"a tall {c} sheet" for c in ("red", "blue")], batch_size=1)
    assert image.shape == (24, 16) and image.dtype == np.float32
    assert np.allclose(np.linalg.norm(image, axis=1), 1, atol=1e-6)
    assert text.shape == (2, 16)

    done = run_script(
        "evaluate.py", "--model", out, "--eval_file", caption_set / "captions.json",
        "--save_features", caption_set / "features", "--report", caption_set / "report.png",
    )  # fmt: skip
    result = json.loads((out / "retrieval_captions.json").read_text())
    assert set(result) == {"model", "dataset", "metrics", "record"}
    record = result["record"]
    assert record["sha256"] == {str(out / "model.safetensors"): sha256(out / "model.safetensors")}
    assert record["data"]["records"] == 24 and record["data"]["files"] == [sha256(caption_set / "captions.json")]
    assert result["metrics"]["mean_recall"] == pytest.approx(max(recalls))
    assert "image to text" in done.stdout and (caption_set / "report.png").stat().st_size > 10_000

    for captions in ("all", "first"):
        again = run_script(
            "evaluate.py", "--features", caption_set / "features", "--captions", captions,
            "--eval_file", caption_set / "captions.json", "--output_file", caption_set / f"{captions}.json",
        )  # fmt: skip
        assert ("R@3" in again.stdout) == (captions == "first")
    assert json.loads((caption_set / "all.json").read_text())["metrics"] == result["metrics"]


def test_an_earlier_run_is_not_mixed_in(recipe, caption_set, run_script):
    short = ["--max_steps", "1", "--save_strategy", "steps", "--save_steps", "1"]
    run_script("train.py", recipe, *short)
    done = run_script("train.py", recipe, *short, check=False)
    assert done.returncode != 0 and "--overwrite_output_dir" in done.stderr and "Traceback" not in done.stderr
    old = caption_set / "run" / "checkpoint-1"
    (caption_set / "run" / "checkpoint-best").mkdir()
    # what is wrong with the new run is found before the old one is deleted
    run_script("train.py", recipe, *short, "--overwrite_output_dir", "--train_file", "typo.json", check=False)
    run_script("train.py", recipe, *short, "--overwrite_output_dir", "--per_device_train_batch_size", "25", check=False)
    (old / "mark").touch()
    run_script("train.py", recipe, *short, "--overwrite_output_dir")
    assert old.is_dir() and not (old / "mark").exists() and (caption_set / "run" / "checkpoint-best").is_dir()


def test_two_processes_equal_one_with_the_whole_batch(recipe, caption_set, run_script):
    """2 x 6 pairs end at the weights of one process with 12: the negatives and gradients of both; with images that come
    twice, in chunks, and over two batches a step."""
    records = json.loads((caption_set / "captions.json").read_text())
    (caption_set / "twice.json").write_text(json.dumps(records + records[:12]))
    steps = ["--max_steps", "4", "--train_file", caption_set / "twice.json"]
    steps += ["--gradient_accumulation_steps", "2", "--grad_cache_chunk_size", "4"]
    steps += ["--eval_file", caption_set / "captions.json"]
    run_script("train.py", recipe, *steps, "--output_dir", caption_set / "one")
    half = ["--per_device_train_batch_size", "6", "--output_dir", caption_set / "two"]
    run_script("train.py", recipe, *steps, *half, processes=2)
    one, two = (json.loads((caption_set / run / "trainer_state.json").read_text()) for run in ("one", "two"))
    losses = [[entry["loss"] for entry in state["log_history"] if "loss" in entry] for state in (one, two)]
    assert losses[0] == pytest.approx(losses[1], abs=2e-4)
    assert largest_difference(caption_set / "one", caption_set / "two") < 1e-4
    assert one["log_history"][-1]["eval_mean_recall"] == pytest.approx(two["log_history"][-1]["eval_mean_recall"])


@pytest.mark.parametrize("chunk_size, atol, rtol", [(0, 1e-6, 1e-4), (3, 1e-5, 1e-5)])  # 3: with GradCache
def test_gradients_of_two_processes_equal_those_of_one(
    chunk_size, atol, rtol, tiny_model, tiny_config, tmp_path, run_script
):
    from miniclip.loss import clip_loss
    from tests.core.test_model import batch

    pixel_values, input_ids = batch(8, 14)
    loss = clip_loss(*tiny_model.train()(pixel_values, input_ids)[:3])
    loss.backward()
    saved = {"config": tiny_config.to_dict(), "weights": tiny_model.state_dict(), "chunk_size": chunk_size}
    torch.save({**saved, "pixel_values": pixel_values, "input_ids": input_ids}, tmp_path / "batch.pt")
    run_script("tests/gradients_worker.py", tmp_path / "batch.pt", tmp_path / "grads.pt", processes=2)
    two = torch.load(tmp_path / "grads.pt", weights_only=True)
    assert two["loss"].item() == pytest.approx(loss.item(), abs=1e-6)
    for name, p in tiny_model.named_parameters():
        assert torch.allclose(p.grad, two["grads"][name], atol=atol, rtol=rtol), name


def test_the_scale_stays_within_bounds_and_can_be_fixed(recipe, caption_set, run_script):
    run_script("train.py", recipe, "--max_steps", "3", "--fixed_logit_scale", "1")
    assert weights(caption_set / "run")["logit_scale"].item() == 0
    model, preprocess, tokenizer = miniclip.load(caption_set / "run")
    records = miniclip.read_captions(caption_set / "captions.json", None)
    for start in (math.log(99.9), 0.01):
        model.logit_scale.data.fill_(start)
        args = RunArguments(
            str(caption_set / "clamp"), max_steps=3, learning_rate=1.0, per_device_train_batch_size=12, use_cpu=True,
            save_strategy="no", disable_tqdm=True, lr_scheduler_type="constant",
        )  # fmt: skip
        for p in model.parameters():
            p.requires_grad_(p is model.logit_scale)
        dataset = RunDataset(records, preprocess)
        RunTrainer(model, args, dataset, preprocess=preprocess, tokenizer=tokenizer).train()
        assert 0 <= model.logit_scale.item() <= math.log(100) + 1e-6


def test_weight_decay_spares_what_it_should(tiny_model, tmp_path, caption_set):
    args = RunArguments(str(tmp_path), use_cpu=True, per_device_train_batch_size=4)
    records = miniclip.read_captions(caption_set / "captions.json", None)
    config = tiny_model.config
    preprocess, tokenizer = miniclip.Preprocess(config.preprocess_cfg), miniclip.Tokenizer(16)
    dataset = RunDataset(records, preprocess)
    trainer = RunTrainer(tiny_model, args, dataset, preprocess=preprocess, tokenizer=tokenizer)
    decayed = set(trainer.get_decay_parameter_names(tiny_model))
    spared = {name for name, _ in tiny_model.named_parameters()} - decayed
    embeddings = {"visual.class_embedding", "visual.positional_embedding", "text.positional_embedding"}
    assert {name for name in spared if ".ln_" not in name and not name.endswith("bias")} == {"logit_scale", *embeddings}
    assert not any(".ln_" in name or name.endswith("bias") for name in decayed)
    assert {"visual.conv1.weight", "visual.proj.weight", "text.blocks.0.mlp.c_fc.weight"} <= decayed


def test_batch_larger_than_the_data_says_so(recipe, run_script):
    done = run_script("train.py", recipe, "--per_device_train_batch_size", "25", check=False)
    assert done.returncode != 0 and "24 pairs do not fill a batch of 25" in done.stderr


def test_bad_records_are_reported_together_or_skipped_aloud(recipe, caption_set, run_script):
    records = json.loads((caption_set / "captions.json").read_text())
    records[3]["image"] = "missing.png"
    records[5]["caption"] = []
    (caption_set / "captions.json").write_text(json.dumps(records))
    done = run_script("train.py", recipe, check=False)
    assert done.returncode != 0 and "record 3: 'missing.png'" in done.stderr and "record 5: 5.png" in done.stderr
    assert "Traceback" not in done.stderr
    skip = ["--on_bad_sample", "skip", "--max_steps", "1", "--per_device_train_batch_size", "8"]
    done = run_script("train.py", recipe, *skip)
    assert "22 images" in done.stdout and "missing.png" in done.stderr


def test_gradient_accumulation_logs_the_mean_loss(recipe, caption_set, run_script):
    still = ["--learning_rate", "0"]
    whole = ["--max_steps", "2", "--logging_steps", "2", "--output_dir", caption_set / "a"]
    run_script("train.py", recipe, *still, *whole)
    run_script(
        "train.py", recipe, *still, "--max_steps", "1", "--gradient_accumulation_steps", "2",
        "--output_dir", caption_set / "b",
    )  # fmt: skip
    a, b = (json.loads((caption_set / run / "trainer_state.json").read_text())["log_history"][0] for run in "ab")
    assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)


@pytest.mark.parametrize(
    ("metric", "greater"), [(None, True), ("text_to_image_R@1", True), ("eval_text_to_image_mean_rank", False)]
)
def test_the_best_model_is_the_best_by_any_metric(metric, greater, tmp_path):
    args = RunArguments(
        str(tmp_path), load_best_model_at_end=True, eval_strategy="epoch", save_strategy="epoch", use_cpu=True,
        metric_for_best_model=metric,
    )  # fmt: skip
    assert (args.metric_for_best_model, args.greater_is_better) == (metric or "mean_recall", greater)
    evaluator = RetrievalEvaluator([], None, None)
    args = RunArguments(str(tmp_path), use_cpu=True, metric_for_best_model="text_to_image_R1")
    with pytest.raises(InputError, match="'text_to_image_R1' is not one of .*text_to_image_R@1"):
        check_metric(args, evaluator)


def test_activation_checkpointing_changes_no_gradient(tiny_model):
    from miniclip.loss import clip_loss
    from tests.core.test_model import batch

    pixel_values, input_ids = batch(4)
    computed = []
    tiny_model.text.blocks[0].mlp.register_forward_pre_hook(lambda *_: computed.append(1))
    gradients = []
    for _ in range(2):
        tiny_model.zero_grad()
        clip_loss(*tiny_model(pixel_values, input_ids)[:3]).backward()
        gradients.append([p.grad.clone() for p in tiny_model.parameters()])
        tiny_model.gradient_checkpointing_enable()
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(*gradients))
    assert len(computed) == 3  # once as usual, twice when checkpointed
