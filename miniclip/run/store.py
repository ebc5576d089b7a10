"""A run whose --output_dir or --resume is on another store: its local folder, its checkpoints, and what copies it."""

import hashlib
import json
import logging
import os
import posixpath
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from miniclip.run.checkpoints import check_checkpoint, last_checkpoint
from miniclip.run.metadata import RECORD
from miniclip.run.sync import CHECKPOINT, step
from miniclip.utils.errors import InputError
from miniclip.utils.files import MANIFEST, remove_folder, replacing, user_cache, write_text
from miniclip.utils.remote import StoreError, download, join, list_files, normal, read_range, store

KNOWN = ".runs_on_store"  # sha256 of each run.json on the store that this folder wrote, or went on from
logger = logging.getLogger(__name__)


def local_folder(url: str) -> Path:
    """Returns the folder in which a run on a store works. Raises InputError for a store that cannot hold it."""
    scheme, _, path = normal(url).partition("://")
    parts = [part for part in path.split("/") if part]
    if scheme in ("http", "https", "memory") or len(parts) < 2 or ".." in parts:
        raise InputError(f"--output_dir {url}: expected a folder on a store, for example s3://BUCKET/runs/mine")
    store(url)  # raises for a package that is missing
    return user_cache().joinpath("runs", scheme, *(re.sub(r"[^\w.=@+-]", "_", part) for part in parts))


def holds_run(url: str) -> bool:
    """Returns whether there is a run on a store."""
    return any(re.match(rf"{CHECKPOINT.pattern}/{MANIFEST}|model\.safetensors", name) for name in list_files(url))


def restore(url: str, folder: Path):
    """Copies the newest complete checkpoint of a run on a store into its folder, if the folder has none as new, with
    the best one and the log. `url` may also be one checkpoint, which raises InputError if it is not complete. So does
    a folder that has a newer one, where another machine has gone on with the run since."""
    if CHECKPOINT.fullmatch(posixpath.basename(url := normal(url))):
        _fetch(url, folder / posixpath.basename(url))
        return
    here = last_checkpoint(folder)
    try:
        files = list_files(url)
        record = read_range(join(url, RECORD)) if RECORD in files else None
    except StoreError as error:
        if not here:
            raise
        logger.warning("%s; resuming from the folder %s", error, folder)
        return
    known = record is None or hashlib.sha256(record).hexdigest() in _known(folder)
    found = sorted({name.split("/")[0] for name in files if CHECKPOINT.match(name) and "/" in name}, key=step)
    for name in reversed(found):
        if here and step(name) <= step(here):
            if known or f"{name}/{MANIFEST}" in files and _same(join(url, name), folder / name):
                return
            fix = f"delete {folder} to go on from {join(url, name)}, or keep it and name another --output_dir"
            raise InputError(f"{here} is not from the run in {url}, with which another machine went on: {fix}")
        try:
            newest = _fetch(join(url, name), folder / name)
            break
        except InputError as error:
            logger.warning("skipping %s: %s", join(url, name), error)
    else:
        if not here and any(f"{name}/{MANIFEST}" in files for name in found):  # not just parts of the first
            raise InputError(f"none of the {len(found)} checkpoints in {url} is usable, for the reasons above")
        return
    state = json.loads((newest / "trainer_state.json").read_text(encoding="utf-8"))
    best = f"checkpoint-{state.get('best_global_step')}"
    if best in found and best != newest.name:
        try:
            _fetch(join(url, best), folder / best)
        except InputError as error:
            logger.warning("the best checkpoint is not there: %s", error)
    for name in ("log.jsonl", "bad_samples.jsonl"):
        if name in files:
            with replacing(folder / name) as scratch:
                download(join(url, name), scratch, files[name]["size"])
    if record is not None:
        _know(folder, record)


def _known(folder: Path) -> list[str]:
    return (folder / KNOWN).read_text().split() if (folder / KNOWN).exists() else []


def _know(folder: Path, record: bytes):
    write_text(folder / KNOWN, "\n".join([*_known(folder), hashlib.sha256(record).hexdigest()]))


def _same(url: str, folder: Path) -> bool:
    manifest = folder / MANIFEST
    return manifest.is_file() and manifest.read_bytes() == read_range(join(url, MANIFEST))


def _fetch(url: str, folder: Path) -> Path:
    """Copies a checkpoint, whole or not at all. Raises InputError for one that is incomplete, damaged or not there."""
    if not (files := list_files(url)):
        raise InputError(f"the checkpoint {url} does not exist")
    if MANIFEST not in files:
        raise InputError(f"the checkpoint {url} is incomplete: it has no {MANIFEST}, which is copied last")
    if _same(url, folder):
        with suppress(InputError):
            check_checkpoint(folder)
            return folder
    logger.warning("copying %s (%.0f MB)", url, sum(about["size"] for about in files.values()) / 1e6)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with replacing(folder, shared=True) as scratch:
        for name, about in files.items():
            download(join(url, name), scratch / name, about["size"])
        check_checkpoint(scratch)
        remove_folder(folder)
    return folder


class Sync:
    """Copies a run's folder to a store in a process of its own, in a `with` block; at its end waits for the rest."""

    def __init__(self, url: str, folder: Path, limit: int | None):
        self.url, self.folder = url, folder
        _know(folder, (folder / RECORD).read_bytes())
        command = [sys.executable, "-m", "miniclip", "sync", str(folder), url, "--follow", str(os.getpid())]
        self.command = command + (["--save_total_limit", str(limit)] if limit and limit > 0 else [])

    def __enter__(self):
        root = str(Path(__file__).parents[2])
        env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}
        how = {"stdin": subprocess.PIPE, "stdout": subprocess.DEVNULL, "start_new_session": True}
        self.process = subprocess.Popen(self.command, env=env, **how)
        return self

    def __exit__(self, *error):
        try:
            self.process.communicate(b"end\n")
        except KeyboardInterrupt:
            print(f"copying to {self.url} goes on in process {self.process.pid}", file=sys.stderr)
            raise
        if self.process.returncode not in (0, 1):
            by_hand = f"python -m miniclip sync {self.folder} {self.url}"
            print(f"the process that copied to {self.url} was ended. To copy the rest: {by_hand}", file=sys.stderr)
