"""Options of `evaluate.py`. Nothing here imports torch, so that `--help` is fast."""

import re
import sys
from dataclasses import dataclass
from pathlib import Path

from miniclip.utils.command_line import FLAGS, HELP, make_parser, option


@dataclass
class EvalOptions:
    """Measures a model, or embeddings made elsewhere, by retrieval. Prints Recall@K as a table and writes a JSON file.

    example:
      python evaluate.py --model runs/mine --eval_file data/eval.json --report runs/mine
    """

    model: str | None = option(None, HELP["model"])
    pretrained: str | None = option(None, HELP["pretrained"])
    eval_file: str | None = option(None, HELP["eval_file"])
    image_root: str | None = option(None, HELP["image_root"])
    columns: str | None = option(None, HELP["columns"], nargs=2, metavar=("IMAGE", "CAPTION"))
    on_bad_sample: str = option("stop", HELP["on_bad_sample"], choices=FLAGS["on_bad_sample"]["choices"])
    allow_outside_image_root: bool = option(False, HELP["allow_outside_image_root"])
    captions: str = option("all", "captions of each image that count", choices=["all", "first"])
    batch_size: int | None = option(None, HELP["batch_size"] + " (default: 32 and 64 on a CPU, 256 elsewhere)")
    num_workers: int | None = option(None, HELP["num_workers"])
    precision: str = option("fp32", HELP["precision"], choices=FLAGS["precision"]["choices"])
    decode: str = option("fast", "fast: large JPEGs at no less than twice the model's input size; full: whole;"
                         " openclip: files as OpenCLIP reads them", choices=["fast", "full", "openclip"])  # fmt: skip
    feature_cache: str | None = option(None, "folder that keeps image features, so that no image is encoded twice")
    device: str | None = option(None, HELP["device"])
    save_features: str | None = option(None, "folder to write image.npy and text.npy to")
    features: str | None = option(None, "folder with image.npy and text.npy to measure instead of a model")
    output_file: str | None = option(None, "JSON to write (default: retrieval_*.json in the model's folder, or here)")
    report: str | None = option(None, "folder for report.html, or a name ending in .html: metrics, curves, best and"
                                      " worst queries; ending in .png: training curves, a few searches")  # fmt: skip

    def problems(self):
        """Yields what is wrong with the options and what to do about it."""
        if not self.features and not (self.model and self.eval_file):
            yield "give --model and --eval_file, or --features"
        if self.features and self.model:
            yield "--features are measured without a model: remove --model"
        for kind in ("image", "text") if self.features else ():
            if not (Path(self.features) / f"{kind}.npy").is_file():
                yield f"there is no {kind}.npy in {self.features}"
        if self.report and not self.eval_file:
            yield "--report shows images: add --eval_file"
        report = Path(self.report or "")
        if report.is_file() and report.suffix.lower() not in (".html", ".htm", ".png"):
            yield f"--report takes a folder, or a name that ends in .html or .png: {self.report} is a file"

    def result_file(self) -> Path:
        """The JSON file to write; its folder is created."""
        beside = Path(self.model if self.model and Path(self.model).is_dir() else "")
        name = re.sub(r"[{}*?:]+", "_", Path(self.eval_file or self.features).stem)
        name += "_first" if self.captions == "first" else ""
        path = Path(self.output_file or beside / f"retrieval_{name}.json")
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


def parse_evaluate(argv: list[str]) -> EvalOptions:
    """Reads evaluate.py's command line; without any arguments, prints the help."""
    parser = make_parser(EvalOptions, prog="evaluate.py")
    if not argv:
        parser.print_help()
        sys.exit()
    options = EvalOptions(**vars(parser.parse_args(argv)))
    for problem in options.problems():
        parser.error(problem)
    return options
