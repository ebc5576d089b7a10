"""Copies of a run's folder on another store, made in the background: `python -m miniclip sync FOLDER URL`.

train.py starts it as a process of its own, which shares neither memory nor random numbers with the training, and ends
what it has begun when the training is killed. A checkpoint is complete on the store once its manifest is there, which
is copied last and deleted first.
"""

import os
import posixpath
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from miniclip.utils.files import MANIFEST, delete, lock, scratch_path
from miniclip.utils.remote import StoreError, join, list_files, read_range, remove, retrying, upload

CHECKPOINT = re.compile(r"checkpoint-(\d+)")
EVERY = 30  # seconds between copies of the log and other files that change all the time
PATIENCE = float(os.environ.get("MINICLIP_SYNC_PATIENCE", 300))  # seconds without progress, at the end of a run
CLEAR = ".clear_store"  # a file in the folder: an earlier run on the store is still to be deleted
OLD_RUN = re.compile(rf"{CHECKPOINT.pattern}/|({MANIFEST}|model\.safetensors|trainer_state\.json|nonfinite-.*)$")


def say(line: str):
    with suppress(OSError):  # nobody reads it any more
        print(line, file=sys.stderr, flush=True)


class Copier:
    """Copies what is new in a folder to a store. `limit` is the run's --save_total_limit."""

    def __init__(self, folder: str | Path, url: str, limit: int | None = None):
        self.folder, self.url, self.limit = Path(folder), url, limit
        self.sent = {}  # relative name -> size and time of the file that was copied
        self.complete = {}  # checkpoint on the store -> its manifest
        self.moved_at, self.logged_at, self.tidied = time.monotonic(), -EVERY, None

    def moved(self):
        self.moved_at = time.monotonic()

    def checkpoints(self) -> list[Path]:
        """Returns the complete checkpoints of the folder, newest first."""
        found = (path.parent for path in self.folder.glob(f"checkpoint-*/{MANIFEST}"))
        return sorted(filter(is_checkpoint, found), key=step, reverse=True)

    def others(self) -> dict[str, Path]:
        """Returns all other files, by their names relative to the folder, without hidden ones."""
        files = (path for path in self.folder.rglob("*") if path.is_file())
        named = {path.relative_to(self.folder).as_posix(): path for path in files}
        return {name: path for name, path in named.items() if not re.match(rf"\.|{CHECKPOINT.pattern}/", name)}

    def copy_new(self, final: bool = False):
        """Copies what is not on the store yet: the newest checkpoint first. Raises StoreError and OSError."""
        for folder in self.checkpoints():
            self.copy_checkpoint(folder)
        if final or time.monotonic() - self.logged_at > EVERY:
            self.copy_others()
            self.logged_at = time.monotonic()
        self.tidy()

    def copy_checkpoint(self, folder: Path):
        """Copies a checkpoint, from links to its files: the run may delete it before slow copies are done."""
        held = scratch_path(self.folder / "sync")
        try:
            delete(held)
            if self.complete.get(folder.name) == (folder / MANIFEST).read_bytes():
                return
            try:
                shutil.copytree(folder, held, copy_function=os.link)
            except shutil.Error:  # a disk without links
                delete(held)
                held = folder
            manifest = (held / MANIFEST).read_bytes()
            files = {path.relative_to(held).as_posix(): path for path in held.rglob("*") if path.is_file()}
            self._copy_folder(folder.name, files, manifest)
            self.complete[folder.name] = manifest
        except FileNotFoundError:
            if folder.is_dir():
                raise
        finally:
            if held != folder:
                delete(held)

    def _copy_folder(self, name: str, files: dict[str, Path], manifest: bytes):
        url, sizes = join(self.url, name), {part: path.stat().st_size for part, path in files.items()}
        there = {part: about["size"] for part, about in list_files(url, ()).items()}
        if MANIFEST in there:
            if there == sizes and read_range(join(url, MANIFEST)) == manifest:
                return
            remove(join(url, MANIFEST), ())
        for part in there.keys() - sizes.keys():
            remove(join(url, part), ())
        for part in sorted(files.keys() - {MANIFEST}):
            self._copy(f"{name}/{part}", files[part], again=there.get(part) != sizes[part])
        there = {part: about["size"] for part, about in list_files(url, ()).items()} | {MANIFEST: sizes[MANIFEST]}
        if there != sizes:
            raise StoreError(f"{url}: the sizes of its files are not those that were copied")
        self._copy(f"{name}/{MANIFEST}", files[MANIFEST], again=True)

    def _copy(self, name: str, path: Path, again: bool = False):
        about = path.stat()
        state = about.st_size, about.st_mtime_ns
        if again or self.sent.get(name) != state:
            upload(path, join(self.url, name), self.moved, ())
            self.sent[name] = state
            self.moved()

    def changed(self) -> list[str]:
        """Returns the names of the other files that are not on the store as they are now."""
        found = []
        for name, path in self.others().items():
            with suppress(FileNotFoundError):
                about = path.stat()
                if self.sent.get(name) != (about.st_size, about.st_mtime_ns):
                    found.append(name)
        return sorted(found, key=lambda name: name == MANIFEST)

    def copy_others(self):
        """Copies the log, the metadata and the model at the end of the run, whose manifest comes last too."""
        changed = self.changed()
        if MANIFEST in changed:
            remove(join(self.url, MANIFEST), ())
        for name in changed:
            with suppress(FileNotFoundError):
                self._copy(name, self.folder / name)

    def tidy(self):
        """Deletes checkpoints on the store that the run has deleted, once its newest one is complete there, and parts
        of others. Those that the folder never had are kept up to the limit."""
        local = [folder.name for folder in self.checkpoints()]
        if not local or local[0] not in self.complete or self.tidied == (local, sorted(self.complete)):
            return
        files = [name for name in list_files(self.url, ()) if CHECKPOINT.match(name) and "/" in name]
        there = {name.split("/")[0] for name in files}
        whole = {name for name in there if f"{name}/{MANIFEST}" in files}
        surplus = sorted(whole - set(local), key=lambda name: (step(name) < step(local[0]), step(name)))
        surplus = surplus[: max(0, len(whole) - self.limit)] if self.limit else []
        for name in [*(there - whole - set(local)), *surplus]:
            self._remove([part for part in files if part.startswith(f"{name}/")])
            self.complete.pop(name, None)
        self.tidied = local, sorted(self.complete)

    def clear(self):
        """Deletes an earlier run on the store, as --overwrite_output_dir does in the folder: manifests first."""
        self._remove([name for name in list_files(self.url, ()) if OLD_RUN.match(name)])

    def _remove(self, names: list[str]):
        for name in sorted(names, key=lambda name: not name.endswith(MANIFEST)):
            remove(join(self.url, name), ())
        if self.url.startswith("file:"):  # elsewhere a folder is gone with its last file
            for name in sorted({posixpath.dirname(name) for name in names} - {""}, key=len, reverse=True):
                retrying(join(self.url, name), lambda fs, path: fs.rmdir(path), ())

    def left(self) -> list[str]:
        """Returns what is not on the store."""
        missing = [path.name for path in self.checkpoints() if path.name not in self.complete]
        return [*reversed(missing), *self.changed()]


def step(checkpoint: str | Path) -> int:
    return int(CHECKPOINT.fullmatch(Path(checkpoint).name)[1])


def is_checkpoint(path: Path) -> bool:
    return CHECKPOINT.fullmatch(path.name) is not None


def follow(copier: Copier, ended: Callable[[], bool]):
    """Copies what is new until the run has `ended`, and then the rest. Errors are reported once, and tried again. Ends
    this process with status 1 if after the end nothing could be copied for PATIENCE seconds."""
    mark, finished, wait, broken = copier.folder / CLEAR, threading.Event(), 1.0, False

    def give_up():  # a thread, because a request to a store may hang
        begin = None
        while not finished.wait(0.2):
            begin = (begin or time.monotonic()) if ended() else None
            if begin and time.monotonic() - max(begin, copier.moved_at) > PATIENCE:
                what = ", ".join(copier.left()[:10]) or "some files"
                say(
                    f"not copied to {copier.url}: {what}. All of the run is in {copier.folder}; to copy it:\n"
                    f"  {Path(sys.executable).name} -m miniclip sync {copier.folder} {copier.url}"
                )
                os._exit(1)

    threading.Thread(target=give_up, daemon=True).start()
    while True:
        final = ended()
        try:
            if mark.exists():
                copier.clear()
                mark.unlink()
            copier.copy_new(final)
            if broken:
                say(f"copying to {copier.url} works again")
            wait, broken = 1.0, False
            if final:
                finished.set()
                return
        except (StoreError, OSError) as error:
            if not broken:
                say(f"copying does not work, the run goes on and it is tried again: {error}")
            wait, broken = min(60.0, 2 * wait), True
        until = time.monotonic() + (min(wait, 2.0) if final else wait)
        while time.monotonic() < until and (final or not ended()):
            time.sleep(0.1)


def hold(folder: Path):
    """Waits for an earlier process that copies this folder, and locks it against others."""
    while True:
        try:
            return lock(folder / ".sync")
        except ValueError:
            time.sleep(0.5)
