"""The commands: `python -m miniclip`, or `miniclip` where the package is installed, lists and runs them."""

import importlib
import sys
from pathlib import Path

COMMANDS = Path(__file__).parent / "commands"


def main():
    names = sorted(path.stem for path in COMMANDS.glob("[a-z]*.py") if path.stem != "common")
    if len(sys.argv) < 2 or sys.argv[1] not in names:
        print("usage: python -m miniclip COMMAND ...\n" + "\n".join(names))
        sys.exit(0 if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help") else 2)
    name = sys.argv.pop(1)
    sys.argv[0] = f"miniclip {name}"
    from miniclip.utils.command_line import run

    run(importlib.import_module(f"miniclip.commands.{name}").main)


if __name__ == "__main__":
    main()
