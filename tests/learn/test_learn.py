"""The learning pages: their code runs and prints what they show, both languages have the same, notebooks follow."""

import ast
import importlib.util
import json
import re
import subprocess
import sys

import pytest

from tests.commands import test_readme as rules
from tests.conftest import ROOT

LEARN = ROOT / "docs" / "learn"
spec = importlib.util.spec_from_file_location("learn_make", LEARN / "make.py")
make = importlib.util.module_from_spec(spec)
sys.modules["learn_make"] = make
spec.loader.exec_module(make)

CHAPTERS = make.chapters()
PAGES = sorted(LEARN.rglob("*.md"))
each_chapter = pytest.mark.parametrize("page", CHAPTERS, ids=lambda page: page.stem)
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(LEARN)))


def seconds(page) -> int:
    """A chapter's time, from the index."""
    index = (LEARN / "README.md").read_text(encoding="utf-8")
    row = re.search(rf"^\|.*\({page.name}\).*\| (\d+) s \|$", index, re.MULTILINE)
    assert row, f"docs/learn/README.md has no row for {page.name} that ends with its seconds"
    return int(row[1])


QUICK = [page.stem for page in CHAPTERS if seconds(page) <= 8]
SLOW = [[page.stem] for page in CHAPTERS if page.stem not in QUICK]


@pytest.mark.parametrize("names", [QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)], ids=" ".join)
def test_the_code_prints_and_draws_what_the_page_shows(names):
    """The quick chapters in one process, which imports torch and matplotlib once."""
    done = subprocess.run([sys.executable, LEARN / "make.py", "check", *names], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def test_the_book_takes_at_most_45_minutes():
    assert sum(map(seconds, CHAPTERS)) <= 45 * 60


@each_chapter
def test_both_languages_have_the_same_code_output_and_figures(page):
    other = LEARN / "zh" / page.name
    ours, theirs = make.read_blocks(page), make.read_blocks(other)
    assert [(b.kind, b.runs, b.tolerance) for b in ours] == [(b.kind, b.runs, b.tolerance) for b in theirs]
    for a, b in zip(ours, theirs):
        if a.kind == "python":  # without comments
            assert ast.dump(ast.parse(a.body)) == ast.dump(ast.parse(b.body)), b.body
        elif a.kind:
            assert a.body == b.body
    images = [re.findall(r"!\[.*?\]\((?:\.\./)?(figures/\S+)\)", p.read_text(encoding="utf-8")) for p in (page, other)]
    assert images[0] == images[1]


@each_page
def test_links_files_and_commands_exist(page, monkeypatch, tmp_path):
    rules.test_links_lead_somewhere(page)
    rules.test_named_files_exist(page)
    rules.test_commands_parse(page, monkeypatch, tmp_path)


@each_chapter
def test_each_output_has_its_block(page):
    blocks = make.read_blocks(page)
    for before, block in zip([None, *blocks], blocks):
        if block.kind == "text":
            assert before and before.runs and before.kind in ("python", "sh"), block.body
            between = page.read_text(encoding="utf-8")[before.whole[1] : block.whole[0]]
            assert not between.strip(), f"{between!r} is between a block and its output"


@pytest.mark.parametrize("page", [p for p in PAGES if p.name[0].isdigit()], ids=lambda p: str(p.relative_to(LEARN)))
def test_numbers_in_the_text_are_printed_by_the_code(page):
    """Each number with a decimal point is, rounded, in an output or in code; quote others in backticks."""
    text = page.read_text(encoding="utf-8")
    known = [number for block in make.read_blocks(page) for number in make.NUMBER.findall(block.body)]
    known += [number for span in rules.spans(text) for number in make.NUMBER.findall(span)]
    known = [float(number.replace(",", "")) for number in known]
    prose = re.sub(r"`[^`]*`|\]\([^)]*\)|<!--.*?-->", "", make.FENCE.sub("", text))
    prose = re.sub(r"sections? [\d.]+|[\d.]+ 节", "", prose)  # of the paper
    for number in re.findall(r"(?<![\w.])\d+\.\d+(?![\d.])", prose):
        digits = len(number.partition(".")[2])
        assert any(f"{abs(value):.{digits}f}" == number for value in known), f"{page.name}: {number} is not printed"


def test_notebooks_are_what_the_pages_say():
    wanted = make.notebooks()
    assert set((LEARN / "notebooks").rglob("*.ipynb")) == set(wanted), "run python docs/learn/make.py notebooks"
    for path, content in wanted.items():
        assert path.read_text(encoding="utf-8") == content, f"{path}: run python docs/learn/make.py notebooks"
        notebook = json.loads(content)
        assert notebook["nbformat"] == 4 and any(cell["cell_type"] == "code" for cell in notebook["cells"])
        for cell in notebook["cells"]:
            assert "<details>" not in "".join(cell["source"])
            for link in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", "".join(cell["source"])):
                assert cell["cell_type"] == "code" or (path.parent / link).exists(), f"{path}: {link}"


def test_every_figure_is_shown():
    shown = {name for page in PAGES for name in re.findall(r"figures/([\w.]+)\)", page.read_text(encoding="utf-8"))}
    assert {figure.name for figure in (LEARN / "figures").iterdir()} == shown


@pytest.mark.parametrize(
    ("expected", "printed", "tolerance", "same"),
    [
        ("loss 2.079", "loss 2.080", None, True),
        ("loss 2.079", "loss 2.085", None, False),
        ("loss 2.079", "loss 2.095", 0.02, True),
        ("loss 2.079", "loss 2.179", 0.02, False),
        ("R@1 50.0", "R@1 50.9", 0.02, True),
        ("8 words", "9 words", None, False),
        ("8 words", "8 other words", 0.5, False),
        ("[1, 2]", "[1, 2, 3]", 9, False),
        ("a  b \n\n", "a b", None, True),
    ],
)
def test_the_comparison_can_fail(expected, printed, tolerance, same):
    assert make.matches(expected, printed, tolerance) is same


def test_check_reports_output_and_figures_that_differ(tmp_path, monkeypatch):
    page = tmp_path / "00_page.md"
    (tmp_path / "figures").mkdir()
    draw = 'from PIL import Image\nImage.new("L", (9, 9), {}).save("docs/learn/figures/grey.png")\n'
    page.write_text(f"```python\n{draw.format(9)}print(1 + 1)\n```\n```text\n3\n```\n![grey](figures/grey.png)\n")
    monkeypatch.setattr(make, "LEARN", tmp_path)
    assert len(make.run([], write=False)) == 2 and "\n3\n" in page.read_text()
    make.run([], write=True)
    assert "\n2\n" in page.read_text() and not make.run([], write=False)
    page.write_text(page.read_text().replace('"L", (9, 9), 9', '"L", (9, 9), 200'))
    assert make.run([], write=False) == ["the figure grey.png has changed"]
