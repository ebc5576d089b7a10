"""The demo data set: scenes of coloured shapes, with captions.

Writes images, train.json and eval.json to OUTPUT_DIR."""

from miniclip.utils.command_line import Parser, at_least, starting


def main(argv: list[str]):
    parser = Parser.command("shapes", __doc__, "data/shapes --train 6000 --eval 600")
    parser.add_argument("output_dir", metavar="OUTPUT_DIR", help="folder to write to")
    parser.add_argument("--train", type=at_least(0), default=6000, help="number of training images")
    parser.add_argument("--eval", type=at_least(0), default=600, help="number of evaluation images")
    parser.add_argument("--seed", type=int, default=0, help="another seed makes another data set")
    parser.add_argument("--size", type=at_least(1), default=64, help="image width and height in pixels")
    options = parser.parse_args(argv)
    with starting():
        from miniclip.datasets.shapes import write

    write(options.output_dir, options.train, options.eval, options.seed, options.size)
