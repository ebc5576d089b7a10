"""TODO docstring."""

import argparse
import sys
import warnings

from miniclip.weights.convert import (
    convert,
)


def main(argv: list[str] | None = None):
    command = argparse.ArgumentParser("python -m miniclip convert", description="CLIP weights from any form to any.")
    command.add_argument("SRC", help="a weight file (.pt, .bin, .safetensors) or a folder of MiniCLIP or Hugging Face")
    command.add_argument("DST", help="a .safetensors or .pt file for openclip, a folder for hf and miniclip")
    command.add_argument("--to", required=True, metavar="FORM", help="openclip, hf or miniclip: for which library")
    command.add_argument("--model", help="config name or .json file, where SRC does not tell the activation")
    command.add_argument("--force", action="store_true", help="replace files at DST")
    args = command.parse_args(argv)
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
        try:
            print(convert(args.SRC, args.DST, args.to, args.model, args.force))
        except (ValueError, OSError) as error:
            sys.exit(f"error: {error}")
