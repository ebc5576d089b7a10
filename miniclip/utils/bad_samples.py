"""What was left out, and why? Each sample that could not be used becomes a line of a file, `bad_samples.jsonl`:

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
    """The list of what was left out. Kept in memory until `open` says where it goes; from then on each sample is
    appended by one write to a file opened for appending, so that lines of several processes do not mix."""

    def __init__(self):
        self.waiting, self.path = [], None

    def __len__(self) -> int:
        """How many lines there are, of all processes."""
        return len(_lines(self.path)) if self.path else len(self.waiting)

    def add(self, sample: str, reason: str, when: str = START):
        """Lists a sample by its name, what is wrong with it, and when it was met."""
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
        """Names the file. With `write`, which one process says, it gets what waits, and what an earlier run left in it
        is dropped; with `go_on`, kept. Without anything to list there is no file."""
        self.path, waiting, self.waiting = Path(path), self.waiting, []
        if write:
            lines = dict.fromkeys([*(_lines(self.path) if go_on else ()), *waiting])
            self.path.unlink(missing_ok=True)
            if lines:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                write_text(self.path, "\n".join(lines) + "\n")


def _lines(path: Path) -> list[str]:
    """The lines of a list; one that a full disk cut off is none."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    return [line for line in text.split("\n") if line.endswith("}")]


def leave_out(
    source, what: str, problems: list[tuple[str, str]], left: int, prefix: str, on_bad: str,
    bad_samples: BadSamples | None = None, none_left: str = "no record would be left",
):  # fmt: skip
    """What is done about the bad samples of a source, (name, reason) each, where `left` others are sound: all are named
    in a CaptionFileError, or with on_bad="skip" in a warning, and listed with `prefix` before their names."""
    if not problems:
        return
    report = "\n".join([f"{source}: {what}:", *(f"  {name}: {reason}" for name, reason in problems)])
    if on_bad != "skip" or not left:
        way_out = ", or go on without them by --on_bad_sample skip" if left else f"; {none_left}"
        raise CaptionFileError(f"{report}\nMend or remove them{way_out}.")
    warnings.warn(f"{report}\nThe other {left} are used.", stacklevel=4)
    for name, reason in problems if bad_samples is not None else ():
        bad_samples.add(f"{prefix}{name}", reason)


_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = 60


def short(value) -> str:
    """The beginning of a value, for messages. Of one that is deep or long, `str` would fail or take gigabytes."""
    return _repr.repr(value)[:60]


class CaptionFileError(InputError):
    """A caption file that cannot be used as it is; lists its bad records."""
