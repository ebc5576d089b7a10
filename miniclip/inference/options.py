"""Options of `evaluate.py`. Nothing here imports torch, so that `--help` is fast."""

import re
import sys
from argparse import Namespace
from pathlib import Path

from miniclip.datasets.splits import at_split
from miniclip.utils.command_line import HELP, Parser


def parse_evaluate(argv: list[str]) -> Namespace:
    """Reads evaluate.py's command line; without any arguments, prints the help."""
    about = "Measures a model, or embeddings made elsewhere, by retrieval. Prints Recall@K as a table and writes JSON."
    example = "python evaluate.py --model runs/mine --eval_file data/eval.json --report runs/mine"
    parser = Parser("evaluate.py", description=about, example=example)
    parser.share("model", "pretrained", "eval_file", "split", "image_root", "columns")
    parser.share("on_bad_sample", "allow_outside_image_root")
    add = parser.add_argument
    add("--captions", choices=["all", "first"], default="all", help="captions of each image that count")
    parser.share("batch_size", help=HELP["batch_size"] + " (default: 32 and 64 on a CPU, 256 elsewhere)")
    parser.share("num_workers", "precision")
    add("--decode", choices=["fast", "full", "openclip"], default="fast", help="fast: large JPEGs at no less than twice"
        " the model's input size; full: whole; openclip: files as OpenCLIP reads them")  # fmt: skip
    add("--feature_cache", help="folder that keeps image features, so that no image is encoded twice")
    parser.share("device")
    add("--save_features", help="folder to write image.npy and text.npy to")
    add("--features", help="folder with image.npy and text.npy to measure instead of a model")
    add("--output_file", help="JSON to write (default: retrieval_*.json in the model's folder, or here)")
    add("--report", help="folder for report.html, or a name ending in .html: metrics, curves, best and worst queries;"
                         " ending in .png: training curves, a few searches")  # fmt: skip
    if not argv:
        parser.print_help()
        sys.exit()
    options = parser.parse_args(argv)
    if not options.features and not (options.model and options.eval_file):
        parser.error("give --model and --eval_file, or --features")
    if options.features and options.model:
        parser.error("--features are measured without a model: remove --model")
    for kind in ("image", "text") if options.features else ():
        if not (Path(options.features) / f"{kind}.npy").is_file():
            parser.error(f"there is no {kind}.npy in {options.features}")
    if options.split and not options.eval_file:
        parser.error("--split chooses a part of --eval_file: add that")
    if options.report and not options.eval_file:
        parser.error("--report shows images: add --eval_file")
    report = Path(options.report or "")
    if report.is_file() and report.suffix.lower() not in (".html", ".htm", ".png"):
        parser.error(f"--report takes a folder, or a name that ends in .html or .png: {options.report} is a file")
    return options


def result_file(options: Namespace) -> Path:
    """The JSON file to write; its folder is created."""
    beside = Path(options.model if options.model and Path(options.model).is_dir() else "")
    source, part = at_split(options.eval_file or options.features)
    part = part or options.split
    name = re.sub(r"[{}*?:]+", "_", Path(source).stem) + (f"_{part}" if part else "")
    name += "_first" if options.captions == "first" else ""
    path = Path(options.output_file or beside / f"retrieval_{name}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
