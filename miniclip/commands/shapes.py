"""The demo data set: scenes of coloured shapes, with captions.

Writes images, train.json and eval.json to OUTPUT_DIR.
"""

from miniclip.utils.command_line import Parser
from miniclip.utils.errors import InputError


def main(argv: list[str]):
    parser = Parser.command("shapes", __doc__, "data/shapes --train 6000 --eval 600")
    parser.add_argument("output_dir", metavar="OUTPUT_DIR", help="folder to write to")
    parser.add_argument("--train", type=int, default=6000, help="number of training images")
    parser.add_argument("--eval", type=int, default=600, help="number of evaluation images")
    parser.add_argument("--seed", type=int, default=0, help="another seed makes another data set")
    parser.add_argument("--size", type=int, default=64, help="image width and height in pixels")
    options = parser.parse_args(argv)

    from miniclip.datasets.shapes import write

    try:
        write(options.output_dir, options.train, options.eval, options.seed, options.size)
    except ValueError as error:
        raise InputError(str(error)) from None
