"""The check of a run's gradients: clean where training is right, and each broken mechanism is named."""

import copy
import json
import re
from functools import partial

import pytest
import torch
from accelerate import Accelerator
from torch.utils.checkpoint import checkpoint

from miniclip.inference import fast
from miniclip.inference.matmul import rounds
from miniclip.model import ClipOutput, VisionTransformer
from miniclip.training import grad_cache, gradient_passes
from miniclip.training import trainer as training
from miniclip.training.check_gradients import compare
from miniclip.training.gradient_passes import Reference
from miniclip.training.trainer import RunTrainer
from tests.check_gradients_worker import check, make_trainer, write_stream


@pytest.fixture
def folder(caption_set, tiny_config, tiny_model):
    write_stream(caption_set)
    (caption_set / "config.json").write_text(json.dumps(tiny_config.to_dict()))
    tiny_model.save_pretrained(caption_set / "teacher")
    return caption_set


def rows(out: str) -> dict[str, dict[str, float]]:
    """The numbers of the table."""
    lines = out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.split()[:2] == ["cosine", "error"])
    names = lines[start].split()
    table = (
        line.rsplit(maxsplit=len(names))
        for line in lines[start + 1 :]
        if line[:5] in ("image", "text ", "proje", "logit")
    )
    return {name.strip(): dict(zip(names, map(float, numbers))) for name, *numbers in table}


PARTS = ["image tower", "text tower", "projections", "logit scale"]


@pytest.mark.parametrize("options, columns", [
    ({}, []),
    ({"fast": False, "gradient_checkpointing": True}, []),
    ({"grad_cache_chunk_size": 4, "loss": "affinity"}, []),
    ({"grad_cache_chunk_size": 4, "loss": "superclip"}, []),
    ({"loss": "siglip", "gradient_accumulation_steps": 2}, ["accumulation"]),
    ({"loss": "distill", "bf16": True, "grad_cache_chunk_size": 2}, ["bf16"]),
    ({"patch_dropout": 0.5, "grad_cache_chunk_size": 4, "bf16": True, "gradient_accumulation_steps": 2},
     ["accumulation", "dropout", "bf16"]),
    ({"fp16": True, "grad_cache_chunk_size": 4, "patch_dropout": 0.5}, ["dropout", "fp16"]),
    ({"batch_norm": True, "stream": True, "gradient_accumulation_steps": 2}, ["accumulation"]),
])  # fmt: skip
def test_what_is_right_is_found_right_and_each_cause_has_its_share(options, columns, folder):
    out, error = check(make_trainer(folder, **options))
    assert not error and "the gradients are right" in out
    table = rows(out)
    assert list(table) == PARTS and list(table["image tower"]) == ["cosine", "error", *columns, "unexplained"]
    for part in table.values():
        assert part["unexplained"] < 1e-5
        if part is not table["logit scale"]:
            assert all(1e-4 < part[name] < 3 for name in columns)
        assert (part["error"] < 1e-5) == (not columns)
    for name in columns:
        assert f"\n{name}: " in out
    if "fp16" in columns:  # as trained: the first step overflows and is skipped
        assert "Trainer skips steps that overflow, like this one with a loss scale above 32768" in out
    if options.get("gradient_accumulation_steps") and "grad_cache_chunk_size" in options:
        assert "5 negatives for a pair, not 11 (--per_device_train_batch_size 12 --grad_cache_chunk_size" in out


def drop_last_chunk(size, tower, features, inputs):
    *chunks, last = [checkpoint(features, part, use_reentrant=False) for part in inputs.split(size)]
    return torch.cat([*chunks, last.detach()])


def redraw(size, tower, features, inputs):
    draw = partial(checkpoint, features, use_reentrant=False, preserve_rng_state=False)
    return torch.cat([draw(part) for part in inputs.split(size)])


def worse_in_low_precision(tower, inputs):
    features = fast.image_features(tower, inputs)
    low = torch.is_autocast_enabled("cpu") or rounds("cpu")
    return features * torch.linspace(0, 2, tower.width) if low else features


def tf32(monkeypatch):
    """Products of matrices that are rounded as --tf32 has them rounded on a GPU: operands of 10 bits. Set as Trainer
    sets it; here it changes nothing, so that linear layers round by themselves where products may be rounded."""
    linear = torch.nn.functional.linear

    def rounded(x: torch.Tensor) -> torch.Tensor:
        return x + (((x.detach().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32) - x.detach())

    def rounding(x, weight, bias=None):
        return linear(rounded(x), rounded(weight), bias) if rounds("cpu") else linear(x, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", rounding)
    monkeypatch.setattr(gradient_passes, "tf32", lambda device: True)
    monkeypatch.setattr(torch.backends, "fp32_precision", "tf32")


@pytest.fixture(autouse=True)
def torch_defaults():
    yield
    torch.set_float32_matmul_precision("highest")


def divide_again(self, *args, compute_loss=RunTrainer.compute_loss, **kwargs):
    return compute_loss(self, *args, **kwargs) / self.args.gradient_accumulation_steps


def break_fast(monkeypatch, function):
    monkeypatch.setitem(fast.FAST, VisionTransformer, function)


@pytest.mark.parametrize("options, broken, message", [
    ({"grad_cache_chunk_size": 4}, lambda m: m.setattr(grad_cache, "in_chunks", drop_last_chunk),
     r"GradCache \(--grad_cache_chunk_size\) is wrong: without chunks the gradients are right"),
    ({"grad_cache_chunk_size": 4, "patch_dropout": 0.5}, lambda m: m.setattr(grad_cache, "in_chunks", redraw),
     "does not repeat the random numbers of the forward pass"),
    ({"gradient_accumulation_steps": 3}, lambda m: m.setattr(RunTrainer, "loss_is_scaled_for_ga", True),
     "The loss is 3 times what it should be: over the 3 accumulation steps it is summed, not averaged"),
    ({"gradient_accumulation_steps": 2, "bf16": True, "pairs": 4},
     lambda m: break_fast(m, lambda tower, x: fast.image_features(tower, x).detach()), "The fast path is wrong"),
    ({}, lambda m: break_fast(m, lambda tower, x: fast.image_features(tower, x) + 0.01),
     "The fast path is wrong: with --fast false the gradients are right"),
    ({"bf16": True}, lambda m: break_fast(m, worse_in_low_precision), "The error of bf16, .*, is more than its"),
    ({"fp16": True}, lambda m: break_fast(m, worse_in_low_precision), "The error of fp16, .*, is more than its"),
    ({}, lambda m: (tf32(m), break_fast(m, worse_in_low_precision)),
     "The error of tf32, .*, is more than its"),
    ({"fp16": True}, lambda m: m.setattr(Accelerator, "unscale_gradients", lambda *args, **kwargs: None),
     r"The gradient is 3.28e\+04 times what it should be: the loss scale of fp16 is not divided out"),
    ({"gradient_accumulation_steps": 3}, lambda m: m.setattr(RunTrainer, "compute_loss", divide_again),
     "The loss is 0.333 times what it should be: over the 3 accumulation steps it is divided twice"),
    ({"batch_norm": True, "grad_cache_chunk_size": 2}, lambda m: m.setattr(training, "_BatchNorm", type(None)),
     "GradCache .* is wrong: a BatchNorm has the statistics of a chunk"),
])  # fmt: skip
def test_a_mistake_is_named(options, broken, message, folder, monkeypatch):
    broken(monkeypatch)
    out, error = check(make_trainer(folder, **options))
    assert error.startswith("the gradients of this run are wrong. ") and list(rows(out)) == PARTS
    assert re.search(message, error), error


def test_tf32_rounds(folder, monkeypatch):
    """In a convolution alone, torch's default on GPUs, it rounds nothing of ours."""
    tf32(monkeypatch)
    out, error = check(make_trainer(folder))
    assert not error and "\ntf32: it rounds" in out and "the gradients are right: the rest" in out
    assert all(1e-5 < part["tf32"] < 1e-2 for name, part in rows(out).items() if name != "logit scale")
    monkeypatch.setattr(torch.backends, "fp32_precision", "none")
    torch.set_float32_matmul_precision("highest")
    out, error = check(make_trainer(folder, fast=False))
    assert not error and "tf32" not in out


def test_nan_is_said(folder):
    trainer = make_trainer(folder)
    trainer.model.logit_scale.data.fill_(float("nan"))
    assert "NaN or infinite" in check(trainer)[1]


TWO_PROCESSES = {  # a case of the worker, and its error
    "all": "",
    "gather": "The loss is right but its gradient is not: it gathers the others' embeddings without gradients",
    "sum": "The gradient is 2 times what it should be: over the 2 processes it is summed, not averaged",
    "apart": "The processes end with different gradients",
    "dropout": "",
    "own": "Each process contrasts its pairs with its own only",
    "same": "All processes read the same pairs",
    "same stream": "All processes read the same pairs",
    "stream": "",
    "norm": "",
}


@pytest.mark.parametrize("names", [
    ["all", "gather", "apart", "same"],
    pytest.param(["sum", "dropout", "own", "stream", "same stream", "norm"], marks=pytest.mark.slow),
])  # fmt: skip
def test_two_processes(names, folder, run_script):
    run_script("tests/check_gradients_worker.py", folder, *names)
    for name in names:
        out, error = json.loads((folder / f"{name}.json").read_text())
        assert TWO_PROCESSES[name] in error and bool(error) == bool(TWO_PROCESSES[name]), (name, error)
        if not error:
            assert max(part["unexplained"] for part in rows(out).values()) < 1e-5, (name, out)
        if name == "norm":
            assert "\nBatchNorm: each process has statistics of its own" in out
            assert rows(out)["image tower"]["BatchNorm"] > 0.01
        if name == "all":
            assert out.startswith(
                "batches of 6, 2 accumulation steps, 2 processes, chunks of 2, bf16, against one fp32"
            )
            assert "11 negatives for a pair, not 23" in out and "\nbf16: it rounds" in out


def test_the_reference_is_the_gradient_of_one_batch(folder):
    """What is added up piece by piece is what autograd finds for the whole batch."""
    trainer = make_trainer(folder)
    inputs = next(iter(trainer.get_train_dataloader()))
    model = copy.deepcopy(trainer.model)
    found = Reference(copy.deepcopy(model), trainer.loss, trainer.normalize, trainer.args.device, 4)([dict(inputs)])
    for tower in (model.visual, model.text):
        tower.wrappers = ()
    images, texts, *scale = model(trainer.normalize(inputs["pixel_values"]), inputs["input_ids"])
    loss = trainer.loss(ClipOutput(images, texts, *scale), inputs)
    loss.backward()
    assert found.loss == pytest.approx(loss.item(), abs=1e-6)
    assert found.grads.keys() == {name for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        assert compare([(found.grads[name], p.grad)]).error < 1e-4, name


def test_a_check_changes_nothing(folder):
    """Trained after a check, a model has the same weights as without; random numbers and files are as before."""
    weights = []
    for checked in (False, True):
        trainer = make_trainer(folder, patch_dropout=0.5, bf16=True)
        before, state = copy.deepcopy(trainer.model.state_dict()), torch.get_rng_state()
        files = sorted(folder.rglob("*"))
        if checked:
            assert not check(trainer)[1]
            assert all(torch.equal(before[name], value) for name, value in trainer.model.state_dict().items())
            assert torch.equal(torch.get_rng_state(), state) and sorted(folder.rglob("*")) == files
            assert all(p.grad is None for p in trainer.model.parameters())
        trainer.train()
        weights.append(trainer.model.state_dict())
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_the_commands(folder, run_script):
    """train.py and miniclip check, on a folder that holds a run, with all that does not matter for a step."""
    run, data = folder / "run", folder / "captions.json"
    (run / "checkpoint-1").mkdir(parents=True)
    (run / "model.safetensors").write_text("a run")
    (folder / "recipe.json").write_text(json.dumps({"model": str(folder / "teacher"), "output_dir": str(run)}))
    common = [folder / "recipe.json", "--train_file", data, "--per_device_train_batch_size", 4, "--use_cpu"]
    more = ["--eval_file", data, "--early_stopping_patience", 1, "--ema", 0.9, "--freeze_image", "tower"]
    more += ["--feature_cache", folder / "cache", "--gradient_accumulation_steps", 2]
    done = run_script("train.py", *common, *more, "--check_gradients")
    assert "the gradients are right" in done.stdout and "image tower  " not in done.stdout
    done = run_script("-m", "miniclip", "check", *common, "--json", processes=2)
    assert "2 processes" in done.stderr and done.stderr.count("the gradients are right") == 1
    found, shown = json.loads(done.stdout), rows(done.stderr)  # of both processes one document
    assert found["right"] and found["error"] is None and list(found["parts"]) == PARTS
    for part, figures in found["parts"].items():
        assert figures == pytest.approx(shown[part], rel=0.06, abs=1e-6)
    assert sorted(path.name for path in run.rglob("*")) == ["checkpoint-1", "model.safetensors"]
    assert not (folder / "cache").exists()
    refused = run_script("-m", "miniclip", "check", *common, "--resume", check=False)
    assert refused.returncode == 1 and "--model CHECKPOINT" in refused.stderr
