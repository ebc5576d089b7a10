"""Options of `evaluate.py`. Nothing here imports torch, so that `--help` is fast."""

import json
import os
import re
import sys
from argparse import Namespace
from itertools import cycle
from pathlib import Path

from miniclip.datasets.splits import at_split
from miniclip.utils.command_line import FLAGS, HELP, Parser, at_least

TABLES = (".txt", ".csv", ".md", ".tex")
ON_MODELS = "pretrained batch_size num_workers precision decode feature_cache device rerank".split()  # not --features
SOURCES = ("model", "pretrained", "features", "eval_file")
# Options that make one evaluation another than the next.
DEFINING = [*SOURCES, *"normalize image_root columns split captions precision decode rerank".split()]


def parse_evaluate(argv: list[str]) -> Namespace:
    """Reads evaluate.py's command line; without any arguments, prints the help."""
    about = "Measures models, or embeddings made elsewhere, by retrieval. Prints Recall@K as a table and writes JSON."
    example = "python evaluate.py --model runs/mine --eval_file data/eval.json --report runs/mine\n"
    example += "python evaluate.py --model runs/a runs/b --eval_file coco.json flickr.json --table both.md both.tex"
    parser = Parser("evaluate.py", description=about, example=example)
    add, several = parser.add_argument, {"nargs": "+", "action": "extend"}
    for name, more in (
        ("model", "; several are compared"), ("pretrained", "; one for each model, none for a folder"),
        ("eval_file", "; several data sets, one after the other"), ("image_root", "; one, or one for each eval_file"),
    ):  # fmt: skip
        parser.share(name, **several, metavar=name.upper(), help=FLAGS[name]["help"] + more)
    parser.share("split", "columns", "on_bad_sample", "allow_outside_image_root")
    add("--captions", choices=["all", "first"], default="all", help="captions of each image that count")
    parser.share("batch_size", help=HELP["batch_size"] + " (default: 32 and 64 on a CPU, 256 elsewhere)")
    parser.share("num_workers", "precision")
    add("--decode", choices=["fast", "full", "openclip"], default="fast", help="fast: large JPEGs at no less than twice"
        " the model's input size; full: whole; openclip: files as OpenCLIP reads them")  # fmt: skip
    add("--rerank", type=at_least(0), metavar="N", help="results of each query that late interaction puts into a new"
        " order (default: 100, if the model has it)")  # fmt: skip
    add("--feature_cache", help="folder that keeps image features, so that no image is encoded twice")
    parser.share("device", "json")
    add("--save_features", help="folder to write image.npy and text.npy to")
    add("--features", **several, help="embeddings to measure instead of a model: a folder with image.npy and text.npy,"
        " or others (docs/reports.md); several are compared")  # fmt: skip
    add("--normalize", action="store_true", help="divide each row of --features by its length")
    add("--output_file", help="JSON to write (default: retrieval_*.json in the model's folder, or here)")
    add("--table", nargs="+", metavar="FILE", help="files to write the table with 95%% intervals to; their endings say"
        " how: .txt, .csv, .md, .tex")  # fmt: skip
    add("--report", help="folder for report.html, or a name ending in .html: metrics, curves, best and worst queries;"
                         " ending in .png: training curves, a few searches")  # fmt: skip
    if not argv:
        parser.print_help()
        sys.exit()
    options = parser.parse_args(argv)
    options.several = any(len(names or ()) > 1 for names in (options.model, options.features, options.eval_file))
    for problem in _problems(options, parser.get_default):
        parser.error(problem)
    return options


def _problems(options: Namespace, default):
    """Yields what is wrong with the options."""
    if not all(options.features or [*(options.model or [""]), *(options.eval_file or [""])]):
        yield "give --model and --eval_file, or --features"
    if options.features and options.model:
        yield "--features are measured without a model: remove --model"
    for name in ON_MODELS if options.features else ():
        if vars(options)[name] != default(name):
            yield f"--{name} has no effect on --features: remove it"
    if options.features and options.on_bad_sample == "skip":
        yield "--on_bad_sample skip would leave embeddings without captions: mend the caption file"
    if options.normalize and not options.features:
        yield "--normalize is for --features: a model's embeddings have length 1"
    if options.features and not options.eval_file:
        if len(options.features) > 1:
            yield "several --features: add --eval_file, which says that they are of the same images and captions"
        for name in ("image_root", "columns", "split"):
            if vars(options)[name]:
                yield f"--{name} is for --eval_file: add it"
    if options.pretrained and len(options.pretrained) != len(options.model):
        many = f"{len(options.pretrained)} for {len(options.model)} models"
        yield f"--pretrained: {many}: give one for each, in their order, none for a folder"
    if len(options.image_root or [""]) not in (1, len(options.eval_file or [""])):
        yield f"--image_root: {len(options.image_root)} for {len(options.eval_file)} --eval_file: give one, or as many"
    for found in single(options):
        for n, one in enumerate(found):
            if one in found[:n]:
                yield f"{' '.join(filter(None, vars(one).values()))} is given twice"
    for name in ("report", "save_features") if options.several else ():
        if vars(options)[name]:
            yield f"--{name} takes one model and one data set at a time"
    if options.report and not options.eval_file:
        yield "--report shows images: add --eval_file"
    report = Path(options.report or "")
    if report.is_file() and report.suffix.lower() not in (".html", ".htm", ".png"):
        yield f"--report takes a folder, or a name that ends in .html or .png: {options.report} is a file"
    for name in options.table or ():
        if Path(name).suffix.lower() not in TABLES:
            yield f"--table {name}: its ending says how to write it: {', '.join(TABLES)}"
        if any(Path(name).resolve() == Path(file).resolve() for file in options.eval_file or ()):
            yield f"--table {name} would replace the data set: choose another name"
    output = Path(options.output_file or "")
    if options.output_file and output.exists() and not (_is_empty(output) or _read_result(output)):
        yield f"--output_file {output} exists and is no result of evaluate.py: choose another name"


def single(options: Namespace) -> tuple[list[Namespace], list[Namespace]]:
    """The models or embeddings, and the data sets, each with the values of the options that are its own."""
    models, files = options.model or [None], options.eval_file or [None]
    pretrained = [None if name == "none" else name for name in options.pretrained or [None] * len(models)]
    sources = [Namespace(model=None, pretrained=None, features=name) for name in options.features or ()]
    sources = sources or [Namespace(model=m, pretrained=p, features=None) for m, p in zip(models, pretrained)]
    roots = cycle(options.image_root or [None])
    return sources, [Namespace(eval_file=file, image_root=root) for file, root in zip(files, roots)]


def merged(options: Namespace, *parts: Namespace) -> Namespace:
    """The options of one evaluation: those of `parts`, from `single`, instead of the lists."""
    return Namespace(**{name: value for one in (options, *parts) for name, value in vars(one).items()})


def result_file(options: Namespace) -> tuple[Path, str]:
    """The JSON file to write, and what there is to say about it. Without --output_file, no result of another model,
    data set or setting is replaced: the name gets a number."""
    options = options if options.several else merged(options, *(part for found in single(options) for part in found))
    folder, name = _default_name(options)
    path = Path(options.output_file or folder / f"{name}.json")
    number, said = 1, ""
    while path.exists() and not _is_empty(path):
        about = "something else"
        if before := _read_result(path):
            if _defining(before["options"], before["folder"]) == _defining(vars(options), ""):
                break
            about = " ".join(str(before["options"][key]) for key in SOURCES if before["options"].get(key))
        if options.output_file:
            said = f", instead of the result for {about}"
            break
        number += 1
        said = f" ({path} is the result for {about})"
        path = folder / f"{name}_{number}.json"
    return path, said


def _default_name(options: Namespace) -> tuple[Path, str]:
    if options.several:
        return Path(), "retrieval_comparison"
    folder = Path(options.model) if options.model and Path(options.model).is_dir() else None
    # A copy of one on a store, in the user's cache; or others share it.
    if folder and (re.fullmatch(r"[0-9a-f]{16}", folder.parent.name) or not os.access(folder, os.W_OK)):
        folder = None
    source, part = at_split(options.eval_file or options.features)
    parts = [Path(source).stem, part or options.split, "first" if options.captions == "first" else ""]
    if folder is None and options.eval_file:  # here, where the results of other models may lie
        name = Path(options.model or options.features).name.removesuffix(".json")
        parts += [name, Path(options.pretrained or "").stem]
    return folder or Path(), re.sub(r"[{}*?:]+", "_", "_".join(["retrieval", *filter(None, parts)]))


def _defining(options: dict, folder: str) -> dict:
    """The options that make one evaluation another than the next, with absolute paths."""

    def absolute(value):
        if isinstance(value, list):
            return [absolute(one) for one in value]
        path = os.path.join(folder, value) if isinstance(value, str) else ""
        return os.path.abspath(path) if os.path.exists(path) else value

    return {name: absolute(value) for name in DEFINING if (value := options.get(name)) or type(value) is int}  # or 0


def _is_empty(path: Path) -> bool:
    return path.is_file() and not path.stat().st_size


def _read_result(path: Path) -> dict | None:
    """The metadata in a file that evaluate.py wrote; None for another one."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))["record"]
        return record if isinstance(record["options"], dict) and isinstance(record["folder"], str) else None
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None
