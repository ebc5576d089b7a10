"""TODO docstring."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from miniclip.utils.command_line import at_least, find_device, printable

if TYPE_CHECKING:  # all of it is imported when it is used: --help answers at once
    pass


def common_options(parser: argparse.ArgumentParser, output_dir: str):
    """What each command takes that looks at pictures."""
    parser.add_argument("--model", required=True, help="a folder saved by MiniCLIP, or a config with --pretrained")
    parser.add_argument("--pretrained", help="weights for the named config")
    parser.add_argument("--images", required=True, nargs="+", help="pictures, folders, or a folder of class folders")
    parser.add_argument("--on_bad_sample", choices=["stop", "skip"], default="stop", help="stop, or go on without")
    parser.add_argument("--output_dir", default=output_dir, help=f"folder for what is written (default: {output_dir})")
    parser.add_argument("--batch_size", type=at_least(1), default=32, help="images encoded at once")
    parser.add_argument("--num_workers", type=at_least(0), help="threads that read images; as many as there are cores")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16", "int8"], help="of matrix products")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps; a GPU if there is one unless given")


def open_model(options):
    """`(model, preprocess, tokenizer)`, the model in its form for inference."""
    from miniclip.inference.fast import inference_copy
    from miniclip.inference.load import load

    Path(options.output_dir).mkdir(parents=True, exist_ok=True)  # now: if it cannot be, nothing is done in vain
    model, preprocess, tokenizer = load(options.model, options.pretrained, find_device(options.device))
    return inference_copy(model, options.precision), preprocess, tokenizer


def cell(text: str) -> str:
    """Text for a cell of a Markdown table."""
    return printable(text).replace("|", "\\|")
