"""Real runs that are killed, interrupted, and short of disk and memory: nothing is lost."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from miniclip.run.checkpoints import checkpoints, keep_newest, last_checkpoint
from miniclip.run.guard import NotFinite
from miniclip.run.metadata import RECORD, differences
from miniclip.utils.errors import InputError
from miniclip.utils.files import check_manifest, lock, write_manifest
from tests.survival_trainer import make_trainer
from tests.training.test_training import ROOT, largest_difference, recipe  # noqa: F401

ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}
SAVE = ["--save_strategy", "steps", "--save_steps", "1"]


@pytest.fixture
def survive(run_script):
    def run(*argv) -> dict:
        return json.loads(run_script("tests/survival_worker.py", *argv).stdout.splitlines()[-1])

    return run


def options(recipe, **more) -> list[str]:  # noqa: F811
    """The recipe as a command line, with patch dropout, crops, colours and a worker that lives on."""
    folder = recipe.parent
    config = json.loads((folder / "tiny.json").read_text())
    config["vision_cfg"]["patch_dropout"] = 0.5
    (folder / "tiny.json").write_text(json.dumps(config))
    values = json.loads(recipe.read_text()) | {
        "num_train_epochs": 20, "save_strategy": "steps", "save_steps": 1, "dataloader_num_workers": 1, **more,
    }  # fmt: skip
    del values["output_dir"]
    words = ([f"--{name}"] if value is None else [f"--{name}", str(value)] for name, value in values.items())
    return [word for option in words for word in option]


@pytest.mark.parametrize("kills", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_kills_at_random_moments(kills, recipe, tmp_path, survive):  # noqa: F811
    """SIGKILL, half of the times within the saving of a checkpoint; what comes out in the end is bit for bit what an
    undisturbed run gives, and the log has each step once."""
    out = tmp_path / "killed"
    epochs = 8 if kills == 4 else 20  # of two steps
    found = survive("chain", out, 1, kills, 1, "--", *options(recipe, num_train_epochs=epochs))
    assert found["killed"] == kills and found["inside"] >= kills // 4 and found["codes"] == [0, 0], found
    assert largest_difference(out / "whole", out / "cut") == 0
    assert found["log"].count("resuming from") >= kills * 3 // 4, "some were killed before they came so far"
    assert found["log"].count("which was being written when the run was stopped") >= kills // 10 + (kills < 10)
    log = [json.loads(line) for line in (out / "cut" / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log if "loss" in entry] == list(range(1, 2 * epochs + 1)), "each step once"
    check_manifest(out / "cut")


@pytest.mark.slow
def test_kills_of_two_processes_with_chunks_and_accumulation(recipe, tmp_path, survive):  # noqa: F811
    more = {"per_device_train_batch_size": 6, "gradient_accumulation_steps": 2, "grad_cache_chunk_size": 3}
    out = tmp_path / "killed"
    found = survive("chain", out, 2, 8, 2, "--", *options(recipe, **more))
    assert found["killed"] == 8 and found["codes"] == [0] * 4, found
    assert largest_difference(out / "whole", out / "cut") == 0


def test_a_kill_at_each_file_of_a_checkpoint(tmp_path, survive):
    """Before and after each file is opened, written, renamed, deleted: afterwards the newest checkpoint is complete,
    and it is the new one only from the moment when the folder got its name."""
    found = survive("boundaries", tmp_path / "out")
    newest, moments = found["newest"], found["moments"]
    assert moments >= 25 and set(newest) == {2, 3} and newest == sorted(newest) and newest[0] == 2
    assert found["left"] == ["checkpoint-2", "checkpoint-3"], "the oldest of three is gone"


def test_a_damaged_checkpoint_is_passed_over(recipe, tmp_path, run_script):  # noqa: F811
    """One flipped bit in any of its files; the run resumes from the one before, and says so."""
    run_script("train.py", recipe, *SAVE, "--max_steps", "3", "--save_total_limit", "3")
    run = tmp_path / "run"
    for name in ("model.safetensors", "optimizer.pt", "trainer_state.json", "scheduler.pt", "rng_state.pth", RECORD):
        data = bytearray((run / "checkpoint-3" / name).read_bytes())
        data[len(data) // 2] ^= 1
        whole, _ = (run / "checkpoint-3" / name).read_bytes(), (run / "checkpoint-3" / name).write_bytes(data)
        assert last_checkpoint(run) == str(run / "checkpoint-2"), name
        (run / "checkpoint-3" / name).write_bytes(whole)
    assert last_checkpoint(run) == str(run / "checkpoint-3")
    (run / "checkpoint-3" / "optimizer.pt").unlink()
    done = run_script("train.py", recipe, *SAVE, "--max_steps", "4", "--resume")
    assert "checkpoint-3/optimizer.pt is missing" in done.stderr and "resuming from" in done.stderr
    assert {path.name for path in checkpoints(run)} == {"checkpoint-3", "checkpoint-4"}
    check_manifest(run / "checkpoint-3")


def test_resuming_is_strict(recipe, caption_set, run_script):  # noqa: F811
    run_script("train.py", recipe, *SAVE, "--max_steps", "2")
    folder = caption_set / "run" / "checkpoint-2"
    whole = load_file(folder / "model.safetensors")
    save_file({name: t for name, t in whole.items() if name != "text.ln_final.weight"}, folder / "model.safetensors")
    write_manifest(folder)
    done = run_script("train.py", recipe, "--max_steps", "4", "--resume", check=False)
    assert done.returncode != 0 and "text.ln_final.weight" in done.stderr


def test_the_only_complete_checkpoint_is_never_deleted(tmp_path):
    def names():
        return {path.name for path in checkpoints(tmp_path)}

    for step in (1, 2, 3, 9, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
    three = tmp_path / "checkpoint-3"
    keep_newest(tmp_path, three, 3, best=str(tmp_path / "checkpoint-1"))  # resumed from 2: 9 and 10 were damaged
    assert names() == {"checkpoint-1", "checkpoint-2", "checkpoint-3"}
    keep_newest(tmp_path, three, 1, best=str(tmp_path / "checkpoint-1"))
    assert names() == {"checkpoint-1", "checkpoint-3"}, "neither the newest nor the best"
    keep_newest(tmp_path, three, 1, best=None)
    keep_newest(tmp_path, three, None, best=None)
    assert names() == {"checkpoint-3"}


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def start(*argv, stderr=subprocess.STDOUT) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *map(str, argv)], cwd=ROOT, env=ONE_THREAD, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=stderr,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # of a background job it is ignored
    )  # fmt: skip


def until(condition, process, seconds: float = 600):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stdout.read()[-3000:]
        assert time.monotonic() < end
        time.sleep(0.01)


def logged(run: Path) -> int:
    """Steps in the log so far."""
    return (run / "log.jsonl").read_text().count('"loss"') if (run / "log.jsonl").is_file() else 0


more = [pytest.param(*case, marks=pytest.mark.slow) for case in ((signal.SIGINT, 1), (signal.SIGTERM, 2))]


@pytest.mark.parametrize("number, processes", [(signal.SIGTERM, 1), *more])
def test_a_signal_saves_first(number, processes, recipe, caption_set, run_script):  # noqa: F811
    """One run's processes all get the signal, data workers too, as from a terminal or a cluster; of two processes only
    one does. A checkpoint is saved outside the schedule, and the resumed run ends like an undisturbed one."""
    run = caption_set / "run"
    more = ["--num_train_epochs", "100", "--dataloader_num_workers", "2", "--logging_steps", "1"]
    argv = ["train.py", recipe, *more]
    if processes == 2:
        argv = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *argv]
        argv += ["--per_device_train_batch_size", "6"]
    process = start(*argv)
    until(lambda: logged(run) >= 3, process)
    if processes == 1:
        for worker in children(process.pid):  # which stay, so that the step can be finished
            caught = dict(line.split(":") for line in Path(f"/proc/{worker}/status").read_text().splitlines())
            assert int(caught["SigIgn"], 16) >> (signal.SIGINT - 1) & 1 and int(caught["SigCgt"], 16) >> 14 & 1
        os.killpg(process.pid, number)
        os.killpg(process.pid, number)  # as clusters do; it is not a second time
    else:
        os.kill(children(process.pid)[-1], number)
    output = process.communicate(timeout=600)[0]
    assert process.returncode == (128 + number if processes == 1 else 1), output[-2000:]
    assert "terminate called" not in output
    (folder,) = checkpoints(run)
    check_manifest(folder)
    step = int(folder.name.split("-")[1])
    assert f"stopped after step {step}; --resume continues from" in output
    assert json.loads((folder / "trainer_state.json").read_text())["global_step"] == step >= 3
    assert not (run / "model.safetensors").exists()
    if number == signal.SIGINT:  # one will do
        more[1] = str(math.ceil((step + 3) / 2))
        run_script("train.py", recipe, *more, "--resume")
        run_script("train.py", recipe, *more, "--output_dir", caption_set / "whole", "--max_steps", "-1")
        state = json.loads((run / "trainer_state.json").read_text())
        assert state["global_step"] == 2 * int(more[1])


def test_a_signal_without_a_reader_and_where_only_the_best_is_saved(recipe, caption_set):  # noqa: F811
    """Its output goes to a pipe whose reader ends too; no schedule would save; an epoch is one step."""
    run = caption_set / "run"
    argv = ["train.py", recipe, "--eval_file", caption_set / "captions.json", "--eval_strategy", "epoch"]
    argv += ["--save_strategy", "best", "--per_device_train_batch_size", "24", "--learning_rate", "1e-9"]
    argv += ["--num_train_epochs", "1000", "--metric_for_best_model", "mean_recall"]
    process = start(*argv, stderr=subprocess.PIPE)
    until(lambda: logged(run) >= 2, process)
    before = {path.name for path in checkpoints(run)}
    process.stdout.close()
    process.stderr.close()
    process.send_signal(signal.SIGINT)
    assert process.wait(600) == 128 + signal.SIGINT
    (folder,) = [path for path in checkpoints(run) if path.name not in before]
    check_manifest(folder)


def test_no_checkpoint_is_overwritten_because_it_cannot_be_used(recipe, caption_set, run_script):  # noqa: F811
    run = caption_set / "run"
    run_script("train.py", recipe, *SAVE, "--max_steps", "2", "--save_only_model")
    there = [path.name for path in checkpoints(run)]
    done = run_script("train.py", recipe, *SAVE, "--max_steps", "4", "--resume", check=False)
    assert done.returncode == 1 and "none of the 2 checkpoints in" in done.stderr and "--model" in done.stderr
    assert "does not list optimizer" in done.stderr and [path.name for path in checkpoints(run)] == there
    done = run_script("train.py", recipe, "--resume_from_checkpoint", caption_set / "nowhere", check=False)
    assert "nowhere does not exist" in done.stderr and "Traceback" not in done.stderr
    # and what replaces a run takes none of it for its own
    (run / "nonfinite-step3.json").write_text("{}")
    more = ["--overwrite_output_dir", "--learning_rate", "1e30", "--warmup_steps", "0"]
    done = run_script("train.py", recipe, *more, check=False)
    assert done.returncode == 1 and not (run / "model.safetensors").exists() and not checkpoints(run)
    assert not (run / "nonfinite-step3.json").exists()


def test_the_best_checkpoint_when_a_run_goes_on(recipe, caption_set, run_script):  # noqa: F811
    """With a limit of one it is kept beside the newest; in a moved folder it is found; damaged, it is done without."""
    best = ["--eval_file", caption_set / "captions.json", "--eval_strategy", "epoch", "--save_strategy", "epoch"]
    best += ["--load_best_model_at_end", "--save_total_limit", "1", "--num_train_epochs", "6"]
    best += ["--metric_for_best_model", "text_to_image_median_rank", "--greater_is_better", "true"]  # an early one is
    run_script("train.py", recipe, *best)
    state = json.loads((caption_set / "run" / "trainer_state.json").read_text())
    kept = {path.name for path in checkpoints(caption_set / "run")}
    assert kept == {f"checkpoint-{state['best_global_step']}", "checkpoint-12"} and len(kept) == 2
    (caption_set / "run").rename(caption_set / "moved")
    done = run_script("train.py", recipe, *best, "--output_dir", caption_set / "moved", "--resume")
    named = caption_set / "moved" / f"checkpoint-{state['best_global_step']}"
    assert largest_difference(caption_set / "moved", named) == 0
    data = bytearray((named / "model.safetensors").read_bytes())
    data[-5] ^= 1
    (named / "model.safetensors").write_bytes(data)
    done = run_script("train.py", recipe, *best, "--output_dir", caption_set / "moved", "--resume")
    assert "the best checkpoint is damaged" in done.stderr
    assert largest_difference(caption_set / "moved", caption_set / "moved" / "checkpoint-12") == 0


def test_a_run_that_stopped_early_stays_so(recipe, caption_set, run_script):  # noqa: F811
    more = ["--eval_file", caption_set / "captions.json", "--early_stopping_patience", "1", "--learning_rate", "1e-9"]
    more += ["--save_strategy", "epoch"]
    run_script("train.py", recipe, *more)
    step = json.loads((caption_set / "run" / "trainer_state.json").read_text())["global_step"]
    assert step < 16
    run_script("train.py", recipe, *more, "--resume")
    assert json.loads((caption_set / "run" / "trainer_state.json").read_text())["global_step"] == step


def test_folders_and_streams_that_cannot_be(recipe, tmp_path, run_script):  # noqa: F811
    (tmp_path / "file").write_text("")
    done = run_script("train.py", recipe, "--output_dir", tmp_path / "file", check=False)
    assert done.returncode == 1 and "file cannot be written to" in done.stderr and "Traceback" not in done.stderr
    code = "import sys; sys.stdout = sys.stderr = None\nfrom miniclip.utils.command_line import run"
    code += "\nrun(lambda argv: None)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_a_full_disk_leaves_the_last_good_checkpoint(recipe, tmp_path):  # noqa: F811
    """A disk of its own with room for two checkpoints and a bit."""
    disk = tmp_path / "disk"
    disk.mkdir()
    size = 21  # MB; a checkpoint has 19: three times the weights
    train = f"{sys.executable} train.py {recipe} --output_dir {disk}/run --max_steps 3"
    script = (
        f"mount -t tmpfs -o size={size}m tmpfs {disk} && {train} --save_strategy steps --save_steps 1; echo code $?;"
        f" cp -r {disk}/run {tmp_path}/kept;"
        f" mount -t tmpfs -o size=3m tmpfs {disk} && {train}; ls {disk}/run"
    )
    how = {"cwd": ROOT, "env": ONE_THREAD, "capture_output": True, "text": True}
    done = subprocess.run(["unshare", "-rm", "sh", "-c", script], **how)
    if "mount" in done.stderr or "unshare" in done.stderr:
        pytest.skip(f"no disk of one's own can be had here: {done.stderr[:200]}")
    assert "code 1" in done.stdout and "Traceback" not in done.stderr, done.stderr[-3000:]
    assert "checkpoint-2 could not be saved" in done.stderr and "checkpoint-1, untouched" in done.stderr
    assert last_checkpoint(tmp_path / "kept") == str(tmp_path / "kept" / "checkpoint-1")
    assert not list((tmp_path / "kept").glob(".*.checkpoint-*"))
    assert "train.py: the disk is full" in done.stderr and "model.safetensors" not in done.stdout


def test_a_data_worker_that_dies_names_its_sample(recipe, caption_set):  # noqa: F811
    run = caption_set / "run"
    more = ["--dataloader_num_workers", "2", "--num_train_epochs", "1000"]
    process = start("train.py", recipe, *more, *SAVE)
    until(lambda: logged(run) >= 3, process)
    os.kill(children(process.pid)[0], signal.SIGKILL)
    output = process.communicate(timeout=600)[0]
    assert process.returncode == 1 and "a data worker died" in output, output[-2000:]
    assert "'record': " in output and ".png" in output and "'caption': " in output and "Traceback" not in output
    assert last_checkpoint(run) is not None


def test_a_nan_loss_ends_the_run_at_that_step(recipe, caption_set, run_script):  # noqa: F811
    run = caption_set / "run"
    done = run_script("train.py", recipe, "--learning_rate", "1e30", "--warmup_steps", "0", *SAVE, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    (path,) = run.glob("nonfinite-step*.json")
    written = json.loads(path.read_text())
    assert written["step"] == 2 and str(path) in done.stderr and not math.isfinite(written["grad_norm"])
    assert len(written["records"]) == 12 and written["gradients_not_finite"]
    captions = {r["image"]: r["caption"] for r in json.loads((caption_set / "captions.json").read_text())}
    for record in written["records"]:
        assert record["caption"] in captions[Path(record["image"]).name]
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert len(losses) == 2 and losses[1] == "NaN" and 0.0 not in losses
    assert last_checkpoint(run) == str(run / "checkpoint-1")


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_nan_never_reaches_the_weights(what, tmp_path):
    """The embeddings of the third batch are infinite, or have such a slope: the weights stay those of the second."""
    trainer = make_trainer(tmp_path / "run", steps=4, save_strategy="no", learning_rate=1e-3)
    seen = []

    def break_third(model, inputs, outputs):
        seen.append({name: t.clone() for name, t in model.state_dict().items()})
        if len(seen) < 3:
            return outputs
        broken = outputs.image_embeds * torch.inf
        if what == "gradient":
            broken = outputs.image_embeds + (outputs.image_embeds * 0).sqrt()  # 0, with an infinite slope
        return outputs._replace(image_embeds=broken)

    trainer.model.register_forward_hook(break_third)
    with pytest.raises(NotFinite, match="at step 3"):
        trainer.train()
    assert all(torch.equal(t, seen[2][name]) for name, t in trainer.model.state_dict().items())
    written = json.loads((tmp_path / "run" / "nonfinite-step3.json").read_text())
    assert len(written["records"]) == 4 and not written["weights_not_finite"]
    assert math.isfinite(written["loss"][0]) == (what == "gradient")


def test_resuming_with_something_else_is_refused_or_said(recipe, caption_set, run_script):  # noqa: F811
    run_script("train.py", recipe, *SAVE, "--max_steps", "3")
    run = caption_set / "run"
    records = json.loads((caption_set / "captions.json").read_text())
    (caption_set / "other.json").write_text(json.dumps(records[::-1]))
    config = json.loads((caption_set / "tiny.json").read_text()) | {"embed_dim": 8}
    (caption_set / "other_model.json").write_text(json.dumps(config))
    for argv, words in (
        (["--train_file", caption_set / "other.json"], ["data.files was", "the order of the pairs"]),
        (["--per_device_train_batch_size", "6"], ["pairs_per_step was 12 and is 6"]),
        (["--model", caption_set / "other_model.json"], ["model.embed_dim was 16 and is 8"]),
        (["--seed", "4"], ["seed was 3 and is 4"]),
    ):
        done = run_script("train.py", recipe, *SAVE, "--max_steps", "4", *argv, "--resume", check=False)
        assert done.returncode == 1 and all(word in done.stderr for word in words), done.stderr[-2000:]
        assert "Traceback" not in done.stderr and [path.name[-1] for path in checkpoints(run)] == ["2", "3"]
    (caption_set / "moved.json").write_bytes((caption_set / "captions.json").read_bytes())
    done = run_script(
        "train.py", recipe, *SAVE, "--max_steps", "4", "--train_file", caption_set / "moved.json", "--resume",
        "--learning_rate", "1e-4",
    )  # fmt: skip
    assert "arguments.learning_rate was 0.003 and is 0.0001" in done.stderr


def test_differences_between_records():
    before = {"seed": 1, "data": {"files": ["a"], "records": 2}, "command": "x", "gone": 1}
    now = {"seed": 2, "data": {"files": ["a"], "records": 3}, "command": "y", "new": [1]}
    assert differences(before, now) == {
        "seed": "seed was 1 and is 2",
        "data.records": "data.records was 2 and is 3",
        "gone": "gone was 1 and is null",
        "new": "new was null and is [1]",
    }


def test_a_second_run_in_the_same_folder_is_refused(recipe, caption_set, run_script):  # noqa: F811
    process = start("train.py", recipe, "--num_train_epochs", "1000")
    until(lambda: logged(caption_set / "run") >= 1, process)
    for more in (["--resume"], ["--overwrite_output_dir"], []):
        done = run_script("train.py", recipe, *more, check=False)
        assert done.returncode == 1 and f"process {process.pid} is writing to" in done.stderr, done.stderr[-2000:]
    process.kill()
    process.communicate()
    with pytest.raises(InputError, match="is writing"):  # of another process: one that has it may open it again
        with lock(caption_set / "run"):
            done = run_script("train.py", recipe, "--resume", check=False)
            raise InputError(done.stderr)
    run_script("train.py", recipe, "--resume", "--max_steps", "1")


def test_equal_runs_are_equal_and_leave_their_record(recipe, caption_set, run_script):  # noqa: F811
    for name, workers in (("one", 0), ("two", 2)):
        more = ["--dataloader_num_workers", workers, "--output_dir", caption_set / name]
        run_script("train.py", recipe, *more, "--eval_file", caption_set / "captions.json", "--max_steps", "6")
    assert largest_difference(caption_set / "one", caption_set / "two") == 0
    record = json.loads((caption_set / "one" / RECORD).read_text())
    assert record["data"]["records"] == 24 and record["data"]["captions"] == 48
    assert len(record["data"]["files"][0]) == 64
    assert record["versions"]["torch"] == torch.__version__.partition("+")[0] or record["versions"]["torch"]
    assert record["seed"] == 3 and "--max_steps 6" in record["command"] and record["model"]["embed_dim"] == 16
    assert record["machine"]["threads"] == 1 and record["pairs_per_step"] == 12


@pytest.mark.parametrize("chunks", [True, False])
def test_a_library_of_the_gpu_that_finds_no_memory(chunks, tmp_path):
    trainer = make_trainer(tmp_path, batch=8)
    trainer.args.chunks_help = chunks
    loss = trainer.loss

    def needs_memory(outputs, batch):
        if len(batch["input_ids"]) > 2:
            raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
        return loss(outputs, batch)

    trainer.loss = needs_memory
    with pytest.raises(InputError, match=r"out of memory with 8 pairs at once .*: 2 fit \(tried\)") as said:
        trainer.train()
    assert ("--grad_cache_chunk_size 2, which keeps all 8 negatives" in str(said.value)) == chunks


@pytest.mark.slow
def test_out_of_memory_says_which_batch_fits(tmp_path, run_script):
    """In an address space too small for a batch of 2,048; the batch size that the message names then fits."""
    env = {"FRESH": "1"}  # a process that has freed memory of its own would fit more
    output = run_script("tests/survival_worker.py", "memory", tmp_path, 2048, env=env).stdout.splitlines()[-1]
    fits = re.search(r"(\d+) fit \(tried\)\. Use --per_device_train_batch_size \1, or --grad", output)[1]
    output = run_script("tests/survival_worker.py", "memory", tmp_path, fits, env=env).stdout.splitlines()[-1]
    assert int(fits) < 2048 and output == '"trained"'
