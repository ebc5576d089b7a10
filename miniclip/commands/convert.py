"""Conversion of CLIP models between MiniCLIP, OpenCLIP, Hugging Face and sentence-transformers.

Reads a weight file or a model folder (SRC) and writes a weight file or a model folder (DST).
"""

from miniclip.utils.command_line import Parser, starting
from miniclip.utils.errors import InputError


def main(argv: list[str]):
    parser = Parser.command("convert", __doc__, "runs/mine mine.pt --to openclip")
    parser.add_argument("SRC", help="a weight file (.pt, .bin, .safetensors), or a folder of MiniCLIP or Hugging Face")
    parser.add_argument("DST", help="output: a folder, or for openclip also a .safetensors or .pt file")
    parser.add_argument("--to", required=True, metavar="FORM",
                        help="openclip, hf (Hugging Face), sentence-transformers or miniclip")  # fmt: skip
    parser.share("model", help="config name or .json file, if SRC does not determine the activation")
    parser.add_argument("--force", action="store_true", help="replace files at DST")
    options = parser.parse_args(argv)
    with starting():
        from miniclip.weights.convert import convert

    try:
        print(convert(options.SRC, options.DST, options.to, options.model, options.force))
    except (ValueError, OSError) as error:
        raise InputError(str(error)) from None
