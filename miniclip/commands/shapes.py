"""TODO docstring."""

from __future__ import annotations

import argparse

from miniclip.datasets.shapes import (
    write,
)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m miniclip shapes",
        description="Write the demo's data set: scenes of colored shapes, with captions.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("out_dir", help="folder to write to")
    parser.add_argument("--train", type=int, default=6000, help="number of training images")
    parser.add_argument("--eval", type=int, default=600, help="number of evaluation images")
    parser.add_argument("--seed", type=int, default=0, help="another seed, another data set and another split")
    parser.add_argument("--size", type=int, default=64, help="width and height of the images in pixels")
    args = parser.parse_args(argv)
    try:
        write(args.out_dir, args.train, args.eval, args.seed, args.size)
    except (ValueError, OSError) as error:
        parser.error(str(error))
