"""TODO docstring."""

import argparse
import dataclasses
import warnings
from pathlib import Path

from miniclip.config import MiniClipConfig
from miniclip.inference.load import load
from miniclip.utils.errors import InputError
from miniclip.weights.inherit import inherit, spaced


def main(argv: list[str]):
    about = "Makes a small model of a large one's slices."
    parser = argparse.ArgumentParser("python -m miniclip inherit", description=about)
    parser.add_argument("--from", dest="source", required=True, help="a folder saved by MiniCLIP, or a config's name")
    parser.add_argument("--pretrained", help="weights of --from where that is the name of a config")
    parser.add_argument("--to", required=True, help="config of the small model: a name or a .json file")
    parser.add_argument("--output_dir", required=True, help="folder for the small model, for train.py's --model")
    parser.add_argument("--layers_image", type=int, nargs="+", help="blocks kept, from 0; evenly spaced unless given")
    parser.add_argument("--layers_text", type=int, nargs="+", help="the same for the text tower")
    options = parser.parse_args(argv)
    if not Path(options.source).is_dir() and options.pretrained is None:
        raise InputError(f"--from {options.source} is no folder; the name of a config needs --pretrained too")
    if (Path(options.output_dir) / "model.safetensors").exists():
        raise InputError(f"{options.output_dir} holds a model already: choose another --output_dir")
    config = MiniClipConfig.from_name(options.to)
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: print(f"warning: {message}")
        source, *_ = load(options.source, options.pretrained)
    model = inherit(source, config, options.layers_image, options.layers_text)
    model.save_pretrained(options.output_dir)
    for kind, ours, theirs, given in (
        ("image", model.visual, source.visual, options.layers_image),
        ("text", model.text, source.text, options.layers_text),
    ):
        kept = ", ".join(map(str, given or spaced(len(theirs.blocks), len(ours.blocks))))
        (length, width), (old_length, old_width) = (m.positional_embedding.shape for m in (ours, theirs))
        resized = f", positions interpolated from {old_length} to {length}" if length != old_length else ""
        print(f"{kind} tower: {width} of {old_width} channels, blocks {kept} of {len(theirs.blocks)}{resized}")
    if config.preprocess_cfg != dataclasses.replace(source.config.preprocess_cfg, size=config.preprocess_cfg.size):
        print(f"preprocessing: the source's, not that of {options.to}")
    sizes = [sum(p.numel() for p in m.parameters()) / 1e6 for m in (source, model)]
    print(f"{sizes[0]:.1f}M parameters to {sizes[1]:.1f}M, in {options.output_dir}: train it before you use it")
