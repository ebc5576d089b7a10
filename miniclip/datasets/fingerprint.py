"""Fingerprints of data sets, for the metadata of a run."""

import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path

from miniclip.datasets.read import split
from miniclip.datasets.shards import expand
from miniclip.utils.errors import InputError
from miniclip.utils.files import sha256

MOST = 1 << 30  # larger files are known by their size, not by their sha256


def fingerprint(source: str, records: Sequence[dict] | None = None) -> dict:
    """Returns the sha256 of a data set's files, and how many records and captions were taken from it. A folder and
    shards have one of the files' names and sizes; a data set of the hub has none."""
    found = {"files": [_digest(part) for part in split(source)]}  # wherever they lie
    if isinstance(records, list):
        found["records"], found["captions"] = len(records), sum(len(record["caption"]) for record in records)
        paths = [record["image"] for record in records if isinstance(record["image"], (str, Path))]
        found["image_bytes"] = sum(os.path.getsize(path) for path in paths)
    elif records is not None:
        found["records"] = len(records)
    return found


def _digest(source: str) -> str | None:
    source = re.sub(r"\[:\d+\]$", "", source)  # for a part: the sha256 of the whole, and the number of records
    path = Path(source)
    if path.is_file():
        return sha256(path) if path.stat().st_size <= MOST else f"{path.stat().st_size} bytes"
    if path.is_dir():
        files = [Path(folder) / name for folder, _, names in os.walk(path) for name in names]
    else:
        try:
            files = [Path(name) for name in expand(source)]
        except InputError:
            return None
    files = sorted(file for file in files if file.is_file())
    if not files:
        return None
    listing = "\n".join(f"{os.path.relpath(file, path.parent)} {file.stat().st_size}" for file in files)
    return f"names and sizes {hashlib.sha256(listing.encode('utf-8', 'surrogateescape')).hexdigest()}"
