"""What all commands have in common: they are listed, their help is quick and complete, and errors are one line."""

import ast
import gc
import subprocess
import sys

import pytest

from miniclip import __main__
from miniclip.__main__ import find_commands, summary
from miniclip.utils.command_line import FLAGS, starting
from tests.conftest import ROOT

SUBCOMMANDS = [f"search {name}" for name in ("index", "query", "merge", "export", "check")]
HEAVY = {"torch", "transformers", "datasets", "faiss", "matplotlib", "numpy", "PIL"}
OUTPUT = ("output", "writ", "Writ", "rint", "serves")


def run(*words: str) -> subprocess.CompletedProcess:
    """Runs `miniclip` with some words."""
    return subprocess.run([sys.executable, "-m", "miniclip", *words], cwd=ROOT, capture_output=True, text=True)


def test_every_command_is_listed_with_a_line():
    commands = find_commands()
    assert {"train", "evaluate", "search", "zero_shot", "page"} <= set(commands)
    for listed in (run(), run("--help")):
        assert listed.returncode == 0
        for name, path in commands.items():
            line = next(line for line in listed.stdout.splitlines() if line.split()[:1] == [name])
            assert line.endswith(summary(path)) and 20 < len(summary(path)) and len(line) <= 120


@pytest.mark.parametrize("name", [*find_commands(), *SUBCOMMANDS])
def test_help_is_quick_and_has_an_example_and_the_output(name):
    code = (
        "import sys, atexit\n"
        f"atexit.register(lambda: print('HEAVY', *({HEAVY!r} & set(sys.modules))))\n"
        f"sys.argv = ['miniclip', *{name.split()!r}, '--help']\n"
        "from miniclip.__main__ import main\nmain()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    text, _, heavy = done.stdout.rpartition("HEAVY")
    assert done.returncode == 0 and not heavy.strip(), done.stderr + heavy
    example = text.partition("\nexample:\n")[2].strip()
    assert example.startswith((f"miniclip {name}", f"python {name}.py", "miniclip search index"))
    assert any(word in text for word in OUTPUT), text


@pytest.mark.parametrize("words, message", [
    (["serch"], "'serch' is not a possible value; nearest: search"),
    (["zero-shot", "--imges", "x", "--model", "y", "--images", "z"], "unknown option 'imges'; nearest: images"),
    (["zero_shot", "--model", "y"], "arguments are required: --images"),
    (["evaluate", "--model", "x", "--precision", "fp3"], "'fp3' is not a possible value; nearest: fp32"),
    (["search", "qury"], "nearest: query"),
    (["search", "index", "x", "--index", "y", "--methd", "ivf"], "index: unknown option 'methd'; nearest: method"),
    (["shapes", "a", "b"], "unexpected argument 'b'"),
    (["evaluate", "--model", "x", "--eval_fil", "y"], "unknown option 'eval_fil'; nearest: eval_file"),
    (["moderate", "--model", "x", "--images", "y", "--batch_size", "0"], "0 is less than 1"),
])  # fmt: skip
def test_a_wrong_word_is_answered_in_one_line_with_the_nearest_right_one(words, message):
    done = run(*words)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1 and not done.stdout


@pytest.mark.parametrize("words, message", [
    (["scene-quiz", "--model", "nowhere"], "miniclip scene_quiz: --model nowhere: there is no such folder"),
    (["convert", "a", "b", "--to", "onxx"], "miniclip convert: cannot convert to 'onxx', only to openclip, hf"),
])  # fmt: skip
def test_input_that_is_wrong_is_one_line_too(words, message):
    done = run(*words)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and done.stderr.startswith(message)


def test_shared_flags_have_one_definition():
    """A flag that FLAGS has is never added by hand in a command."""
    for name, path in find_commands().items():
        source = path.read_text()
        by_hand = [flag for flag in FLAGS if f'add_argument("--{flag}"' in source]
        assert not by_hand, (name, by_hand)


def test_a_command_reads_no_other(monkeypatch, tmp_path):
    """Their summaries are for the list: to read all files took as long as many an import."""
    monkeypatch.setattr(__main__, "summary", lambda path: pytest.fail(f"{path} was read"))
    monkeypatch.setattr(sys, "argv", ["miniclip", "shapes", str(tmp_path), "--train", "1", "--eval", "1"])
    __main__.main()
    assert (tmp_path / "train.json").is_file()


FIRST = {"main", "parse_train", "index", "query", "maintain", "open_page"}  # functions with the imports that take long


def test_what_commands_import_is_not_searched_for_garbage():
    loose = []
    for path in [*find_commands().values(), ROOT / "miniclip" / "training" / "parse.py"]:
        for function in ast.parse(path.read_text(encoding="utf-8")).body:
            if not isinstance(function, ast.FunctionDef) or function.name not in FIRST:
                continue
            with_it = [one for one in ast.walk(function) if isinstance(one, ast.With)]
            with_it = [one for one in with_it if ast.unparse(one.items[0]) == "starting()"]
            inside = {id(one) for block in with_it for one in ast.walk(block)}
            imports = [one for one in ast.walk(function) if isinstance(one, (ast.Import, ast.ImportFrom))]
            loose += [f"{path}:{one.lineno} {ast.unparse(one)}" for one in imports if id(one) not in inside]
    # Of parse_train, after torch.
    assert [line.partition(" ")[2] for line in loose] == ["from miniclip.run.store import local_folder"], loose


def test_garbage_is_collected_again_after_imports_that_fail():
    with pytest.raises(ImportError), starting():
        assert not gc.isenabled()
        import miniclip.no_such_module  # noqa: F401
    assert gc.isenabled()


def test_a_warning_is_one_line_without_code(caption_set, tiny_model, run_script):
    tiny_model.save_pretrained(caption_set / "model")
    for number, name in enumerate(("n99999999", "n88888888")):
        (caption_set / "set" / name).mkdir(parents=True)
        (caption_set / f"{number}.png").rename(caption_set / "set" / name / "a.png")
    done = run_script("-m", "miniclip", "zero_shot", "--model", caption_set / "model", "--images", caption_set / "set",
                      "--output_dir", caption_set / "out")  # fmt: skip
    lines = [line for line in done.stderr.replace("\r", "\n").splitlines() if "class names are ids" in line]
    assert len(lines) == 1 and lines[0].startswith("warning: 2 of 2 class names are ids") and ".py" not in done.stderr
