"""TODO docstring."""

import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path

from miniclip.utils.errors import InputError
from miniclip.utils.files import sha256


def fingerprint(spec: str, records: Sequence[dict] | None = None) -> dict:
    """A data set: the sha256 of its files, and how many records and captions were taken from it. Of a folder and of
    shards it is that of the files' names and sizes; of a data set on the hub there is none."""
    from miniclip.datasets.read import split

    found = {"files": [_digest(part) for part in split(spec)]}  # wherever they lie
    if isinstance(records, list):
        found["records"], found["captions"] = len(records), sum(len(record["caption"]) for record in records)
        paths = [record["image"] for record in records if isinstance(record["image"], (str, Path))]
        found["image_bytes"] = sum(os.path.getsize(path) for path in paths)
    elif records is not None:
        found["records"] = len(records)
    return found


def _digest(part: str) -> str | None:
    from miniclip.datasets.shards import expand

    part = re.sub(r"\[:\d+\]$", "", part)  # of a part, the sha256 of the whole and the number of records tell
    path = Path(part)
    if path.is_file():
        return sha256(path) if path.stat().st_size <= MOST else f"{path.stat().st_size} bytes"
    if path.is_dir():
        files = [Path(folder) / name for folder, _, names in os.walk(path) for name in names]
    else:
        try:
            files = [Path(name) for name in expand(part)]
        except InputError:
            return None
    files = sorted(file for file in files if file.is_file())
    if not files:
        return None
    listing = "\n".join(f"{os.path.relpath(file, path.parent)} {file.stat().st_size}" for file in files)
    return f"names and sizes {hashlib.sha256(listing.encode('utf-8', 'surrogateescape')).hexdigest()}"


MOST = 1 << 30  # bytes of a file that are read for its sha256; of a larger one the size has to tell
