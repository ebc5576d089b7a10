"""Checks the gradients of a training run, before it starts, against one big fp32 batch."""

import runpy
from pathlib import Path

from miniclip.utils.command_line import Parser


def main(argv: list[str]):
    parser = Parser.command("check", DESCRIPTION, "recipes/demo.json --bf16 true")
    parser.usage = "miniclip check [recipe.json] [--option value ...]"
    if not argv or {"-h", "--help"} & set(argv):
        parser.print_help()
        return
    folder = Path(__file__).resolve().parent
    beside = (folder / "train.py", folder.parents[1] / "train.py")  # beside the package until it is installed
    script = next(path for path in beside if path.exists())
    runpy.run_path(str(script))["main"]([*argv, "--check_gradients"])


DESCRIPTION = """\
Takes a run's first step as train.py would, with the same options: data, model, loss, processes (torchrun -m miniclip
check ...), GradCache, accumulation, precision, freezing. Compares its gradient with that of one big fp32 batch of the
plain model on one process, prints a table by tower, and names the causes of what differs. Nothing is trained or
written. Ends with exit status 1 if something differs for another reason than accumulation, rounding or dropout.
"""
