"""TODO docstring."""

import argparse
import logging
import re

from miniclip.datasets.convert import convert
from miniclip.datasets.read import read_source
from miniclip.utils.bad_samples import BadSamples


def main(argv: list[str]):
    """`python -m miniclip convert_data FROM TO`."""
    command = argparse.ArgumentParser(
        "python -m miniclip convert_data",
        description="Captioned images from any form to any.",
    )
    command.add_argument("source", metavar="FROM", help="as --train_file takes it")
    command.add_argument("target", metavar="TO", help="o.json, .jsonl, .csv, .tsv, out/{000..009}.tar, out/000000.tar")
    command.add_argument("--samples_per_shard", type=int, default=10_000, metavar="N", help="for out/000000.tar")
    command.add_argument("--image_root", help="folder that image paths start from; the source's own unless given")
    command.add_argument("--image_column", help="its name, where it is not to be guessed")
    command.add_argument("--caption_column", help="its name, where it is not to be guessed")
    command.add_argument("--on_bad_sample", choices=["stop", "skip"], default="stop", help="stop, or go on without")
    command.add_argument("--allow_outside_image_root", action="store_true", help="image paths may lead out of it")
    options = command.parse_args(argv)
    if options.samples_per_shard < 1:
        command.error("--samples_per_shard: expected at least 1")
    logging.basicConfig(format="%(message)s")
    bad = {"on_bad": options.on_bad_sample, "bad_samples": BadSamples()}
    source = read_source(
        options.source, options.image_root, False, image_column=options.image_column,
        caption_column=options.caption_column, allow_outside=options.allow_outside_image_root, **bad,
    )  # fmt: skip
    written = convert(source, options.target, options.samples_per_shard, **bad)
    listed = re.sub(r"[{}*]+", "_", options.target)
    bad["bad_samples"].open(f"{listed}.bad_samples.jsonl")
    left_out = len(bad["bad_samples"])
    left_out = f"; {left_out} could not be used: {bad['bad_samples'].path}" if left_out else ""
    print(f"{options.target}: {written} images{left_out}")
