"""Do the commands in AGENTS.md exist, with the options they are given, and fit on one page?"""

import re
import shlex

import pytest

from tests.conftest import ROOT

TEXT = (ROOT / "AGENTS.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in block.splitlines() if line.startswith("python")]
OURS = [line for line in COMMANDS if "pytest" not in line]


def test_it_is_one_page():
    assert len(TEXT.splitlines()) <= 80 and len(OURS) >= 8


@pytest.mark.parametrize("line", OURS, ids=lambda line: " ".join(line.split()[1:5]))
def test_its_commands_have_these_options(run_script, line):
    words = shlex.split(line)[1:]
    script = words[:3] if words[0] == "-m" else words[:1]
    if script[-1] == "search":
        script = words[:4]
    text = run_script(*script, "--help_all" if script == ["train.py"] else "--help").stdout
    for flag in (word for word in words[len(script) :] if re.match(r"--?[a-z]", word)):
        assert re.search(rf"(?<![\w-]){re.escape(flag)}(?![\w-])", text), (flag, line)


@pytest.mark.parametrize("name", re.findall(r"(?:docs|tests|miniclip)/[\w/]+\.\w+", TEXT))
def test_its_files_exist(name):
    assert (ROOT / name).is_file(), name


def test_its_list_of_commands_with_json_is_complete():
    files = (ROOT / "miniclip" / "commands").glob("*.py")
    listed = TEXT[TEXT.index("It works on") : TEXT.index("train.py writes")]
    for file in files:
        source = file.read_text(encoding="utf-8")
        offers = re.search(r'share\([^)]*"json"|share_image_flags\(parser', source) is not None
        if file.stem not in ("common", "__init__"):
            assert offers == (file.stem in listed), file
