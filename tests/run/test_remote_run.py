"""A run whose output folder is on another store: copied in the background, found there again, whatever breaks.

With a real S3-compatible server behind a proxy that breaks connections: pip install "moto[server]" s3fs, then
python -m pytest tests/run/test_remote_run.py tests/datasets/test_stores.py -m "slow or not slow"
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import fsspec
import pytest
from safetensors.torch import load_file

from miniclip.run.checkpoints import check_checkpoint, checkpoints
from miniclip.run.store import Sync, local_folder, restore
from miniclip.run.sync import Copier, TakenError, clear
from miniclip.training.parse import parse_train
from miniclip.utils import files, remote
from miniclip.utils.errors import InputError
from miniclip.utils.files import MANIFEST, write_manifest
from miniclip.utils.remote import StoreError
from tests.store_server import s3  # noqa: F401
from tests.training.test_training import ROOT, recipe  # noqa: F401

# Not fast: which arithmetic is the fastest is measured and kept in the user's cache, of which each machine has another.
SAVE = ["--save_strategy", "steps", "--save_steps", "2", "--max_steps", "8", "--fast", "false"]


def make_checkpoint(folder, step: int, best: int | None = None):
    """A checkpoint with the files that a real one has, and other content for each step."""
    folder = folder / f"checkpoint-{step}"
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (folder / name).write_bytes(f"{name} {step}".encode() * 100)
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step, "best_global_step": best}))
    write_manifest(folder)


@pytest.fixture
def memory(tmp_path, monkeypatch):
    """An empty store in memory, and no waiting."""
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(remote.time, "sleep", lambda seconds: None)
    yield fs
    fs.store.clear()


def complete_on(url: str, tmp_path) -> list[int]:
    """The steps of the checkpoints on a store that have a manifest; each must then be whole."""
    names = {name.split("/")[0] for name in remote.list_files(url) if name.endswith(f"/{MANIFEST}")}
    for name in names:
        shutil.rmtree(tmp_path / "looked", ignore_errors=True)
        restore(f"{url}/{name}", tmp_path / "looked")
        check_checkpoint(tmp_path / "looked" / name)
    return sorted(int(name.split("-")[1]) for name in names)


def test_a_copy_that_breaks_at_any_request_leaves_complete_checkpoints(memory, tmp_path, monkeypatch):
    """The connection breaks at the first request that changes the store, at the second, ...: whatever has a manifest
    is whole, the older checkpoint is there until the newer is, and the next attempt copies the rest."""
    url, folder, seen = "memory://bucket/run", tmp_path / "run", []
    kind, left = type(memory), [0]
    put, rm = kind.put_file, kind.rm_file

    def broken(function):
        def request(*args, **kwargs):
            left[0] -= 1
            if left[0] < 0:
                raise ConnectionResetError("broken")
            return function(*args, **kwargs)

        return request

    monkeypatch.setattr(files, "sync", lambda path: None)  # of no use here, and slow
    while seen[-1:] != ["copied"]:
        memory.store.clear()
        shutil.rmtree(folder, ignore_errors=True)
        make_checkpoint(folder, 2)
        make_checkpoint(folder, 4)
        (folder / "log.jsonl").write_text("{}\n")
        Copier(folder, url, 2).copy_new()
        shutil.rmtree(folder / "checkpoint-2")
        make_checkpoint(folder, 6)
        make_checkpoint(folder, 4, best=2)  # saved again, as after resuming from 2
        with monkeypatch.context() as patch:
            left[0] = len(seen)
            remote._opened.clear()
            patch.setattr(kind, "put_file", broken(put))
            patch.setattr(kind, "rm_file", broken(rm))
            try:
                Copier(folder, url, 2).copy_new(final=True)
                seen.append("copied")
            except StoreError as error:
                assert "broken" in str(error)
                seen.append("broken")
        there = complete_on(url, tmp_path)
        assert max(there) == 6 or there == [2, 4], there
        Copier(folder, url, 2).copy_new(final=True)
        assert complete_on(url, tmp_path) == [4, 6]
        shutil.rmtree(tmp_path / "again", ignore_errors=True)
        restore(url, tmp_path / "again")
        assert [path.name for path in checkpoints(tmp_path / "again")] == ["checkpoint-6"]
        assert not list(folder.glob(".*.sync"))
    assert len(seen) > 15


def test_what_the_run_never_had_is_kept_up_to_the_limit(memory, tmp_path):
    url, folder = "memory://bucket/run", tmp_path / "run"
    for limit, left in ((None, [2, 4, 6, 8]), (3, [4, 6, 8]), (1, [6, 8])):
        memory.store.clear()
        shutil.rmtree(folder, ignore_errors=True)
        for step in (2, 4, 6):
            make_checkpoint(folder, step)
        Copier(folder, url).copy_new()
        memory.rm_file("/bucket/run/checkpoint-2/manifest.json") if limit == 3 else None
        shutil.rmtree(folder)
        restore(url, folder)  # another machine
        assert [path.name for path in checkpoints(folder)] == ["checkpoint-6"]
        make_checkpoint(folder, 8)
        Copier(folder, url, limit).copy_new()
        assert complete_on(url, tmp_path) == left
        if limit == 3:
            assert not any("checkpoint-2" in name for name in remote.list_files(url)), "a part of one is of no use"


def test_the_newest_complete_checkpoint_is_found_and_the_best_with_it(memory, tmp_path, caplog):
    url, folder = "memory://bucket/run", tmp_path / "run"
    for step in (2, 4, 6, 8, 10):
        make_checkpoint(folder, step, best=2)
    (folder / "log.jsonl").write_text("{}\n")
    Copier(folder, url).copy_new()
    memory.rm_file("/bucket/run/checkpoint-10/manifest.json")
    memory.pipe_file("/bucket/run/checkpoint-8/optimizer.pt", b"x" * 1300)
    memory.rm_file("/bucket/run/checkpoint-6/rng_state.pth")
    new = tmp_path / "new"
    restore(url, new)
    assert [path.name for path in checkpoints(new)] == ["checkpoint-2", "checkpoint-4"]
    assert (new / "log.jsonl").read_text() == "{}\n" and not list(new.glob(".*"))
    for words in ("checkpoint-10 is incomplete", "sha256 differs", "rng_state.pth is missing"):
        assert words in caplog.text
    with pytest.raises(InputError, match="sha256 differs"):
        restore(f"{url}/checkpoint-8", new)
    restore(f"{url}/checkpoint-2", tmp_path / "one")
    check_checkpoint(tmp_path / "one" / "checkpoint-2")
    shutil.rmtree(new / "checkpoint-2")
    restore(url, new)
    assert not (new / "checkpoint-2").exists(), "the folder's own newest is as new"
    memory.rm("/bucket/run/checkpoint-4", recursive=True)
    memory.rm("/bucket/run/checkpoint-2", recursive=True)
    with pytest.raises(InputError, match="none of the 3 checkpoints in memory://bucket/run is usable"):
        restore(url, tmp_path / "none")
    memory.pipe_file("/bucket/first/checkpoint-2/optimizer.pt", b"x")  # its copy was cut off: begins anew
    restore("memory://bucket/first", tmp_path / "none")
    assert "bucket/first/checkpoint-2 is incomplete" in caplog.text
    memory.pipe_file("/bucket/run/checkpoint-12/../../../out", b"x")
    with pytest.raises(InputError, match="leads out of the folder"):
        restore(url, tmp_path / "none")


def test_a_store_that_is_gone_stops_only_a_run_without_checkpoints(memory, tmp_path, monkeypatch, caplog):
    make_checkpoint(tmp_path / "run", 2)

    def gone(*args, **kwargs):
        raise ConnectionRefusedError("nobody there")

    monkeypatch.setattr(type(memory), "find", gone)
    restore("memory://bucket/run", tmp_path / "run")
    assert "nobody there" in caplog.text
    with pytest.raises(StoreError, match="cannot be reached .*nobody there.*check the network"):
        restore("memory://bucket/run", tmp_path / "new")


def test_two_machines_and_one_store(memory, tmp_path):
    """The one that began last writes; the other stops, and does not mistake its own checkpoints for the run's."""
    url, a, b = "memory://bucket/run", tmp_path / "a", tmp_path / "b"
    make_checkpoint(a, 2)
    (a / "run.json").write_text("of a")
    Sync(url, a, None)  # which would copy
    first = Copier(a, url, alone=True)
    first.copy_new()
    make_checkpoint(a, 4)
    restore(url, a)  # its own
    restore(url, b)
    assert [path.name for path in checkpoints(b)] == ["checkpoint-2"]
    (b / "run.json").write_text("of b")
    Sync(url, b, None)
    Copier(b, url, alone=True).copy_new()
    with pytest.raises(TakenError):
        first.copy_new()
    restore(url, a)  # the newest there is one of its own
    make_checkpoint(b, 3)
    Copier(b, url, alone=True).copy_new()
    with pytest.raises(InputError, match="checkpoint-4 is not from the run in memory://bucket/run, .*delete"):
        restore(url, a)
    make_checkpoint(b, 6)
    Copier(b, url, alone=True).copy_new()
    restore(url, a)
    assert checkpoints(a)[-1].name == "checkpoint-6"
    clear(url)
    assert complete_on(url, tmp_path) == [] and memory.exists("/bucket/run/run.json")


@pytest.mark.parametrize("url", ["s3://bucket", "memory://a/b", "https://a/b/c", "s3://", "s3://b/../../x"])
def test_addresses_that_cannot_hold_a_run(url):
    with pytest.raises(InputError, match="expected a folder on a store"):
        local_folder(url)


def test_an_address_with_one_slash_makes_no_folder():
    with pytest.raises(StoreError, match="s3:/bucket/run: an address begins with two slashes: s3://"):
        parse_train(["--model", "x", "--train_file", "a.json", "--output_dir", "s3:/bucket/run"])


def largest_difference(a, b) -> float:
    a, b = load_file(a), load_file(b)
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


@pytest.mark.slow
def test_a_run_in_a_folder_on_a_store(recipe, local, tmp_path, forge):  # noqa: F811
    """Real processes. The store has what the run's folder has, and the run goes on from it on another machine."""
    there, url = tmp_path / "store" / "run", f"file://{tmp_path}/store/run"
    machine, patience = {"XDG_CACHE_HOME": str(tmp_path / "one")}, {"MINICLIP_SYNC_PATIENCE": "10"}
    train = ["train.py", str(recipe), *SAVE, "--output_dir", url]
    done = forge(train, 300, env=machine | patience)
    assert done.returncode == 0 and "in the background" in done.stdout, done.stderr[-3000:]
    assert f"everything is copied to {url}" in done.stderr
    assert [path.name for path in checkpoints(there)] == ["checkpoint-6", "checkpoint-8"]
    assert {"log.jsonl", "run.json", "curves.png", "config.json", MANIFEST} <= {path.name for path in there.iterdir()}
    assert not list(there.glob(".*")) and largest_difference(local, there / "model.safetensors") == 0
    other = {"XDG_CACHE_HOME": str(tmp_path / "other")} | patience
    done = forge(train, 300, env=other)
    assert done.returncode == 1 and f"{url} holds an earlier run" in done.stderr
    (there / "checkpoint-8" / MANIFEST).unlink()
    (there / "model.safetensors").unlink()
    done = forge([*train, "--resume"], 300, env=other)
    assert "checkpoint-8 is incomplete" in done.stderr and "checkpoint-6" in done.stderr.split("resuming from")[1]
    assert largest_difference(local, there / "model.safetensors") == 0
    assert [path.name for path in checkpoints(there)] == ["checkpoint-6", "checkpoint-8"]
    check_checkpoint(there / "checkpoint-8")
    assert not list(ROOT.glob("file:*"))


def start(s3, *argv, **env) -> subprocess.Popen:  # noqa: F811
    return subprocess.Popen(
        [sys.executable, *map(str, argv)], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **s3.env, **env}, start_new_session=True,
    )  # fmt: skip


def until(condition, process, seconds: float = 120):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < end, process.communicate()[0][-3000:]
        time.sleep(0.02)


@pytest.fixture
def local(recipe, tmp_path, run_script):  # noqa: F811
    """The weights of the same run without a store."""
    if not WEIGHTS:
        run_script("train.py", recipe, *SAVE)
        WEIGHTS.append((tmp_path / "run" / "model.safetensors").read_bytes())
    (tmp_path / "local.safetensors").write_bytes(WEIGHTS[0])
    return tmp_path / "local.safetensors"


WEIGHTS = []
FAULTS = {
    "dropped": lambda proxy: proxy.set("drop", "PUT .*(model|optimizer)", 4),
    "refused for a while": lambda proxy: proxy.set("refuse", "", 150),
    "slow": lambda proxy: proxy.set("slow", "PUT .*scheduler"),
    "unavailable": lambda proxy: proxy.set("503", "PUT .*checkpoint", 12),
    "internal error": lambda proxy: proxy.set("500", "DELETE|PUT .*manifest", 12),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_broken_connections(fault, s3, recipe, local, tmp_path):  # noqa: F811
    """The run ends with the weights of a local one, and in the end everything is on the store."""
    process = start(s3, "train.py", recipe, *SAVE, "--output_dir", "s3://bucket/runs/a")
    until(lambda: any("run.json" in request for request in s3.requests), process)
    FAULTS[fault](s3)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0 and "everything is copied to s3://bucket/runs/a" in output, output[-3000:]
    assert s3.hits, "no request met the fault"
    if fault not in ("slow",):
        assert output.count("copying does not work") == output.count("works again") <= 3, output[-3000:]
    s3.set(None)
    s3.fs.get("bucket/runs/a", str(tmp_path / "got"), recursive=True)
    for folder in checkpoints(tmp_path / "got"):
        check_checkpoint(folder)
    assert [path.name for path in checkpoints(tmp_path / "got")] == ["checkpoint-6", "checkpoint-8"]
    assert largest_difference(local, tmp_path / "got" / "model.safetensors") == 0


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["refuse", "hang"])
def test_a_server_that_is_gone_until_the_end(fault, s3, recipe, local, tmp_path):  # noqa: F811
    argv = ["train.py", recipe, *SAVE, "--output_dir", "s3://bucket/runs/a"]
    process = start(s3, *argv, MINICLIP_SYNC_PATIENCE="3")
    until(lambda: any("PUT" in request for request in s3.requests), process)
    s3.set(fault)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0 and "not copied to s3://bucket/runs/a: " in output, output[-3000:]
    command = output.split("to copy it:\n")[1].split("\n")[0].split()
    assert output.count("copying does not work") <= 1
    s3.set(None)
    folder = tmp_path / "cache" / "miniclip" / "runs" / "s3" / "bucket" / "runs" / "a"
    assert largest_difference(local, folder / "model.safetensors") == 0
    done = start(s3, *command[1:])
    assert "everything is copied" in done.communicate(timeout=120)[0]
    shutil.rmtree(tmp_path / "cache")
    restore("s3://bucket/runs/a", tmp_path / "got")
    assert [path.name for path in checkpoints(tmp_path / "got")] == ["checkpoint-8"]


@pytest.mark.slow
def test_a_kill_in_the_middle_of_a_copy(s3, recipe, local, tmp_path):  # noqa: F811
    """SIGKILL of the training and of what copies, within the upload of a checkpoint: others on the store are whole."""
    argv = ["train.py", recipe, *SAVE, "--output_dir", "s3://bucket/runs/a"]
    for at in ("2", "8"):
        s3.requests.clear()
        s3.set("slow", f"PUT .*checkpoint-[{at}-8]/optimizer")
        process = start(s3, *argv, "--resume")
        until(lambda: s3.hits, process)
        child = [int(pid) for pid in open(f"/proc/{process.pid}/task/{process.pid}/children").read().split()]
        for pid in (process.pid, *child):
            os.kill(pid, signal.SIGKILL)
        process.communicate()
        s3.hits = 0
        time.sleep(0.5)
        complete_on("s3://bucket/runs/a", tmp_path)
        shutil.rmtree(tmp_path / "cache")
    s3.set(None)
    process = start(s3, *argv, "--resume")
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0 and "everything is copied" in output, output[-3000:]
    s3.fs.get("bucket/runs/a", str(tmp_path / "got"), recursive=True)
    assert largest_difference(local, tmp_path / "got" / "model.safetensors") == 0
    for folder in checkpoints(tmp_path / "got"):
        check_checkpoint(folder)
