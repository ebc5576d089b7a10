"""Weight inheritance: a small model starts from slices of a large one.

That is a far better start than random weights (TinyCLIP's manual weight inheritance: Wu et al., ICCV 2023, arXiv
2309.12314). It takes evenly spaced blocks, and of the width the first channels and the first whole attention heads. The
small model knows little until it is trained, but learns faster.
"""

import dataclasses

import torch
from torch import Tensor

from miniclip.config import MiniClipConfig, TextConfig, VisionConfig
from miniclip.model import MiniClip
from miniclip.utils.errors import InputError
from miniclip.weights.load import ACTIVATION_NAMES, empty_model, resize_positions


def inherit(
    source: MiniClip, config: MiniClipConfig,
    layers_image: list[int] | None = None, layers_text: list[int] | None = None,
) -> MiniClip:  # fmt: skip
    """Returns a model with the sizes of `config` and slices of the weights of `source`, in evaluation mode.

    - depth: the blocks `layers_image` and `layers_text`, counted from 0; by default those of `spaced`;
    - width, MLP and embedding: the first channels of each matrix, gain and bias; the first heads of queries, keys and
      values, so heads must be as wide as the source's;
    - positions of another number are interpolated before their channels are cut.

    Images are preprocessed as the source's weights expect. Raises InputError, listing all problems, if the source has
    no such slices.
    """
    for section in (source.config.vision_cfg, source.config.text_cfg, config.vision_cfg, config.text_cfg):
        if not isinstance(section, VisionConfig | TextConfig):
            raise InputError("only MiniCLIP's own towers can inherit weights, and only from own towers")
    layers = {
        "visual": spaced(len(source.visual.blocks), config.vision_cfg.layers) if layers_image is None else layers_image,
        "text": spaced(len(source.text.blocks), config.text_cfg.layers) if layers_text is None else layers_text,
    }
    check(source.config, config, layers)
    images = dataclasses.replace(source.config.preprocess_cfg, size=config.vision_cfg.image_size)
    model = empty_model(dataclasses.replace(config, preprocess_cfg=images))
    theirs, weights = source.state_dict(), {}
    for name, expected in model.state_dict().items():
        tower, *path = name.split(".")
        if path and path[0] == "blocks":
            path[1] = str(layers[tower][int(path[1])])
        tensor = theirs[".".join([tower, *path])]
        if name.endswith("positional_embedding") and len(tensor) != len(expected):
            tensor = resize_positions(tensor, len(expected), is_grid=tower == "visual").to(tensor.dtype)
        if ".in_proj." in name:  # queries, keys and values, one above the other
            third = (len(expected) // 3, *expected.shape[1:])
            weights[name] = torch.cat([leading(part, third) for part in tensor.chunk(3)])
        else:
            weights[name] = leading(tensor, expected.shape).clone()
    model.load_state_dict(weights, strict=True, assign=True)
    return model.eval()


def leading(tensor: Tensor, shape) -> Tensor:  # the first entries in each dimension
    return tensor[tuple(slice(size) for size in shape)]


def spaced(layers: int, wanted: int) -> list[int]:
    """`wanted` of `layers` blocks, evenly spaced from the first: block i is i * layers // wanted."""
    return [i * layers // wanted for i in range(wanted)]


def check(source: MiniClipConfig, target: MiniClipConfig, layers: dict[str, list[int]]):
    """Raises InputError, listing why a model of config `source` has no slices for one of config `target`."""
    problems, ours, theirs = [], target.to_dict(), source.to_dict()
    for sizes in (ours, theirs):
        vision, text = sizes["vision_cfg"], sizes["text_cfg"]
        text["head_width"] = text["width"] // text["heads"]
        for tower in (vision, text):
            tower["MLP width"] = int(tower["width"] * tower["mlp_ratio"])
    for name, tower, kind in (("visual", "vision_cfg", "image"), ("text", "text_cfg", "text")):
        us, them = ours[tower], theirs[tower]
        for size in ("width", "MLP width"):
            if us[size] > them[size]:
                problems.append(f"the {kind} tower's {size} is {us[size]}, the source's only {them[size]}")
        for size in ("patch_size", "head_width", "vocab_size"):
            if us.get(size) != them.get(size):
                problems.append(f"the {kind} tower's {size} is {us[size]}, the source's {them[size]}")
        chosen, there = layers[name], them["layers"]
        if us["layers"] > there:
            problems.append(f"the {kind} tower has {us['layers']} layers, the source's only {there}")
        elif len(chosen) != us["layers"] or not all(0 <= layer < there for layer in chosen):
            problems.append(f"layers_{kind} {chosen} are no {us['layers']} of the source's 0 to {there - 1}")
    if target.embed_dim > source.embed_dim:
        problems.append(f"embed_dim is {target.embed_dim}, the source's only {source.embed_dim}")
    if target.quick_gelu != source.quick_gelu:
        us, them = ACTIVATION_NAMES[target.quick_gelu], ACTIVATION_NAMES[source.quick_gelu]
        problems.append(f"the activation is {us}, the source's {them} (quick_gelu)")
    if problems:
        raise InputError("the source has no weights to inherit for this config: " + "; ".join(problems))
