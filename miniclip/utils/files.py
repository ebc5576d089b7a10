"""Atomic writes, folder locks, checksums and manifests.

A file or folder is written under a scratch name beside its own, `.<process id>.<name>`, and renamed when all of it is
on the disk: after a kill or on a full disk the old one is there, or none. Beside weights lies `manifest.json`, which
detects any changed bit. It is not a signature: whoever can change a file can change the manifest too.

    {"sha256": {"config.json": "9f86d0...", "model.safetensors": "60303a..."}}"""

import errno
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from miniclip.utils.errors import InputError

MANIFEST = "manifest.json"
logger = logging.getLogger(__name__)


class DamagedFile(InputError):
    """A file that differs from what was saved."""


def scratch_path(path: str | Path, shared: bool = False) -> Path:
    """Returns the name under which this process writes `path`, or with `shared` all processes of a run together."""
    path = Path(path)
    return path.with_name(f".{0 if shared else os.getpid()}.{path.name}")


@contextmanager
def replacing(path: str | Path, first_wins: bool = False, shared: bool = False) -> Iterator[Path]:
    """Writes a file or folder atomically: yields a scratch path to create it at, which becomes `path` at the end of the
    `with` block. After an exception it is deleted, and `path` is as it was. A folder's files join those of an existing
    one, each in one step, the manifest last. With `first_wins` what another process put there meanwhile stays."""
    path, scratch = Path(path), scratch_path(path, shared)
    if path.exists() and not path.is_file() and not path.is_dir():  # a device or a pipe, such as /dev/null, stays one
        yield path
        return
    delete(scratch)  # left by a killed process with the same id
    try:
        yield scratch
        for part in [*scratch.rglob("*"), scratch]:
            sync(part)
        if first_wins:
            try:
                os.rename(scratch, path) if scratch.is_dir() else os.link(scratch, path)
            except OSError:
                if not path.exists():
                    raise
        elif path.is_dir() and scratch.is_dir():
            (path / MANIFEST).unlink(missing_ok=True)  # untrue until the new one is there
            join(scratch, path)
        else:
            os.replace(scratch, path)
    except BaseException as error:
        if "os error 28" in str(error):  # safetensors' words
            raise OSError(errno.ENOSPC, "No space left on device", str(path)) from error
        raise
    finally:
        delete(scratch)
    sync(path.parent)


def join(source: Path, target: Path):
    """Moves what is in a folder into another, file by file, the manifest last."""
    for part in sorted(source.iterdir(), key=lambda part: part.name == MANIFEST):
        there = target / part.name
        join(part, there) if part.is_dir() and there.is_dir() else os.replace(part, there)


def delete(path: Path):
    """Deletes a file or folder, if it exists; whatever in a folder cannot be deleted stays."""
    shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def remove_folder(folder: Path):
    """Deletes a folder such that a killed process leaves no half of it under its name."""
    if folder.is_dir():
        delete(scratch_path(folder))
        os.rename(folder, scratch_path(folder))
        delete(scratch_path(folder))


def remove_scratch(folder: str | Path):
    """Deletes the scratch files and folders of killed processes. No other process may be writing to the folder."""
    for path in Path(folder).glob(".*.*"):
        if path.name.split(".")[1].isdecimal():
            delete(path)


def write_text(path: str | Path, text: str):
    """Writes a text file atomically, in UTF-8."""
    with replacing(path) as scratch:
        scratch.write_text(text, encoding="utf-8", newline="")


def write_json(path: str | Path, value):
    """Writes a JSON file atomically."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def make_folder(folder: str | Path):
    """Makes the folder of an output before the work, so that what cannot be written fails now. Raises InputError."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    if not os.access(Path(folder), os.W_OK):
        raise InputError(f"{folder} cannot be written to: choose another folder")


def lock(output_dir: str | Path, option: str = "--output_dir", wait: bool = False):
    """Locks an output folder, which an option names, for this process, until the object returned is closed or the
    process ends. Raises InputError if another process holds the lock, unless it is to `wait` for that."""
    try:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        file = open(Path(output_dir) / ".lock", "a+", encoding="utf-8")
    except OSError as error:
        raise InputError(f"{output_dir} cannot be written to: {error}") from None
    try:
        try:
            import fcntl

            # POSIX locks are not inherited by forked workers, which may outlive the run for a while.
            fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except ImportError:  # Windows
            import msvcrt

            file.seek(1 << 30)  # beyond the process id, so that others can read it
            msvcrt.locking(file.fileno(), msvcrt.LK_LOCK if wait else msvcrt.LK_NBLCK, 1)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):  # some network disks have no locks
            logger.warning("%s cannot be locked (%s): make sure that no other run writes to it", output_dir, error)
            return file
        with file:
            file.seek(0)
            who = f"process {file.read().strip() or 'another'}"
        raise InputError(f"{who} is writing to {output_dir}: wait until it ends, or choose another {option}") from None
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file


def user_cache() -> Path:
    """Returns the folder for files that can be made again."""
    home = os.path.expanduser("~")  # unchanged for a user without an entry in passwd, as in some containers
    cache = os.environ.get("XDG_CACHE_HOME") or (tempfile.gettempdir() if home == "~" else os.path.join(home, ".cache"))
    return Path(cache) / "miniclip"


def sync(path: str | Path):
    """Flushes a file, or the names in a folder, to the disk."""
    if os.name == "nt" and os.path.isdir(path):  # folders cannot be opened there
        return
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)  # Windows flushes only what is writable
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(path: str | Path) -> str:
    """Returns the sha256 of a file's content in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def write_manifest(folder: Path, patterns: Iterable[str] = ("**/*",)):
    """Writes the manifest of a folder, for the files that match one of the patterns (default: all, at any depth)."""
    paths = (path for pattern in patterns for path in folder.glob(pattern) if path.is_file())
    names = sorted({path.relative_to(folder).as_posix() for path in paths} - {MANIFEST})
    write_json(folder / MANIFEST, {"sha256": {name: sha256(folder / name) for name in names}})


def check_manifest(folder: str | Path, names: Iterable[str] | None = None):
    """Checks files against the manifest of their folder, if there is one: all in it, or those named, where a folder
    stands for everything in it. Raises DamagedFile for the first file that differs or is missing."""
    manifest, names = Path(folder) / MANIFEST, None if names is None else set(names)
    if not manifest.is_file():
        return
    try:
        expected = json.loads(manifest.read_text(encoding="utf-8"))["sha256"].items()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedFile(f"{manifest} is not a valid manifest ({error}): copy the folder again") from None
    for name, digest in expected:
        path = Path(folder) / name
        if names is not None and names.isdisjoint((name, name.partition("/")[0])):
            continue
        if not path.is_file():
            raise DamagedFile(f"{path} is missing, but listed in {MANIFEST} beside it: copy it again")
        if sha256(path) != digest:
            advice = f"copy it again, or delete {MANIFEST} if you changed the file yourself"
            raise DamagedFile(f"{path} is not what was saved (its sha256 differs from that in {MANIFEST}): {advice}")


def write_npy(path: str | Path, dtype, shape: tuple, parts: Iterable[np.ndarray]):
    """Writes arrays one after another into one .npy file. `np.save` would not notice a disk that is full at the end."""
    descr = np.lib.format.dtype_to_descr(np.dtype(dtype))
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})
        file.writelines(part.astype(dtype, copy=False).tobytes() for part in parts)
