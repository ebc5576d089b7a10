"""Weight inheritance: a small model starts from slices of a large one.

That is a far better start than random weights (TinyCLIP's manual weight inheritance: Wu et al., ICCV 2023, arXiv
2309.12314). It takes evenly spaced blocks, in a ResNet of each stage, and of the width the first channels and the first
whole attention heads. The small model knows little until it is trained, but learns faster.
"""

import dataclasses
from itertools import accumulate

import torch
from torch import Tensor

from miniclip.config import MiniClipConfig, TextConfig, VisionConfig
from miniclip.model import MiniClip
from miniclip.towers.resnet import ResNetConfig
from miniclip.utils.errors import InputError
from miniclip.weights.load import ACTIVATION_NAMES, empty_model, resize_positions

KINDS = VisionConfig, TextConfig, ResNetConfig  # and their subclasses: a pruned tower can inherit from a whole one
SIZES = {  # fields that may differ; all others are part of what weights compute
    "layers", "width", "mlp_ratio", "MLP width", "heads", "image_size", "context_length", "patch_dropout",
    "block_heads", "block_mlp_widths",
}  # fmt: skip


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
    sections = (source.config.vision_cfg, config.vision_cfg), (source.config.text_cfg, config.text_cfg)
    for pair in sections:
        if not any(all(isinstance(section, kind) for section in pair) for kind in KINDS):
            raise InputError("only MiniCLIP's own towers can inherit weights, and only from own towers of their kind")
    chosen = (chosen_layers(*pair, given) for pair, given in zip(sections, (layers_image, layers_text)))
    layers = dict(zip(("visual", "text"), chosen))
    check(source.config, config, layers)
    images = dataclasses.replace(source.config.preprocess_cfg, size=config.vision_cfg.image_size)
    model = empty_model(dataclasses.replace(config, preprocess_cfg=images))
    theirs, weights, problems = source.state_dict(), {}, []
    blocks = {  # of the small model: those they come from
        ours: big[number]
        for kind, numbers in layers.items()
        for big in [block_names(source, kind)]
        for ours, number in zip(block_names(model, kind), numbers)
    }
    for name, expected in model.state_dict().items():
        block = next((block for block in blocks if name.startswith(block)), None)
        there = name if block is None else blocks[block] + name.removeprefix(block)
        tensor, third = theirs.get(there), (len(expected) // 3, *expected.shape[1:]) if expected.ndim else ()
        if tensor is not None and name.endswith("positional_embedding") and len(tensor) != len(expected):
            tensor = resize_positions(tensor, len(expected), is_grid=name.startswith("visual")).to(tensor.dtype)
        if tensor is None or any(a > b for a, b in zip(expected.shape, tensor.shape)):
            has = f"has no {there}" if tensor is None else f"has {there} {tuple(tensor.shape)}"
            problems.append(f"{name} is {tuple(expected.shape)}, the source {has}")
        elif ".in_proj." in name:  # queries, keys and values, one above the other
            weights[name] = torch.cat([leading(part, third) for part in tensor.chunk(3)])
        else:
            weights[name] = leading(tensor, expected.shape).clone()
    refuse(problems)
    model.load_state_dict(weights, strict=True, assign=True)
    return model.eval()


def leading(tensor: Tensor, shape) -> Tensor:  # the first entries in each dimension
    return tensor[tuple(slice(size) for size in shape)]


def spaced(layers: int, wanted: int) -> list[int]:
    """`wanted` of `layers` blocks, evenly spaced from the first: block i is i * layers // wanted."""
    return [i * layers // wanted for i in range(wanted)]


def chosen_layers(source, target, given: list[int] | None = None) -> list[int]:
    """The numbers of the source's blocks, from 0, that a tower's section `target` takes: `given`, or evenly spaced.
    Raises InputError for given ones of a ResNet."""
    if isinstance(target.layers, int):
        return spaced(source.layers, target.layers) if given is None else given
    if given is not None:
        raise InputError("layers_image is for transformers: of each stage of a ResNet evenly spaced blocks are taken")
    stages = zip(accumulate(source.layers, initial=0), source.layers, target.layers)
    return [start + i for start, theirs, ours in stages for i in spaced(theirs, ours)]


def block_names(model: MiniClip, kind: str) -> list[str]:  # "visual.blocks.0.", ...
    tower = getattr(model, kind)
    names = {module: name for name, module in tower.named_modules()}
    return [f"{kind}.{names[block]}." for block in tower.blocks]


def check(source: MiniClipConfig, target: MiniClipConfig, layers: dict[str, list[int]]):
    """Raises InputError, listing why a model of config `source` has no slices for one of config `target`."""
    problems, ours, theirs = [], target.to_dict(), source.to_dict()
    for sizes in (ours, theirs):
        for tower in (sizes["vision_cfg"], sizes["text_cfg"]):
            tower.setdefault("head_width", tower["width"] // tower.get("heads", 1))
            tower["MLP width"] = int(tower["width"] * tower.get("mlp_ratio", 0))
    for name, tower, kind in (("visual", "vision_cfg", "image"), ("text", "text_cfg", "text")):
        us, them = ours[tower], theirs[tower]
        for size in ("width", "MLP width"):
            if us[size] > them[size]:
                problems.append(f"the {kind} tower's {size} is {us[size]}, the source's only {them[size]}")
        for size in sorted(set(us) - SIZES):
            if us[size] != them.get(size):
                problems.append(f"the {kind} tower's {size} is {us[size]}, the source's {them.get(size)}")
        chosen, there, wanted = layers[name], them["layers"], us["layers"]
        if wanted > there if isinstance(there, int) else any(a > b for a, b in zip(wanted, there)):
            problems.append(f"the {kind} tower has {wanted} layers, the source's only {there}")
        elif isinstance(there, int) and (len(chosen) != wanted or not all(0 <= layer < there for layer in chosen)):
            problems.append(f"layers_{kind} {chosen} are no {wanted} of the source's 0 to {there - 1}")
    if target.embed_dim > source.embed_dim:
        problems.append(f"embed_dim is {target.embed_dim}, the source's only {source.embed_dim}")
    if target.quick_gelu != source.quick_gelu:
        us, them = ACTIVATION_NAMES[target.quick_gelu], ACTIVATION_NAMES[source.quick_gelu]
        problems.append(f"the activation is {us}, the source's {them} (quick_gelu)")
    refuse(problems)


def refuse(problems: list[str]):
    if problems:
        raise InputError("the source has no weights to inherit for this config: " + "; ".join(problems))
