"""Conversion of captioned images between file formats.

Reads captions and images in any form that train.py reads, and writes them as JSON, CSV, TSV or tar shards.
"""

import logging
import re

from miniclip.utils.command_line import Parser, at_least


def main(argv: list[str]):
    parser = Parser.command("convert_data", __doc__, "photos/captions.csv 'shards/{000..009}.tar'")
    parser.add_argument("source", metavar="FROM", help="captions, as --train_file of train.py takes them")
    parser.add_argument(
        "target", metavar="TO", help="output: x.json, .jsonl, .csv, .tsv, x/{000..009}.tar, x/000000.tar"
    )
    parser.add_argument("--samples_per_shard", type=at_least(1), default=10_000, metavar="N", help="for x/000000.tar")
    parser.share("image_root", "columns", "on_bad_sample", "allow_outside_image_root")
    options = parser.parse_args(argv)

    from miniclip.commands.common import report_bad_samples
    from miniclip.datasets.convert import convert
    from miniclip.datasets.read import read_source
    from miniclip.utils.bad_samples import BadSamples

    logging.basicConfig(format="%(message)s")
    bad = {"on_bad": options.on_bad_sample, "bad_samples": BadSamples()}
    image_column, caption_column = options.columns or (None, None)
    source = read_source(
        options.source, options.image_root, False, image_column=image_column, caption_column=caption_column,
        allow_outside=options.allow_outside_image_root, **bad,
    )  # fmt: skip
    print(f"{options.target}: {convert(source, options.target, options.samples_per_shard, **bad)} images")
    report_bad_samples(bad["bad_samples"], re.sub(r"[{}*]+", "_", options.target) + ".bad_samples.jsonl")
