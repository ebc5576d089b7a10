"""Checks the gradients of a training run, before it starts, against one big fp32 batch.

Takes a run's first step as train.py would, with the same options: data, model, loss, processes (torchrun -m miniclip
check ...), GradCache, accumulation, precision, freezing. Compares its gradient with that of one big fp32 batch of the
plain model on one process, prints a table by tower, and names the causes of what differs. Nothing is trained or
written. With --json stdout gets the table as JSON. Ends with exit status 1 if something differs for another reason than
accumulation, rounding or dropout."""

import os
import runpy
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

from miniclip.utils.command_line import Parser, print_json, starting
from miniclip.utils.errors import InputError


def main(argv: list[str]):
    parser = Parser.command("check", __doc__.partition("\n\n")[2], "recipes/demo.json --bf16 true")
    parser.usage = "miniclip check [recipe.json] [--option value ...]"
    if not argv or {"-h", "--help"} & set(argv):
        parser.print_help()
        return
    folder = Path(__file__).resolve().parent
    beside = (folder / "train.py", folder.parents[1] / "train.py")  # beside the package until it is installed
    check = runpy.run_path(str(next(path for path in beside if path.exists())))["main"]
    if "--json" not in argv:
        return check([*argv, "--check_gradients"])
    with starting():
        from miniclip.training.check_gradients import WrongGradients

    parser.share("json")
    options, said, error = parser.parse_args(["--json"]), StringIO(), None
    try:
        with redirect_stdout(said):
            figures = check([*(word for word in argv if word != "--json"), "--check_gradients"])
    except InputError as wrong:
        error, figures = wrong, wrong.figures if isinstance(wrong, WrongGradients) else {}
    print(said.getvalue(), end="", file=sys.stderr)
    if int(os.environ.get("RANK", 0)) == 0:  # the others of torchrun compute no figures
        print_json(options, {"right": error is None, "error": error and str(error), "parts": figures})
    if error:
        raise error
