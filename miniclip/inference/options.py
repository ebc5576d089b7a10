"""Options of `evaluate.py`. Nothing here imports torch, so that `--help` is fast."""

from dataclasses import dataclass

from miniclip.utils.command_line import FLAGS, HELP, option


@dataclass
class EvalOptions:
    """Measures a model, or embeddings made elsewhere, by retrieval. Prints Recall@K as a table and writes it to a JSON
    file.

    model: str | None = option(None, "a folder saved by MiniCLIP, or a name from model_configs/ (with --pretrained)")
    pretrained: str | None = option(None, "weights for the named config")
    eval_file: str | None = option(
        None,
        "captions: .json, .jsonl, .csv, .tsv, shards/{000..123}.tar, a folder of images with texts, hf:NAME[:SPLIT], "
        ".parquet; several with :: (docs/datasets.md)",
    )
    image_root: str | None = option(None, "folder that image paths start from; the caption file's own unless given")
    image_column: str | None = option(
        None, "column of the images where it is not to be guessed (OpenCLIP: --csv-img-key); the separator is found"
    )
    caption_column: str | None = option(None, "the same for the captions (OpenCLIP: --csv-caption-key)")
    on_bad_sample: str = option(
        "stop", "bad records and images: stop, or skip and list them beside the JSON", choices=["stop", "skip"]
    )
    allow_outside_image_root: bool = option(False, "image paths may lead out of their folder: .., absolute ones, links")
    captions: str = option("all", "captions of an image that count", choices=["all", "first"])
    batch_size: int | None = option(None, "images or captions encoded at once (32 and 64 on a CPU, 256 elsewhere)")
    num_workers: int | None = option(None, "threads that read images; as many as there are cores unless given")
    precision: str = option("fp32", "of the matrix products", choices=["fp32", "bf16", "int8"])
    full_decode: bool = option(False, "decode large JPEGs in full, not at a size that is still twice the model's")
    feature_cache: str | None = option(None, "folder for image features, to encode no picture twice")
    device: str | None = option(None, "cpu, cuda, cuda:1, mps; a GPU if there is one unless given")
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
