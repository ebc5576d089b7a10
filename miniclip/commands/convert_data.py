"""Conversion of captioned images between file formats.

Reads captions and images in any form that train.py reads, and writes them as JSON, CSV, TSV or tar shards."""

import logging
import re

from miniclip.utils.command_line import Parser, at_least, starting
from miniclip.utils.errors import InputError


def main(argv: list[str]):
    parser = Parser.command("convert_data", __doc__, "photos/captions.csv 'shards/{000..009}.tar'")
    parser.add_argument("source", metavar="FROM", help="captions, as --train_file of train.py takes them")
    forms = "output: x.json, .jsonl, .csv, .tsv, x/{000..009}.tar, x/000000.tar"
    parser.add_argument("target", metavar="TO", help=forms)
    parser.add_argument("--samples_per_shard", type=at_least(1), metavar="N", help="for x/000000.tar (default: 10,000)")
    parser.share("split", "image_root", "columns", "on_bad_sample", "allow_outside_image_root")
    options = parser.parse_args(argv)
    if options.samples_per_shard and not re.fullmatch(r"[^{]+\.tar", options.target.lower()):
        raise InputError(f"--samples_per_shard has no effect on {options.target}: remove it")
    with starting():
        from miniclip.datasets.convert import convert
        from miniclip.datasets.read import read_source
        from miniclip.datasets.records import ReadOptions
        from miniclip.utils.bad_samples import BadSamples

    logging.basicConfig(format="%(message)s")
    bad_samples = BadSamples()
    reading = ReadOptions.from_args(options, bad_samples=bad_samples, check_images=False)
    records, n = read_source(options.source, reading), options.samples_per_shard or 10_000
    print(f"{options.target}: {convert(records, options.target, n, reading)} images")
    bad_samples.report(re.sub(r"[{}*]+", "_", options.target) + ".bad_samples.jsonl")
