"""The list of bad samples: each one that cannot be used becomes a line of `bad_samples.jsonl`.

{"sample": "captions.json: record 3", "reason": "rex.jpg: damaged (...)", "when": "before the start"}
"""

import json
import os
import reprlib
import warnings
from pathlib import Path

from miniclip.utils.errors import InputError
from miniclip.utils.files import write_text

NAME = "bad_samples.jsonl"
START = "before the start"


class BadSamples:
    """A list of bad samples, kept in memory until `open` names its file. From then on each sample is appended by one
    write to a file opened for appending, so that lines of several processes do not mix."""

    def __init__(self):
        self.waiting, self.path = [], None

    def __len__(self) -> int:
        """Returns the number of lines, of all processes."""
        return len(_lines(self.path)) if self.path else len(self.waiting)

    def add(self, sample: str, reason: str, when: str = START):
        """Adds a sample: its name, what is wrong with it, and when that was found."""
        line = json.dumps({"sample": str(sample), "reason": str(reason), "when": when})
        if self.path is None:
            self.waiting.append(line)
            return
        handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            os.write(handle, f"{line}\n".encode())
        finally:
            os.close(handle)

    def open(self, path: str | Path, write: bool = True, go_on: bool = False):
        """Names the file. With `write`, which one process passes, the samples listed so far go into it; lines of an
        earlier run are dropped, or kept with `go_on`. There is no file as long as there is nothing to list."""
        self.path, waiting, self.waiting = Path(path), self.waiting, []
        if write:
            lines = dict.fromkeys([*(_lines(self.path) if go_on else ()), *waiting])
            self.path.unlink(missing_ok=True)
            if lines:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                write_text(self.path, "\n".join(lines) + "\n")


def _lines(path: Path) -> list[str]:
    """Returns the lines of a list, without one that a full disk cut off."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    return [line for line in text.split("\n") if line.endswith("}")]


def raise_or_skip(
    source, what: str, problems: list[tuple[str, str]], left: int, prefix: str, on_bad: str,
    bad_samples: BadSamples | None = None, none_left: str = "no records",
):  # fmt: skip
    """Reports the bad samples of a source, (name, reason) each, where `left` others are good: raises a CaptionFileError
    that names them all, or with on_bad="skip" warns of them and adds them to `bad_samples`, `prefix` before each name.
    """
    if not problems:
        return
    report = "\n".join([f"{source}: {what}:", *(f"  {name}: {reason}" for name, reason in problems)])
    if on_bad != "skip" or not left:
        way_out = ", or skip them with --on_bad_sample skip" if left else f"; skipping them would leave {none_left}"
        raise CaptionFileError(f"{report}\nFix or remove them{way_out}.")
    warnings.warn(f"{report}\nThe other {left} are used.", stacklevel=4)
    for name, reason in problems if bad_samples is not None else ():
        bad_samples.add(f"{prefix}{name}", reason)


_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = 60


def short(value) -> str:
    """Returns the beginning of a value, for messages: `str` of a deep or long one would fail or take gigabytes."""
    return _repr.repr(value)[:60]


class CaptionFileError(InputError):
    """A caption file that cannot be used as it is. Lists its bad records."""
