"""How does a file come to be there whole or not at all, and how is it known later that nothing in it has changed?

What is written goes to another name first and gets its own when all of it is on the disk: a process that is killed, a
disk that is full leave the old file, or none. Beside weights lies `manifest.json`, with the sha256 of each file:

    {"sha256": {"config.json": "9f86d0...", "model.safetensors": "60303a..."}}

It finds a bit that has changed. It is no signature: who can change a file can change the manifest too.
"""

import errno
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from miniclip.utils.errors import InputError

MANIFEST, LOCK = "manifest.json", ".lock"
logger = logging.getLogger(__name__)


class DamagedFile(InputError):
    """A file that is not what was saved."""


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A path to write to, in the same folder and with the same ending. At the end of the `with` block the file takes
    the place of `path`, in one step; after an exception it is gone, and `path` is as it was."""
    path = Path(path)
    scratch = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        yield scratch
        sync(scratch)
        os.replace(scratch, path)
    except BaseException as error:
        scratch.unlink(missing_ok=True)
        if "os error 28" in str(error):  # safetensors' words
            raise OSError(errno.ENOSPC, "No space left on device", str(path)) from error
        raise
    sync(path.parent)


def write_text(path: str | Path, text: str):
    """`Path.write_text` in UTF-8, all or nothing."""
    with replacing(path) as scratch, open(scratch, "w", encoding="utf-8", newline="") as file:
        file.write(text)


def write_json(path: str | Path, value):
    """A JSON file, all or nothing."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def remove_scratch(folder: str | Path):
    """Deletes what killed processes left half written in a folder. Nobody else may be writing there."""
    for file in Path(folder).glob(".*.*"):
        if file.name.split(".")[1].isdecimal():
            file.unlink()


def lock(output_dir: str | Path, option: str = "--output_dir"):
    """Takes an output folder, which `option` names, for this process, until it ends, however that comes. Gives what has
    to be kept until then. Raises InputError where another process has it."""
    path = Path(output_dir) / LOCK
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+", encoding="utf-8")
    except OSError as error:
        raise InputError(f"{output_dir} cannot be written to: {error}") from None
    try:
        try:
            import fcntl

            # Of this kind, which workers that are forked do not inherit: they may live on for a while.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:  # Windows
            import msvcrt

            file.seek(1 << 30)  # the byte that is locked is not one of those that say who has it
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):  # some network disks know no locks
            logger.warning("%s cannot be locked (%s): see to it that no other run writes there", output_dir, error)
            return file
        file.seek(0)
        process = file.read().strip() or "another"
        file.close()
        raise InputError(
            f"process {process} is writing to {output_dir}: wait for its end, or name another {option}"
        ) from None
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file


def user_cache() -> Path:
    """The folder for what can be made again."""
    home = os.path.expanduser("~")  # stays as it is for a user whom nobody knows, as in some containers
    cache = os.environ.get("XDG_CACHE_HOME") or (tempfile.gettempdir() if home == "~" else os.path.join(home, ".cache"))
    return Path(cache) / "miniclip"


def sync(path: str | Path):
    """Returns when a file, or which names a folder has, is on the disk, as far as the system can tell."""
    if os.name == "nt" and os.path.isdir(path):  # there folders cannot be opened
        return
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)  # there only what may be written is synced
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(path: str | Path) -> str:
    """Of all that is in a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def files_in(folder: str | Path) -> list[str]:
    """The files in a folder and those below it, `/` between the names, but for the manifest."""
    files = (path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.is_file())
    return sorted(name for name in files if name != MANIFEST)


def write_manifest(folder: str | Path, names: Iterable[str] | None = None):
    """Writes the manifest of a folder: of the files named, or of all."""
    names = files_in(folder) if names is None else sorted(names)
    write_json(Path(folder) / MANIFEST, {"sha256": {name: sha256(Path(folder) / name) for name in names}})


def check_manifest(folder: str | Path, names: Iterable[str] | None = None):
    """Compares files (those named, or all that the manifest has) with the manifest of their folder; a folder's name
    stands for all that is in it. A folder without a manifest passes, and so does a file that it does not have. Raises
    DamagedFile, which names the first file that differs or is missing."""
    manifest, names = Path(folder) / MANIFEST, None if names is None else set(names)
    if not manifest.is_file():
        return
    try:
        expected = json.loads(manifest.read_text(encoding="utf-8"))["sha256"]
        expected = {str(name): str(digest) for name, digest in expected.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedFile(f"{manifest} is no manifest ({error}): copy the folder again") from None
    for name, digest in expected.items():
        if names is not None and names.isdisjoint((name, name.partition("/")[0])):
            continue
        if not (Path(folder) / name).is_file():
            raise DamagedFile(f"{Path(folder) / name} is missing, and {MANIFEST} beside it has it: copy it again")
        if sha256(Path(folder) / name) != digest:
            raise DamagedFile(
                f"{Path(folder) / name} is not what was saved (its sha256 is not that in {MANIFEST}): copy it again; if"
                f" you changed it yourself, delete {MANIFEST}"
            )


def write_npy(path: str | Path, dtype, shape: tuple, parts: Iterable[np.ndarray]):
    """Writes a .npy file, of arrays one after the other. `np.save` does not notice it if the disk is full when its last
    kilobytes are written."""
    dtype = np.dtype(dtype)
    with open(path, "wb") as file:
        head = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, head)
        for part in parts:
            file.write(part.astype(dtype, copy=False).tobytes())
