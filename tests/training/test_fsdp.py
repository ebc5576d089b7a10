"""FSDP and other runs of several processes: launchers, equal metrics on any number, the memory of the logits."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

import miniclip
from miniclip.inference.matmul import fast_arithmetic
from miniclip.run.checkpoints import last_checkpoint
from miniclip.run.progress import draw_log
from miniclip.training.arguments import RunArguments
from miniclip.training.fsdp import uses_fsdp
from miniclip.training.trainer import RunTrainer
from miniclip.utils.errors import InputError
from tests.fsdp_worker import bytes_kept_by_the_loss, evaluate_two, make_trainer
from tests.training.test_training import ROOT, largest_difference, recipe  # noqa: F401


@pytest.fixture
def folder(caption_set, tiny_model):
    """The caption set with a model to start from and an evaluation set of 23 images with 1 to 5 captions each: neither
    the images nor the 67 captions divide among 2 or 3 processes."""
    records = json.loads((caption_set / "captions.json").read_text())
    for i, record in enumerate(records):
        record["caption"] = [f"{text}, {word}" for word in ("one", "two", "three") for text in record["caption"]]
        record["caption"] = record["caption"][: 1 + 3 * i % 5]
    assert sum(len(record["caption"]) for record in records[:23]) == 67
    (caption_set / "odd.json").write_text(json.dumps(records[:23]))
    for i, record in enumerate(records[:7]):
        (caption_set / "classes" / ("dog", "cat")[i % 2]).mkdir(parents=True, exist_ok=True)
        shutil.copy(caption_set / record["image"], caption_set / "classes" / ("dog", "cat")[i % 2] / f"{i}.png")
    tiny_model.save_pretrained(caption_set / "model_dir")
    return caption_set


def start_worker(run_script, processes: int, folder, what: str) -> dict:
    run_script("tests/fsdp_worker.py", folder, what, processes=processes)
    return json.loads((folder / "found.json").read_text())


def train_alone(folder, **more) -> tuple[RunTrainer, list[float]]:
    """What one process makes of the worker's four steps: the trainer, its model saved in one/, and its losses."""
    trainer = make_trainer(folder, "one", 12, save_strategy="no", **more)
    trainer.train()
    trainer.save_model()
    return trainer, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_three_processes_evaluate_and_shard(folder, run_script):
    """One start of torchrun for what three processes have to show."""
    found = start_worker(run_script, 3, folder, "quick")
    trainer = make_trainer(folder, "one", 12)
    assert found["metrics"] == trainer.evaluate() and "eval_zero_shot_top1" in found["metrics"]
    assert found["of_two"] == evaluate_two(trainer, folder)
    # the logits of 1,200 pairs: each of three processes keeps a third of what one keeps
    assert found["kept"] == pytest.approx(bytes_kept_by_the_loss(1200) / 3, rel=0.05)

    trainer, losses = train_alone(folder)
    fsdp = found["fsdp"]
    assert fsdp["share"] < 0.4, "of a weight a process holds a third"
    assert fsdp["before"] == found["metrics"]["eval_mean_recall"]
    assert fsdp["losses"] == pytest.approx(losses, abs=1e-5)
    assert fsdp["after"] == pytest.approx(trainer.evaluate()["eval_mean_recall"])
    assert largest_difference(folder / "one", folder / "fsdp") < 2e-5
    assert largest_difference(folder / "model_dir", folder / "one") > 0.01, "and not because nothing was learned"
    assert load_file(folder / "fsdp" / "model.safetensors")["logit_scale"].shape == ()
    assert miniclip.load(folder / "fsdp")[0].logit_scale.dtype == torch.float32


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_fsdp_with_all_that_goes_with_it(processes, folder, run_script):
    found = start_worker(run_script, processes, folder, "all")
    _, losses = train_alone(folder)
    for name in ("chunks", "checkpointing", "by_fsdp"):
        assert found[name]["losses"] == pytest.approx(losses, abs=1e-5)
        assert largest_difference(folder / "one", folder / name) < 2e-5
    assert largest_difference(folder / "one", folder / "saved") < 2e-5
    assert largest_difference(folder / "saved", folder / "resumed") == 0, "resumed from step 2 of 4"
    assert not list((folder / "saved").glob("checkpoint-*/pytorch_model_fsdp.bin"))
    assert last_checkpoint(folder / "saved") == str(folder / "saved" / "checkpoint-4")
    _, losses = train_alone(folder, gradient_accumulation_steps=2)
    assert found["accumulation"]["losses"] == pytest.approx(losses, abs=1e-5)
    assert largest_difference(folder / "one", folder / "accumulation") < 2e-5
    with fast_arithmetic("cpu"):  # FSDP has it, but no fast path, and in bf16 one sees what is rounded
        _, losses = train_alone(folder, bf16=True, fast=False)
    assert found["bf16"]["losses"][0] == pytest.approx(losses[0], rel=1e-5)
    assert found["bf16"]["losses"] == pytest.approx(losses, rel=5e-3)
    assert found["bf16"]["losses"] != pytest.approx(found["chunks"]["losses"], rel=1e-5)


def eval_entry(folder) -> dict:
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    evaluations = [{name: v for name, v in entry.items() if name.startswith("eval_")} for entry in entries]
    evaluations = [entry for entry in evaluations if entry]
    assert len(evaluations) == 2 and evaluations[0] == evaluations[1], "after the epoch and at the end"
    return evaluations[0]


@pytest.mark.slow
def test_accelerate_launch_on_two_processes(folder, recipe, run_script):  # noqa: F811
    """train.py as a user starts it, with the set that does not divide; the rate is 0, so the model stays."""
    done = run_script(
        "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
        "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
        "train.py", recipe, "--model", folder / "model_dir", "--eval_file", folder / "odd.json",
        "--per_device_train_batch_size", "6", "--learning_rate", "0", "--weight_decay", "0", "--num_train_epochs", "1",
    )  # fmt: skip
    assert "terminate called" not in done.stderr
    logged = eval_entry(folder / "run")
    metrics = make_trainer(folder, "one", 12).evaluate()
    assert logged == {name: metrics[name] for name in logged} and len(logged) > 6
    entries = [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text().splitlines()]
    assert entries[0]["event"] == "start" and entries[0]["batch"] == 12 and entries[0]["processes"] == 2
    assert [entry["step"] for entry in entries if "loss" in entry] == [1, 2], "one process writes"
    assert done.stdout.count("step 2/2, epoch") == 1, "and one speaks"
    for what, name in (("log", "run/log.jsonl"), ("curves", "run/curves.png"), ("model", "run")):
        assert len(re.findall(rf"^{what} +{re.escape(str(folder / name))}$", done.stdout, re.M)) == 1
        assert (folder / name).exists()
    (folder / "run" / "curves.png").unlink()
    assert draw_log(folder / "run").is_file()
    with pytest.raises(InputError, match="no log.jsonl"):
        draw_log(folder)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_torchrun_on_any_number_of_processes(processes, folder, recipe, run_script):  # noqa: F811
    run_script(
        "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes,
        "train.py", recipe, "--model", folder / "model_dir", "--eval_file", folder / "odd.json",
        "--per_device_train_batch_size", 12 // processes, "--learning_rate", "0", "--weight_decay", "0",
        "--num_train_epochs", "1",
    )  # fmt: skip
    logged = eval_entry(folder / "run")
    metrics = make_trainer(folder, "one", 12).evaluate()
    assert logged == {name: metrics[name] for name in logged}


@pytest.mark.slow
def test_train_py_in_bf16(folder, recipe, run_script):  # noqa: F811
    """The launcher's environment decides what autocast covers: the same losses as without FSDP, within rounding."""
    common = [recipe, "--max_steps", "2", "--logging_steps", "1", "--save_strategy", "no", "--bf16", "true"]
    run_script("train.py", *common, "--output_dir", folder / "one")
    common += ["--per_device_train_batch_size", "6", "--fsdp", "full_shard", "--output_dir", folder / "two"]
    run_script("train.py", *common, processes=2)
    logs = [map(json.loads, (folder / run / "log.jsonl").read_text().splitlines()) for run in ("one", "two")]
    one, two = ([entry["loss"] for entry in log if "loss" in entry] for log in logs)
    assert len(one) == 2 and one == pytest.approx(two, rel=5e-3)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["fsdp", "accelerate"])
def test_train_py_with_fsdp(how, folder, recipe, run_script):  # noqa: F811
    """Both ways to ask for it, an interrupted run that resumes, the best model loaded at the end."""
    common = [
        recipe, "--eval_file", folder / "odd.json", "--max_steps", "6", "--eval_strategy", "steps", "--eval_steps", "2",
        "--save_strategy", "steps", "--save_steps", "2", "--load_best_model_at_end", "--save_total_limit", "5",
        "--adam_epsilon", "1e-3",
    ]  # fmt: skip
    run_script("train.py", *common, "--output_dir", folder / "one")
    common += ["--per_device_train_batch_size", "6", "--output_dir", folder / "two"]
    if how == "fsdp":
        start = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "train.py", *common, "--fsdp"]
        start += ["--fsdp_config", '{"activation_checkpointing": true}']
    else:
        start = [
            "-m", "accelerate.commands.launch", "--use_fsdp", "--fsdp_version", "2", "--fsdp_auto_wrap_policy",
            "TRANSFORMER_BASED_WRAP", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no",
            "--dynamo_backend", "no", "--main_process_port", "0", "train.py", *common,
        ]  # fmt: skip
    run_script(*start)
    assert largest_difference(folder / "one", folder / "two") < 1e-4
    whole = {name: t.clone() for name, t in load_file(folder / "two" / "model.safetensors").items()}
    for later in ("checkpoint-4", "checkpoint-6"):
        os.rename(folder / "two" / later, folder / later)
    done = run_script(*start, "--resume_from_checkpoint", "latest")
    assert "checkpoint-2" in done.stderr
    again = load_file(folder / "two" / "model.safetensors")
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())


@pytest.mark.slow
def test_the_slurm_script_starts_what_it_says(folder, recipe):  # noqa: F811
    """With stand-ins for SLURM's two commands, on one node with two processes; then once more, as a requeued job."""
    for name, text in {"srun": 'shift\nexec "$@"', "scontrol": "echo localhost"}.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    env = {
        **os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "PYTHON": sys.executable, "OMP_NUM_THREADS": "1",
        "SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "localhost", "SLURM_NNODES": "1",
        "SLURM_GPUS_ON_NODE": "2", "SLURM_SUBMIT_DIR": str(ROOT),
    }  # fmt: skip
    more = ["--per_device_train_batch_size", "6", "--save_strategy", "steps", "--save_steps", "2"]
    for steps in ("2", "4"):
        command = ["bash", "recipes/slurm.sh", recipe, *more, "--max_steps", steps]
        done = subprocess.run([str(word) for word in command], cwd=ROOT, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
    entries = [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries if "loss" in entry] == [1, 2, 3, 4]
    assert [entry["processes"] for entry in entries if "event" in entry] == [2, 2]


def test_fsdp_that_cannot_be_is_refused(tmp_path, monkeypatch):
    args = RunArguments(str(tmp_path), use_cpu=True)
    assert not uses_fsdp(args)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(InputError, match="use FSDP 2"):  # accelerate's default
        uses_fsdp(args)
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(InputError, match="there is only one: use torchrun"):
        uses_fsdp(args)
