"""Checks the gradients of a training run, before it starts, against one big fp32 batch."""

import re
import runpy
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

from miniclip.utils.command_line import Parser, print_json
from miniclip.utils.errors import InputError


def main(argv: list[str]):
    parser = Parser.command("check", DESCRIPTION, "recipes/demo.json --bf16 true")
    parser.usage = "miniclip check [recipe.json] [--option value ...]"
    if not argv or {"-h", "--help"} & set(argv):
        parser.print_help()
        return
    folder = Path(__file__).resolve().parent
    beside = (folder / "train.py", folder.parents[1] / "train.py")  # beside the package until it is installed
    script = next(path for path in beside if path.exists())
    check = runpy.run_path(str(script))["main"]
    if "--json" not in argv:
        return check([*argv, "--check_gradients"])
    flag, said, error = Parser(), StringIO(), None
    flag.share("json")
    options = flag.parse_args(["--json"])
    try:
        with redirect_stdout(said):
            check([*(word for word in argv if word != "--json"), "--check_gradients"])
    except InputError as wrong:
        error = str(wrong)
    print(said.getvalue(), end="", file=sys.stderr)
    print_json(options, {"right": error is None, "error": error, "parts": read_table(said.getvalue())})
    if error:
        raise InputError(error)


def read_table(text: str) -> dict[str, dict[str, float]]:
    """The figures of the table that the check printed: {part: {column: number}}."""
    rows = [re.split(r"\s{2,}", line.strip()) for line in text.splitlines()]
    start = next((i for i, row in enumerate(rows) if row[:2] == ["cosine", "error"]), len(rows))
    names = rows[start] if start < len(rows) else []
    return {
        row[0]: dict(zip(names, map(float, row[1:]))) for row in rows[start + 1 : start + 5] if len(row) > len(names)
    }


DESCRIPTION = """\
Takes a run's first step as train.py would, with the same options: data, model, loss, processes (torchrun -m miniclip
check ...), GradCache, accumulation, precision, freezing. Compares its gradient with that of one big fp32 batch of the
plain model on one process, prints a table by tower, and names the causes of what differs. Nothing is trained or
written. With --json stdout gets the table as JSON. Ends with exit status 1 if something differs for another reason than
accumulation, rounding or dropout.
"""
