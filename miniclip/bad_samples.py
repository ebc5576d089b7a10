"""What was left out, and why? Each sample that could not be used becomes a line of a file, `bad_samples.jsonl`:

    {"sample": "captions.json: record 3", "reason": "rex.jpg: damaged (...)", "when": "before the start"}
"""

import json
import os
from pathlib import Path

from miniclip.files import write_text

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
