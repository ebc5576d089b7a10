"""The list of bad samples: each one that cannot be used becomes a line of `bad_samples.jsonl`.

{"sample": "captions.json: record 3", "reason": "rex.jpg: damaged (...)", "when": "before the start"}"""

import json
import reprlib
import warnings
from pathlib import Path

from miniclip.utils.errors import InputError
from miniclip.utils.files import write_text

NAME = "bad_samples.jsonl"


class CaptionFileError(InputError):
    """A caption file that cannot be used as it is. Lists its bad records."""


class BadSamples:
    """Bad samples, in memory until `open` names a file. Then one write appends each: lines of processes do not mix."""

    def __init__(self):
        self.waiting, self.path = [], None

    def __len__(self) -> int:
        return len(self.lines())

    def lines(self) -> list[str]:
        """Returns the lines, of all processes, without one that a full disk cut off."""
        if self.path is None:
            return self.waiting
        text = self.path.read_text(encoding="utf-8") if self.path.is_file() else ""
        return [line for line in text.split("\n") if line.endswith("}")]

    def add(self, sample: str, reason: str, when: str = "before the start"):
        """Adds a sample: its name, what is wrong with it, and when that was found."""
        line = json.dumps({"sample": str(sample), "reason": str(reason), "when": when})
        if self.path is None:
            self.waiting.append(line)
        else:
            with open(self.path, "ab", buffering=0) as file:
                file.write(f"{line}\n".encode())

    def open(self, path: str | Path, write: bool = True, go_on: bool = False):
        """Names the file. One process passes `write`, which stores the samples listed so far. Lines of an earlier run
        are dropped unless `go_on`. Without any lines there is no file."""
        self.path, waiting, self.waiting = Path(path), self.waiting, []
        if write:
            lines = dict.fromkeys([*(self.lines() if go_on else ()), *waiting])
            self.path.unlink(missing_ok=True)
            if lines:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                write_text(self.path, "\n".join(lines) + "\n")

    def report(self, path: str | Path) -> list[str]:
        """Names the file and prints how many samples were skipped. Returns that as a note, or nothing."""
        self.open(path)
        if not len(self):
            return []
        print(f"{len(self)} bad samples were skipped: {self.path}")
        return [f"{len(self)} bad samples were skipped"]


def raise_or_skip(
    source, what: str, problems: list[tuple[str, str]], left: int, prefix: str, on_bad: str,
    bad_samples: BadSamples | None = None, none_left: str = "no records",
):  # fmt: skip
    """Raises a CaptionFileError that names the bad samples of a source, (name, reason) each. With on_bad="skip", and if
    some (`left`) are good, warns instead, and adds them to `bad_samples` with `prefix` before each name."""
    if not problems:
        return
    report = "\n".join([f"{source}: {what}:", *(f"  {name}: {reason}" for name, reason in problems)])
    if on_bad != "skip" or not left:
        way_out = ", or skip them with --on_bad_sample skip" if left else f"; skipping them would leave {none_left}"
        raise CaptionFileError(f"{report}\nFix or remove them{way_out}.")
    warnings.warn(f"{report}\nThe other {left} are used.", stacklevel=4)
    for name, reason in problems if bad_samples is not None else ():
        bad_samples.add(f"{prefix}{name}", reason)


def short(value) -> str:
    """Returns the beginning of a value, for messages: `str` of a deep or long one would fail or take gigabytes."""
    shortener = reprlib.Repr()
    shortener.maxstring = shortener.maxother = 60
    return shortener.repr(value)[:60]
