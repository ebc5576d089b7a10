"""A small model made of slices of a large one.

Reads a model and a config, and writes the small model, which still has to be trained, to --output_dir.
"""

import dataclasses
from pathlib import Path

from miniclip.commands.common import check_folder_or_weights
from miniclip.utils.command_line import Parser, starting
from miniclip.utils.errors import InputError


def main(argv: list[str]):
    example = "--from ViT-B-32 --pretrained vit_b_32.pt --to small.json --output_dir runs/small"
    parser = Parser.command("inherit", __doc__, example)
    parser.add_argument("--from", dest="source", required=True, help="the large model: a folder, or a config name")
    parser.share("pretrained")
    parser.add_argument("--to", required=True, help="config of the small model: a name or a .json file")
    parser.share("output_dir", required=True, help="folder for the small model, for --model of train.py")
    blocks = "numbers of the {} blocks to keep, from 0 (default: evenly spaced)"
    parser.add_argument("--layers_image", type=int, nargs="+", help=blocks.format("image tower's"))
    parser.add_argument("--layers_text", type=int, nargs="+", help=blocks.format("text tower's"))
    options = parser.parse_args(argv)
    check_folder_or_weights("--from", options.source, options.pretrained)
    if (Path(options.output_dir) / "model.safetensors").exists():
        raise InputError(f"{options.output_dir} already holds a model. Choose another --output_dir")
    with starting():
        from miniclip.config import MiniClipConfig
        from miniclip.inference.load import load
        from miniclip.towers.coca import CocaConfig
        from miniclip.weights.inherit import chosen_layers, inherit

    config = MiniClipConfig.from_name(options.to)
    source, *_ = load(options.source, options.pretrained)
    model = inherit(source, config, options.layers_image, options.layers_text)
    model.save_pretrained(options.output_dir)
    sections = (source.config.vision_cfg, config.vision_cfg), (source.config.text_cfg, config.text_cfg)
    towers = (model.visual, source.visual, options.layers_image), (model.text, source.text, options.layers_text)
    for kind, cfgs, (ours, theirs, given) in zip(("image", "text"), sections, towers):
        kept = ", ".join(map(str, chosen_layers(*cfgs, given)))
        (length, width), (old_length, old_width) = (
            next(p.shape for name, p in tower.named_parameters() if name.endswith("positional_embedding"))
            for tower in (ours, theirs)
        )
        resized = f", positions interpolated from {old_length} to {length}" if length != old_length else ""
        print(f"{kind} tower: {width} of {old_width} channels, blocks {kept} of {len(theirs.blocks)}{resized}")
    if isinstance(config, CocaConfig):
        print(f"decoder: {config.multimodal_cfg.layers} of {source.config.multimodal_cfg.layers} blocks, evenly spaced")
    if config.preprocess_cfg != dataclasses.replace(source.config.preprocess_cfg, size=config.preprocess_cfg.size):
        print(f"preprocessing: the source's, not that of {options.to}")
    sizes = [sum(p.numel() for p in m.parameters()) / 1e6 for m in (source, model)]
    print(f"{sizes[0]:.1f}M parameters to {sizes[1]:.1f}M, in {options.output_dir}: train it before you use it")
