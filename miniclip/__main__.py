"""The commands: `miniclip`, or `python -m miniclip`, lists them and runs them."""

import ast
import importlib.util
import sys
from pathlib import Path


def find_commands() -> dict[str, Path]:
    """Returns the file of each command. train.py and evaluate.py are beside the package until it is installed."""
    folder = Path(__file__).resolve().parent / "commands"
    scripts = (folder.parents[1] / name for name in ("train.py", "evaluate.py"))
    files = (*filter(Path.exists, scripts), *sorted(folder.glob("[a-z]*.py")))
    return {path.stem: path for path in files if path.stem != "common"}


def summary(path: Path) -> str:
    """Returns the first line of a file's docstring, without importing the file."""
    return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n")[0]


def main():
    from miniclip.utils.command_line import Parser, run

    commands = find_commands()
    epilog = "miniclip COMMAND --help describes a command."
    parser = Parser("miniclip", usage="miniclip COMMAND ...", add_help=False, epilog=epilog)
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        lines = [f"  {name:<14}{summary(path)}" for name, path in commands.items()]
        parser.description = "commands:\n" + "\n".join(lines)
        parser.print_help()
        return
    parser.add_argument("COMMAND", choices=commands)
    name = parser.parse_args([sys.argv.pop(1).replace("-", "_")]).COMMAND
    sys.argv[0] = f"miniclip {name}"
    spec = importlib.util.spec_from_file_location(f"miniclip.commands.{name}", commands[name])
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    run(module.main)


if __name__ == "__main__":
    main()
