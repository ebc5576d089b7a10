"""The command `convert_data`: a data set in another form."""

import argparse
import logging
import re

from miniclip.datasets.convert import convert
from miniclip.datasets.read import read_source
from miniclip.datasets.records import ReadOptions
from miniclip.utils.bad_samples import BadSamples


def main(argv: list[str]):
    """`python -m miniclip convert_data FROM TO`."""
    command = argparse.ArgumentParser(
        "python -m miniclip convert_data", description="Converts a data set from any form to any other."
    )
    command.add_argument("source", metavar="FROM", help="anything that --train_file takes")
    command.add_argument("target", metavar="TO", help="o.json, .jsonl, .csv, .tsv, out/{000..009}.tar, out/000000.tar")
    command.add_argument("--samples_per_shard", type=int, default=10_000, metavar="N", help="for out/000000.tar")
    command.add_argument("--image_root", help="folder that image paths start from; the source's own unless given")
    command.add_argument("--image_column", help="its name, if it cannot be guessed")
    command.add_argument("--caption_column", help="its name, if it cannot be guessed")
    command.add_argument("--on_bad_sample", choices=["stop", "skip"], default="stop", help="stop, or skip bad samples")
    command.add_argument("--allow_outside_image_root", action="store_true", help="image paths may lead out of it")
    options = command.parse_args(argv)
    if options.samples_per_shard < 1:
        command.error("--samples_per_shard: expected at least 1")
    logging.basicConfig(format="%(message)s")
    bad_samples = BadSamples()
    reading = ReadOptions.from_args(options, bad_samples=bad_samples, check_images=False)
    written = convert(read_source(options.source, reading), options.target, options.samples_per_shard, reading)
    bad_samples.open(re.sub(r"[{}*]+", "_", options.target) + ".bad_samples.jsonl")
    skipped = f"; {len(bad_samples)} could not be used: {bad_samples.path}" if bad_samples else ""
    print(f"{options.target}: {written} images{skipped}")
