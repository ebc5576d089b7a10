"""The learning pages as programs: runs their code, compares or rewrites its output, and makes notebooks of them.

    python docs/learn/make.py run [02 ...]      run chapters; rewrite figures and the output that has changed
    python docs/learn/make.py check [02 ...]    run them and compare, without writing anything
    python docs/learn/make.py notebooks         write notebooks/*.ipynb from the pages

A page is Markdown. Its ```python blocks run in order, in one namespace, in a scratch copy of the repository; ```sh
blocks run in a shell, except below the line <!-- not run -->. The ```text block right after a block is what it prints.
Words and integers are compared exactly, numbers with a decimal point to one part in 1,000 or one in the last digit.
Below <!-- tolerance: 0.02 -->, each number may be off by 0.02, or by 2% of itself if that is more. Figures may differ
by 2% of the range of levels, on average. The Chinese page, in zh/, has the same code: it is run once.
"""

import contextlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

LEARN = Path(__file__).resolve().parent
ROOT = LEARN.parents[1]
FENCE = re.compile(
    r"(?P<notes>(?:^<!-- (?:not run|tolerance: [\d.e-]+) -->\n)*)^```(?P<kind>\w*)\n(?P<body>.*?)^```$\n?", re.M | re.S
)
NUMBER = re.compile(r"[-+]?(?:\d[\d,]*)?\.?\d+(?:e[-+]?\d+)?")
FIGURE_TOLERANCE = 0.02


@dataclass
class Block:
    """A fenced block of a page: its language, text and place, and what the comments above it say."""

    kind: str
    body: str
    span: tuple[int, int]  # of the body in the page
    whole: tuple[int, int]  # with its fences and comments
    tolerance: float | None
    runs: bool


def read_blocks(page: Path) -> list[Block]:
    found = []
    for match in FENCE.finditer(page.read_text(encoding="utf-8")):
        tolerance, runs = re.search(r"tolerance: (\S+)", match["notes"]), "not run" not in match["notes"]
        tolerance = float(tolerance[1]) if tolerance else None
        found.append(Block(match["kind"], match["body"], match.span("body"), match.span(), tolerance, runs))
    return found


def chapters(names: list[str] = ()) -> list[Path]:
    """The English pages, in order; `names` are the beginnings of their file names."""
    pages = sorted(LEARN.glob("[0-9][0-9]_*.md"))
    for name in names:
        if not any(page.name.startswith(name) for page in pages):
            sys.exit(f"no chapter in {LEARN} begins with {name!r}")
    return [page for page in pages if not names or page.name.startswith(tuple(names))]


def matches(expected: str, printed: str, tolerance: float | None) -> bool:
    """Whether two outputs are the same but for spaces at line ends and for numbers within the tolerance."""
    expected, printed = ("\n".join(map(str.rstrip, text.strip().splitlines())) for text in (expected, printed))
    words = [[" ".join(part.split()) for part in NUMBER.split(text)] for text in (expected, printed)]
    if words[0] != words[1]:
        return False
    for a, b in zip(NUMBER.findall(expected), NUMBER.findall(printed), strict=True):
        x, y = float(a.replace(",", "")), float(b.replace(",", ""))
        if tolerance is not None:
            slack = tolerance * max(1, abs(x))
        elif "e" in a:
            slack = 1e-3 * abs(x)
        else:
            slack = max(1e-3 * abs(x), 10.0 ** -len(a.partition(".")[2])) if "." in a else 0
        if abs(x - y) > slack * (1 + 1e-6):
            return False
    return True


def make_workspace(folder: Path):
    """The repository as links, with `docs/learn/figures`, `data` and `runs` of its own."""
    (folder / "docs" / "learn" / "figures").mkdir(parents=True)
    for part in (Path("."), Path("docs"), Path("docs/learn")):
        for source in (ROOT / part).iterdir():
            target = folder / part / source.name
            if not target.exists() and source.name not in ("data", "runs", ".git"):
                target.symlink_to(source)


def run_sh(body: str) -> str:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(["sh", "-e", "-c", body], capture_output=True, text=True, env={**os.environ, "PATH": path})
    if done.returncode:
        sys.exit(f"{body}{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout


def run_chapter(page: Path) -> list[tuple[Block, str]]:
    """Runs the blocks of a page in the current folder: its text blocks, each with what was printed for it."""
    blocks, namespace, outputs = read_blocks(page), {"__name__": "__main__"}, []
    for block, after in zip(blocks, [*blocks[1:], None]):
        if block.kind not in ("python", "sh") or not block.runs:
            continue
        if block.kind == "sh":
            printed = run_sh(block.body)
        else:
            first_line = page.read_text(encoding="utf-8")[: block.span[0]].count("\n")
            code = compile("\n" * first_line + block.body, str(page), "exec")
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(code, namespace)
            printed = out.getvalue()
        if after and after.kind == "text":
            outputs.append((after, printed))
        elif block.kind == "python" and printed:
            sys.exit(f"{page.name}: a block prints and no ```text block follows:\n{block.body}{printed}")
    return outputs


def rewrite(page: Path, texts: dict[int, str]):
    """Replaces the bodies of some text blocks of a page, given by their number among its text blocks."""
    page_text, blocks = page.read_text(encoding="utf-8"), [b for b in read_blocks(page) if b.kind == "text"]
    for number in sorted(texts, reverse=True):
        start, end = blocks[number].span
        page_text = page_text[:start] + texts[number] + page_text[end:]
    page.write_text(page_text, encoding="utf-8")


def figure_difference(one: Path, other: Path) -> float:
    """The mean difference of two images, as a share of the range; 1 if their sizes differ."""
    import numpy as np
    from PIL import Image

    a, b = (np.asarray(Image.open(path).convert("RGB"), dtype=float) for path in (one, other))
    return abs(a - b).mean() / 255 if a.shape == b.shape else 1.0


def run(names: list[str], write: bool) -> list[str]:
    """Runs chapters in a workspace; returns what differs from the pages, or writes it into both languages."""
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # before torch: threads that wait for one another spin only briefly
    os.environ.update(MPLBACKEND="Agg", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    wrong, home = [], Path.cwd()
    with tempfile.TemporaryDirectory(prefix="learn") as folder:
        make_workspace(Path(folder))
        sys.path.insert(0, str(ROOT))
        os.chdir(folder)
        try:
            for page in chapters(names):
                start, busy, changed = time.perf_counter(), time.process_time(), {}
                for number, (block, printed) in enumerate(run_chapter(page)):
                    if not matches(block.body, printed, block.tolerance):
                        changed[number] = "\n".join(map(str.rstrip, printed.strip("\n").splitlines())) + "\n"
                        wrong.append(f"{page.name} says\n{block.body}but its code prints\n{printed}")
                wall, busy = time.perf_counter() - start, time.process_time() - busy
                print(f"{page.name}: {wall:.0f} s, {busy:.0f} s of processor time", flush=True)
                for translation in (page, LEARN / "zh" / page.name) if write and changed else ():
                    if translation.exists():
                        rewrite(translation, changed)
            for figure in sorted(Path("docs/learn/figures").iterdir()):
                kept = LEARN / "figures" / figure.name
                if kept.exists() and figure_difference(figure, kept) <= (0 if write else FIGURE_TOLERANCE):
                    continue
                wrong.append(f"the figure {figure.name} has changed")
                if write:
                    kept.write_bytes(figure.read_bytes())
        finally:
            os.chdir(home)
    return wrong


# Notebooks: the same text and code, with links that start from the notebook's folder and output from the page.
START = """import os
import sys

while not os.path.exists("train.py"):  # the code runs in the root of the repository
    os.chdir("..")
sys.path.insert(0, os.getcwd())"""


def to_notebook(page: Path, target: Path) -> str:
    """A page as a notebook, JSON of nbformat 4.4."""

    def rebase(match: re.Match) -> str:
        return f"]({os.path.relpath(page.parent / match[1], target.parent)}{match[2] or ''})"

    def prose(text: str):
        text = re.sub(r"<details><summary>(.*?)</summary>", r"**\1**", text).replace("</details>", "")
        text = re.sub(r"\]\((?!https?:|#)([^)#\s]+)(#[^)\s]*)?\)", rebase, text).strip()
        if text:
            cells.append({"cell_type": "markdown", "metadata": {}, "source": text.splitlines(keepends=True)})

    def code(source: str):
        lines = source.rstrip("\n").splitlines(keepends=True)
        cell = {"cell_type": "code", "execution_count": None, "metadata": {}, "outputs": [], "source": lines}
        cells.append(cell)

    cells, text, position, previous = [], page.read_text(encoding="utf-8"), 0, None
    for block in read_blocks(page):
        if previous and block.kind == "text":
            prose(text[position : block.whole[0]])
            output = {"name": "stdout", "output_type": "stream", "text": block.body.splitlines(keepends=True)}
            previous["outputs"].append(output)
        elif block.kind in ("python", "sh") and block.runs:
            prose(text[position : block.whole[0]])
            if not any(cell["cell_type"] == "code" for cell in cells):
                code(START)
            code(block.body if block.kind == "python" else "%%sh\n" + block.body)
        else:
            continue
        position, previous = block.whole[1], cells[-1] if block.kind != "text" else None
    prose(text[position:])
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook = {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 4}
    return json.dumps(notebook, ensure_ascii=False, indent=1) + "\n"


def notebooks() -> dict[Path, str]:
    """All notebooks, by their paths."""
    pages = [*chapters(), *sorted((LEARN / "zh").glob("[0-9][0-9]_*.md"))]
    targets = [LEARN / "notebooks" / page.relative_to(LEARN).with_suffix(".ipynb") for page in pages]
    return {target: to_notebook(page, target) for page, target in zip(pages, targets)}


def main(argv: list[str]):
    if argv[:1] == ["notebooks"] and len(argv) == 1:
        for path, content in notebooks().items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content, encoding="utf-8")
    elif argv[:1] == ["run"]:
        print("\n".join(run(argv[1:], write=True)))
    elif argv[:1] == ["check"]:
        if wrong := run(argv[1:], write=False):
            sys.exit("\n".join(wrong))
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
