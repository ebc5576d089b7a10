"""README and docs: links, paths, figures and command lines are checked against the files and parsers they name."""

import argparse
import ast
import importlib
import json
import re
import shlex
from functools import cache
from pathlib import Path
from unittest import mock

import pytest

import miniclip
from miniclip.training.parse import parse_train
from miniclip.utils.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
README, RESULTS = PAGES[0].read_text(encoding="utf-8"), ROOT / "benchmarks" / "RESULTS.md"
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
FOREIGN = set(  # options of other programs that the pages name: of pip, torchrun, accelerate, CLIP_benchmark and others
    "--no-deps --nproc_per_node --nnodes --node_rank --master_addr --master_port --multi_gpu --num_processes"
    " --num_machines --machine_rank --main_process_ip --main_process_port --mixed_precision --use_fsdp --fsdp_version"
    " --fsdp_auto_wrap_policy --embeddings_folder --index_folder --csv-img-key --csv-caption-key"
    " --lock-image-unlocked-groups --use-bnb-linear --coca-caption-loss-weight"
    " --coca-contrastive-loss-weight"
    " --annotation_file --clip_model --dataset --dataset_root --help_all --imagenet-val --input_format"
    " --maxShapes --minShapes --no_amp --onnx --optShapes --output --recall_k --remote-sync --saveEngine --task"
    " --zeroshot-frequency"
    " --cache_path --enable_wandb --input_dataset --num_prepro_workers --output_folder --output_partition_count"
    " --use_jit".split()
)


def blocks(text: str, language: str) -> list[str]:
    """The code blocks of a page that are marked with a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def spans(text: str) -> list[str]:
    """The pieces of a page that stand between single backticks, each on one line."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]


def table(text: str, first_cell: str) -> list[list[str]]:
    """The rows below the header of the table whose header begins with a cell; bold and backticks are removed."""
    lines = text[re.search(rf"^\| *{re.escape(first_cell)} *\|", text, re.MULTILINE).start() :].splitlines()
    rows = [line for line in lines[: next((i for i, line in enumerate(lines) if line[:1] != "|"), None)]][2:]
    return [[re.sub(r"[*`]", "", cell).strip() for cell in row.strip().strip("|").split("|")] for row in rows]


def figures(cell: str) -> list[float]:
    """The numbers of a cell such as "84.5 / 100 / 100"."""
    return [float(number) for number in cell.split("/")]


def same(stated: str, measured: str) -> bool:
    """Whether two times or ratios are equal but for the rounding of the coarser: "7.2 s" and "7.21 s (7.2 to 7.3)"."""
    values, slack = [], 0.0
    for text in (stated, measured):
        number, decimals, unit = re.match(r"([\d,]+(?:\.(\d+))?) ?(ms|s)?", text).groups()
        scale = 1e-3 if unit == "ms" else 1
        values.append(float(number.replace(",", "")) * scale)
        slack = max(slack, 0.5 * 10 ** -len(decimals or "") * scale)
    return abs(values[0] - values[1]) <= slack * 1.001


class Caught(Exception):
    pass


@cache
def parser_of(program: str) -> argparse.ArgumentParser:
    """The parser of train.py, evaluate.py or a command, taken from it at the moment when it begins to parse."""
    module = program.removesuffix(".py") if program.endswith(".py") else f"miniclip.commands.{program}"

    def catch(self, *args, **kwargs):
        raise Caught(self)

    with mock.patch.object(argparse.ArgumentParser, "parse_known_args", catch), pytest.raises(Caught) as caught:
        importlib.import_module(module).main(["--?"])
    return caught.value.args[0]


def options(parser: argparse.ArgumentParser) -> set[str]:
    """All options of a parser and of its subcommands."""
    found = set(parser._option_string_actions)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found = found.union(*map(options, action.choices.values()))
    return found


def command_lines(text: str) -> list[tuple[str, list[str], bool]]:
    """The commands of ours that a page names: program, arguments, and whether they are complete (from a sh block)."""
    lines = [line for block in blocks(text, "sh") for line in re.sub(r"\\\n", " ", block).splitlines()]
    found = []
    for line, complete in [(line, True) for line in lines] + [(span, False) for span in spans(text)]:
        start = r"(?:^|[ /])(?:(?:python|miniclip) -m )?miniclip (?=[a-z_]+\b)|\b(?=(?:train|evaluate)\.py )|slurm\.sh "
        match = re.search(start, line)
        if not match or (not complete and "=" in line[: match.start()]):
            continue
        rest = line[match.end() :].replace("recipe.json", "recipes/demo.json")
        words = shlex.split(re.split(r" [|<&]|;", rest)[0], comments=True)
        program, *argv = ["train.py", *words] if "slurm" in match.group() else words
        found.append((program, argv, complete and "..." not in argv))
    return found


def test_the_readme_has_at_most_200_lines():
    assert len(README.splitlines()) <= 200


@each_page
def test_links_lead_somewhere(page):
    """To files that exist, and to headings that the page has."""
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {link}"
        headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE) if anchor else []
        slugs = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
        assert not anchor or anchor in slugs, f"{page.name}: {link}; the headings are {slugs}"


def test_the_readme_links_to_every_page():
    linked = set(re.findall(r"\]\(docs/([\w.]+)", README))
    assert {page.name for page in PAGES[1:]} <= linked


@each_page
def test_named_files_exist(page):
    text = page.read_text(encoding="utf-8")
    rooms = "miniclip|tests|benchmarks|recipes|docs|model_configs"
    for name in re.findall(rf"(?<![\w/.~-])(?:{rooms})/[\w./*-]*|\brequirements[\w-]*\.txt", text):
        assert list(ROOT.glob(name.rstrip("./"))), f"{page.name}: {name}"
    scripts = {path.name for room in (".", "miniclip", "tests", "benchmarks") for path in (ROOT / room).rglob("*.py")}
    for name in re.findall(r"\b\w+\.py\b", text):
        assert name in scripts, f"{page.name}: {name}"


def test_the_core_is_what_the_readme_says():
    """The files, their number, their lines and their questions."""
    stated = re.search(r"^(\w+) files, about ([\d,]+) lines", README, re.MULTILINE)
    core = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "miniclip").glob("[a-z]*.py")}
    lines = sum(len(text.splitlines()) for text in core.values())
    assert (stated[1], stated[2]) == ("Nine", f"{round(lines, -2):,}"), f"{len(core)} files, {lines} lines"
    questions = {re.search(r"\w+\.py", file)[0]: question for file, question in table(README, "file")}
    assert len(core) == 9 and set(questions) == set(core)
    core_page = (ROOT / "docs" / "core.md").read_text(encoding="utf-8")
    assert list(questions.values()) == [question for _, question in table(core_page, "file")]
    for name, question in questions.items():
        assert ast.get_docstring(ast.parse(core[name])).startswith(question), f"{name}: {question}"


def test_without_make_the_same_commands_are_run():
    make = (ROOT / "Makefile").read_text(encoding="utf-8").replace("$(BIN)", ".venv/bin")
    recipe = [line.strip() for line in make.splitlines() if line.startswith("\t")]
    commands = [line for line in blocks(README, "sh")[1].splitlines() if line.startswith(".venv")]
    assert len(commands) == 4 and set(commands) <= set(recipe)


def test_results_equal_those_of_the_full_tables():
    """README against docs/results.md (retrieval from scratch) and docs/towers.md (pretrained encoders)."""
    full = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    measured = {}
    demo, scratch, article = (full.split("\n## ")[i] for i in (1, 2, 3))
    for section, columns in (
        (demo, ["make demo"]),
        (scratch, [None, "python train.py recipes/flickr8k.json", "python train.py recipes/flickr8k_cn.json"]),
        (article, ["python train.py recipes/article.json", "... --fixed_logit_scale 1"]),
    ):
        rows = {row[0]: row[1:] for row in table(section, "metric")}
        for i, command in enumerate(columns):
            for way in ("text_to_image", "image_to_text"):
                ks = (1, 3, 5, 10) if section is article else (1, 5, 10)
                measured[command, way] = [float(rows[f"{way}_R@{k}"][i]) for k in ks]
    towers = (ROOT / "docs" / "towers.md").read_text(encoding="utf-8")
    for _, text_to_image, image_to_text, _, command in table(towers, "what is trained"):
        for way, cell in (("text_to_image", text_to_image), ("image_to_text", image_to_text)):
            assert measured.setdefault((command, way), figures(cell)) == figures(cell), command
    rows = table(README, "what")
    assert len(rows) >= 6
    for _, text_to_image, image_to_text, command in rows:
        command = command.partition(" (")[0]
        assert figures(text_to_image) == measured[command, "text_to_image"], command
        assert figures(image_to_text) == measured[command, "image_to_text"], command
    stated = {command.partition(" (")[0]: cell for _, cell, command in table(article, "")}
    for command in ("python train.py recipes/article.json", "... --fixed_logit_scale 1"):
        assert figures(stated[command]) == measured[command, "text_to_image"]
    classify = (ROOT / "docs" / "classify.md").read_text(encoding="utf-8")
    assert table(classify, "question about") == table(demo, "question about")


def test_speeds_equal_those_of_the_benchmark():
    cpu = {row[0]: row for row in table(RESULTS.read_text(encoding="utf-8").split("## On the CPU")[1], "")}
    names = {
        "5,000 captions to embeddings": "captions to embeddings, 5000 captions",
        "one caption": "one caption to its embedding, 1 caption",
        "128 JPEGs of 500 x 375 to embeddings, batches of 32": "JPEGs to embeddings, 128 files",
        "one such JPEG": "one JPEG to its embedding, 1 file",
        "12-megapixel JPEG to tensor": "12 megapixel JPEG to tensor, 4000 x 3000",
        "evaluate.py, 1,000 images x 5 captions, start to table": "evaluation, from start to table, 1000 images",
        **{f"training step, batch {n}": f"training step, batch {n}" for n in (16, 32, 64, 128)},
        **{f"training step, batch {n}, bf16, against fp32": f"training step, bf16, batch {n}" for n in (16, 64)},
    }
    page = (ROOT / "docs" / "inference.md").read_text(encoding="utf-8")
    header = "TinyCLIP-40M, 2 cores of an AMD EPYC, fp32"
    full = table(page, header)
    assert {row[0] for row in full} == set(names)
    for name, *stated in full:
        for ours, theirs in zip(stated, cpu[names[name]][1:4]):
            assert same(ours, theirs), f"{name}: {ours}, but {theirs} in RESULTS.md"
    short = table(README, header)
    assert len(short) >= 5 and all(row in full for row in short)
    peak = re.search(
        r"^\| batch 1024 in chunks of 8 \| miniclip \| [\d.]+ \| ([\d.]+)", RESULTS.read_text(), re.MULTILINE
    )
    assert f"trains in {peak[1]} GB" in page


def test_search_times_equal_those_of_the_benchmark():
    results = RESULTS.read_text(encoding="utf-8")
    seconds = {row[0]: row[1] for row in table(results.split("## Image search: pictures")[1], "")}
    vectors = {
        (row[0], row[1].split(",")[0]): row[4]
        for row in table(results.split("## Image search: a million")[1], "vectors")
    }
    python = re.search(r"a text takes ([\d.]+) .*? ms, a (?:picture|image) ([\d.]+)", results).groups()
    photos, single, exact, million = (
        row[1] for row in table((ROOT / "docs/index.md").read_text(), "2 cores of an AMD EPYC (`benchmarks/search.py`)")
    )
    for stated, measured in (
        (photos, [seconds["index: all are new"], seconds["index: 20 new, 100 renamed, 10 deleted"],
                  seconds["index: nothing has changed"]]),
        (single, python),
        (exact, [vectors["100,000", "exact"]]),
        (million, [vectors["1,000,000", method] for method in ("HNSW", "IVF", "exact")]),
    ):  # fmt: skip
        numbers = re.findall(r"[\d.]+", stated)
        assert len(numbers) == len(measured) and all(map(same, numbers, measured)), f"{stated}: {measured}"


@pytest.mark.parametrize("vectors", ["100,000", "1,000,000"])
def test_the_rates_of_other_search_libraries_are_those_of_the_benchmark(vectors):
    measured = {}  # the rows of a method: its settings in turn
    for row in table(RESULTS.read_text(encoding="utf-8").split(f"## Search of {vectors} vectors")[1], "vectors"):
        measured.setdefault(re.sub(", (M|nlist)=.*", "", row[1]), []).append(row)
    names = {  # of the page: the method, and which of its settings
        "IVF of miniclip search, beside the vectors": ("miniclip search, ivf", (1, 2)),
        "its HNSW, beside the vectors": ("miniclip search, hnsw", (0, 1)),
        "faiss's HNSW": ("HNSW", (1, 2)),
        "faiss's IVF": ("IVF", (2,)),
        "usearch, 16 bits": ("usearch f16", (1, 2)),
        "usearch, 8 bits": ("usearch i8", (1, 2)),
    }
    page = table((ROOT / "docs/index.md").read_text(encoding="utf-8"), "")
    stated = {row[0]: row[1:4] if vectors == "100,000" else row[4:] for row in page}
    for name, (method, settings) in names.items():
        rows = [measured[method][place] for place in settings]
        for cell, column in zip(stated[name], (8, 6, 4)):  # recall@10, queries/s, MB
            pairs = zip(cell.split("; "), (row[column] for row in rows))
            assert all(same(ours, theirs) for ours, theirs in pairs), f"{name}: {cell}, but {rows}"


def test_duplicates_are_worth_what_the_page_says():
    results, page = RESULTS.read_text(encoding="utf-8"), (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    sections = re.findall(r"(\d+) pairs of rows with the same image in a batch.*?\n\n(\|.*?)\n\n", results, re.DOTALL)
    assert len(sections) == 2
    for pairs, rows in sections:
        recalls = [float(row.split("|")[-2].split()[0]) for row in rows.splitlines()[2:]]
        assert f"{pairs} duplicate pairs" in page or f"with {pairs} in a batch" in " ".join(page.split())
        assert len(recalls) == 4 and max(recalls) - min(recalls) <= 0.3 + 1e-9


@each_page
def test_code_is_sound(page):
    """JSON parses, Python compiles, and what is used of the package is public."""
    text = page.read_text(encoding="utf-8")
    for block in blocks(text, "json"):
        json.loads(block)
    for block in blocks(text, "python"):
        ast.parse(block)
    code = "\n".join([*blocks(text, "python"), *spans(text)])
    for name in re.findall(r"(?<![\w.])miniclip\.(\w+)", code):
        assert name in miniclip.__all__ or name == "compat", f"{page.name}: miniclip.{name}"


@each_page
def test_commands_parse(page, monkeypatch, tmp_path):
    """Complete command lines are parsed by the command's own parser; of others the options must exist. train.py refuses
    none of its own for options that contradict each other or do nothing."""
    monkeypatch.chdir(ROOT)
    for program, argv, complete in command_lines(page.read_text(encoding="utf-8")):
        parser, shown = parser_of(program), f"{page.name}: {program} {shlex.join(argv)}"
        if program == "train.py" and complete and "--fsdp" not in argv:  # which needs torchrun
            encoders = "--train_file photos" in shown  # whose names depend on what is installed
            model = ["--model", "EfficientNet-Lite0-MiniLM"] if encoders else []
            try:
                parse_train([*argv, *model, "--output_dir", str(tmp_path)])
            except InputError as error:
                pytest.fail(f"{shown}: {error}")
        if program == "train.py" and argv and not argv[0].startswith("-"):
            recipe = json.loads(Path(argv.pop(0)).read_text(encoding="utf-8"))
            known = {action.dest for action in parser._actions}
            assert not {name for name in recipe if name[0] != "_"} - known, shown
        if complete:
            try:
                parser.parse_args(argv)
            except SystemExit:  # the parser has printed why
                pytest.fail(shown)
        flags = {word.partition("=")[0] for word in argv if word.startswith("--")}
        assert flags <= options(parser), f"{shown}: {flags - options(parser)}"


def test_every_option_named_exists():
    """Options in running text, too: of train.py, evaluate.py, a command or a benchmark, or of another program."""
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text))
    commands = [path.stem for path in (ROOT / "miniclip/commands").glob("[a-z]*.py") if path.stem != "common"]
    known = set().union(*(options(parser_of(program)) for program in ("train.py", "evaluate.py", *commands)))
    for script in set(re.findall(r"benchmarks/\w+\.py", text)):
        known |= set(re.findall(r'"(--[a-z][\w-]*)"', (ROOT / script).read_text(encoding="utf-8")))
    assert named <= known | FOREIGN | {"--help", "--help_all"}, sorted(named - known - FOREIGN)
    assert FOREIGN <= named, f"no page names {sorted(FOREIGN - named)} any more"
