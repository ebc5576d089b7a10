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


def fingerprint(source: str, records: Sequence[dict] | None = None) -> dict:
    """Returns the sha256 of a data set's files, and how many records and captions were taken from it. A folder and
    shards have one of the files' names and sizes; a data set of the hub has none."""
    found = {"files": [_digest(part) for part in split(source)]}  # wherever they lie
    if records is not None:
        found["records"] = len(records)
    if isinstance(records, list):
        found["captions"] = sum(len(record["caption"]) for record in records)
        paths = [record["image"] for record in records if isinstance(record["image"], (str, Path))]
        found["image_bytes"] = sum(map(os.path.getsize, paths))
    return found


def _digest(source: str) -> str | None:
    source = re.sub(r"\[:\d+\]$", "", source)  # for a part: the sha256 of the whole, and the number of records
    path = Path(source)
    if path.is_file():
        size = path.stat().st_size
        return sha256(path) if size <= 1 << 30 else f"{size} bytes"  # to read more would take too long
    try:
        files = path.rglob("*") if path.is_dir() else map(Path, expand(source))
    except InputError:
        return None
    files = sorted(file for file in files if file.is_file())
    listing = "\n".join(f"{os.path.relpath(file, path.parent)} {file.stat().st_size}" for file in files)
    digest = hashlib.sha256(listing.encode("utf-8", "surrogateescape")).hexdigest()
    return f"names and sizes {digest}" if files else None
