"""Copies of a run's folder on another store, made in the background: `python -m miniclip sync FOLDER URL`.

train.py starts it as a process of its own, which shares neither memory nor random numbers with the training, and ends
what it has begun when the training is killed. A checkpoint is complete on the store once its manifest is there, which
is copied last and deleted first."""

import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from miniclip.run.metadata import RECORD
from miniclip.utils.files import MANIFEST, delete, scratch_path
from miniclip.utils.remote import WAITS, StoreError, join, list_files, read_range, remove, upload

CHECKPOINT = re.compile(r"checkpoint-(\d+)")
EVERY = 30  # seconds between copies of the log and other files that change all the time
PATIENCE = float(os.environ.get("MINICLIP_SYNC_PATIENCE", 300))  # seconds without progress, at the end of a run
OLD_RUN = re.compile(rf"{CHECKPOINT.pattern}/|({MANIFEST}|model\.safetensors|trainer_state\.json|nonfinite-.*)$")


def say(line: str):
    with suppress(OSError):  # nobody reads it any more
        print(line, file=sys.stderr, flush=True)


def step(checkpoint: str | Path) -> int:
    return int(CHECKPOINT.fullmatch(Path(checkpoint).name)[1])


def state(path: Path) -> tuple[int, int]:
    """Returns what tells that a file has changed."""
    about = path.stat()
    return about.st_size, about.st_mtime_ns


def link(source: str, target: str):
    try:
        os.link(source, target)
    except OSError:  # a disk without links
        shutil.copy2(source, target)


def remove_checkpoint(url: str, waits: tuple = ()):
    remove(join(url, MANIFEST), waits)
    remove(url, waits, folder=True)


class TakenError(Exception):
    """Another machine writes to the store."""


class Copier:
    """Copies what is new in a folder to a store. `limit` is the run's --save_total_limit. With `alone` it ends with
    TakenError when another machine has begun a run there."""

    def __init__(self, folder: str | Path, url: str, limit: int | None = None, alone: bool = False):
        self.folder, self.url, self.limit, self.alone = Path(folder), url, limit, alone
        self.sent = {}  # relative name -> state of the file that was copied
        self.copied_at, self.moved_at, self.tidied = -EVERY, time.monotonic(), None

    def moved(self):
        self.moved_at = time.monotonic()

    def checkpoints(self) -> list[str]:
        """Returns the names of the complete checkpoints of the folder, newest first."""
        found = (path.parent.name for path in self.folder.glob(f"checkpoint-*/{MANIFEST}"))
        return sorted(filter(CHECKPOINT.fullmatch, found), key=step, reverse=True)

    def missing(self) -> list[str]:
        """Returns the manifests of checkpoints, and all other files, that are not on the store as they are now."""
        names = [f"{name}/{MANIFEST}" for name in reversed(self.checkpoints())]
        others = (path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*") if path.is_file())
        names += [name for name in others if not re.match(rf"\.|{CHECKPOINT.pattern}/", name)]
        changed = []
        for name in names:
            with suppress(FileNotFoundError):
                if self.sent.get(name) != state(self.folder / name):
                    changed.append(name)
        return changed

    def copy_new(self, final: bool = False):
        """Copies what is not on the store yet: the newest checkpoint first. Raises StoreError and OSError."""
        if self.alone and not self.sent:  # before everything else: from now on the store is this run's
            self.copy(self.folder, {RECORD: RECORD})
        for name in self.checkpoints():
            self.copy_checkpoint(name)
        if final or time.monotonic() - self.copied_at > EVERY:
            self.copy(self.folder, {name: name for name in self.missing() if not CHECKPOINT.match(name)})
            self.copied_at = time.monotonic()
        self.tidy()

    def copy_checkpoint(self, name: str):
        """Copies a checkpoint, from links to its files: the run may delete it before slow copies are done."""
        url, folder, held = join(self.url, name), self.folder / name, scratch_path(self.folder / "sync")
        try:
            if self.sent.get(f"{name}/{MANIFEST}") == (now := state(folder / MANIFEST)):
                return
            if self.alone and read_range(join(self.url, RECORD)) != (self.folder / RECORD).read_bytes():
                raise TakenError
            delete(held)
            shutil.copytree(folder, held, copy_function=link)
            if state(folder / MANIFEST) != now:
                return  # saved again meanwhile
            there = list_files(url, ())
            parts = {path.relative_to(held).as_posix() for path in held.rglob("*") if path.is_file()}
            if MANIFEST in there and read_range(join(url, MANIFEST)) == (held / MANIFEST).read_bytes():
                self.sent[f"{name}/{MANIFEST}"] = now
                return
            for part in [MANIFEST, *(there.keys() - parts)]:
                remove(join(url, part), ())
            sizes = {part: there.get(part, {}).get("size") for part in parts}
            self.copy(held, {part: f"{name}/{part}" for part in parts}, sizes)
        except (FileNotFoundError, shutil.Error):
            if folder.is_dir():
                raise
        finally:
            delete(held)

    def copy(self, folder: Path, names: dict[str, str], sizes: dict | None = None):
        """Copies files of a folder to names on the store, the manifest last, except those that were sent already and
        have the same size there (`sizes`, where the store was asked)."""
        if MANIFEST in names.values():  # of the final model
            remove(join(self.url, MANIFEST), ())
        for name in sorted(names, key=lambda name: (name == MANIFEST, name)):
            with suppress(FileNotFoundError):
                now, size = state(folder / name), (folder / name).stat().st_size
                if self.sent.get(names[name]) != now or sizes and sizes[name] != size:
                    upload(folder / name, join(self.url, names[name]), self.moved, ())
                    self.sent[names[name]] = now
                    self.moved()

    def tidy(self):
        """Deletes checkpoints on the store that the run has deleted, once its newest one is complete there, and parts
        of others. Those that the folder never had are kept up to the limit."""
        local = self.checkpoints()
        sent = {name for name in self.sent if name.endswith(f"/{MANIFEST}")}
        if not local or f"{local[0]}/{MANIFEST}" not in sent or self.tidied == (local, sent):
            return
        files = [name for name in list_files(self.url, ()) if CHECKPOINT.match(name) and "/" in name]
        there = {name.split("/")[0] for name in files}
        whole = {name for name in there if f"{name}/{MANIFEST}" in files}
        surplus = sorted(whole - set(local), key=lambda name: (step(name) < step(local[0]), step(name)))
        surplus = surplus[: max(0, len(whole) - self.limit)] if self.limit else []
        for name in [*(there - whole - set(local)), *surplus]:
            remove_checkpoint(join(self.url, name))
        self.tidied = local, sent


def clear(url: str):
    """Deletes an earlier run on the store, as --overwrite_output_dir does in the folder. Raises StoreError."""
    old = {found[0].split("/")[0] for name in list_files(url) if (found := OLD_RUN.match(name))}
    for name in sorted(old, key=lambda name: name != MANIFEST):
        remove_checkpoint(join(url, name), WAITS) if CHECKPOINT.fullmatch(name) else remove(join(url, name))


def follow(copier: Copier, ended: Callable[[], bool]):
    """Copies what is new until the run has `ended`, and then the rest. Errors are reported once, and tried again. Ends
    this process with status 1 if after the end nothing could be copied for PATIENCE seconds."""
    finished, wait, broken = threading.Event(), 1.0, False

    def give_up(why: str = "", url: str = copier.url):
        names = [name.removesuffix(f"/{MANIFEST}") for name in copier.missing()]
        say(
            f"{why}not copied to {copier.url}: {', '.join(names[:10]) or 'some files'}. All of the run is in "
            f"{copier.folder}; to copy it:\n  {Path(sys.executable).name} -m miniclip sync {copier.folder} {url}"
        )
        os._exit(1)

    def watch():  # a thread, because a request to a store may hang
        begin = None
        while not finished.wait(0.2):
            begin = (begin or time.monotonic()) if ended() else None
            if begin and time.monotonic() - max(begin, copier.moved_at) > PATIENCE:
                give_up()

    threading.Thread(target=watch, daemon=True).start()
    while True:
        final = ended()
        try:
            copier.copy_new(final)
            if broken:
                say(f"copying to {copier.url} works again")
            wait, broken = 1.0, False
            if final:
                finished.set()
                return
        except TakenError:
            give_up("another machine has begun a run in this place: ", f"{copier.url}-2")
        except (StoreError, OSError) as error:
            if not broken:
                say(f"copying does not work, the run goes on and it is tried again: {error}")
            wait, broken = min(60.0, 2 * wait), True
        until = time.monotonic() + (min(wait, 2.0) if final else wait)
        while time.monotonic() < until and (final or not ended()):
            time.sleep(0.1)
