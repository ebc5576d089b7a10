"""Options of `evaluate.py`. Nothing here imports torch, so that `--help` is fast."""

from dataclasses import dataclass

from miniclip.utils.command_line import FLAGS, HELP, option


@dataclass
class EvalOptions:
    """Measures a model, or embeddings made elsewhere, by retrieval. Prints Recall@K as a table and writes it to a JSON
    file.

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
    full_decode: bool = option(False, "decode large JPEGs at full size, not at twice the model's input size")
    feature_cache: str | None = option(None, "folder that keeps image features, so that no image is encoded twice")
    device: str | None = option(None, HELP["device"])
    save_features: str | None = option(None, "folder to write image.npy and text.npy to")
    features: str | None = option(None, "folder with image.npy and text.npy to measure instead of a model")
    output_file: str | None = option(
        None, "JSON file to write (default: retrieval_*.json in the model's folder, or else in the working directory)"
    )
    report: str | None = option(
        None,
        "folder for report.html (or a name ending in .html): metrics, curves, best and worst queries; a name ending in "
        ".png gets the training curves and a few searches as an image",
    )
