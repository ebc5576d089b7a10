"""Splits: SOURCE:SPLIT, and the column `split` of a table that has train, val and test in one file."""

import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence

from miniclip.utils.errors import InputError
from miniclip.utils.remote import is_remote

logger = logging.getLogger(__name__)


def is_hub(source: str) -> bool:
    """Returns whether a source is hf:NAME, a data set that its library loads: hf://PATH is a file."""
    return source.startswith("hf:") and not is_remote(source)


def at_split(source: str) -> tuple[str, str | None]:
    """Returns the parts of SOURCE:SPLIT. `hf:NAME:SPLIT` is left to the library, a Windows drive is no source."""
    path, _, name = source.rpartition(":")
    if is_hub(source) or len(path) < 2 or not re.fullmatch(r"\w[\w.+-]*", name) or os.path.exists(source):
        return source, None
    return path, name


def split_column(columns: Iterable) -> str | None:
    """Returns the column `split`, in any letter case, if it is among the columns."""
    return next((column for column in columns if str(column).strip().lower() == "split"), None)


def split_of(row: dict) -> str:
    """Returns the split that a row names, or nothing."""
    value = row.get(split_column(row))
    return "" if value is None else str(value).strip()


def choose_split(values: Sequence[str | None], split: str | None, where, strict: bool = True) -> list[bool]:
    """Returns which rows to read, by the split that each belongs to: "" if none is given, None if the row is damaged,
    which is always read, to be reported. With several splits and none chosen all are read, and a warning says so.
    Raises InputError for a split that is not there; without `strict` it was found elsewhere and is passed over."""
    counts = Counter(value for value in values if value)
    listed = ", ".join(f"{name} ({count})" for name, count in counts.most_common(10))
    names = split.split("+") if split else []
    if missing := [name for name in names if name not in counts]:
        if strict:
            known = f"its column 'split' has {listed}" if counts else "it has no column 'split'"
            raise InputError(f"{where}: there is no split {missing[0]!r} in it: {known}")
        names = []
    if len(counts) > 1 and not names:
        example = f"{where}:{counts.most_common(1)[0][0]}"
        logger.warning("%s: all its splits are used together: %s. To read one: %s", where, listed, example)
    chosen = [not names or value is None or value in names for value in values]
    if not strict and not all(chosen):
        what = "%s: %d of %d rows are read, those with %s in their column 'split'"
        logger.warning(what, where, sum(chosen), len(chosen), split)
    return chosen
