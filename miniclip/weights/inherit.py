"""Weight inheritance: a small model starts from slices of a large one.

That is a far better start than random weights (TinyCLIP's manual weight inheritance: Wu et al., ICCV 2023, arXiv
2309.12314). It takes evenly spaced blocks, in a ResNet of each stage, and of the width the first channels and the first
whole attention heads. The small model knows little until it is trained, but learns faster."""

import dataclasses
from itertools import accumulate
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from miniclip.config import MiniClipConfig, TextConfig, VisionConfig
from miniclip.model import MiniClip
from miniclip.towers.coca import CocaConfig, CocaTextConfig, CocaVisionConfig, MultimodalConfig
from miniclip.towers.resnet import ResNetConfig
from miniclip.towers.siglip import SigLipVisionConfig
from miniclip.utils.errors import InputError
from miniclip.weights.load import ACTIVATION_NAMES, empty_model, resize_positions

# Sections of towers with slices. Each inherits from those of the first class here that it belongs to.
KINDS = CocaVisionConfig, SigLipVisionConfig, ResNetConfig, VisionConfig, CocaTextConfig, TextConfig, MultimodalConfig
SIZES = {  # fields that may differ; all others are part of what weights compute
    "layers", "width", "mlp_ratio", "MLP width", "heads", "image_size", "context_length", "patch_dropout",
    "block_heads", "block_mlp_widths", "token_dropout", "attn_pooler_queries", "attn_pooler_heads", "timm_model_name",
    "token_dim", "hf_tokenizer_name",
}  # fmt: skip
NOTHING = "the source has no weights to inherit for this config"
SECTIONS = {"visual": ("vision_cfg", "image tower"), "text": ("text_cfg", "text tower")}
SECTIONS |= {"text_decoder": ("multimodal_cfg", "decoder")}  # of a CoCa


def inherit(
    source: MiniClip, config: MiniClipConfig,
    layers_image: list[int] | None = None, layers_text: list[int] | None = None,
) -> MiniClip:  # fmt: skip
    """Returns a model with the sizes of `config` and slices of the weights of `source`, in evaluation mode.

    Depth: the blocks `layers_image` and `layers_text`, from 0; by default, and in a decoder, those of `spaced`. Width,
    MLP and embedding: the first channels of each matrix, gain and bias; the first heads of queries, keys and values, so
    heads must be as wide as the source's. Positions of another number are interpolated before their channels are cut.
    Images are preprocessed as the source's weights expect. Raises InputError, listing all problems, if the source has
    no such slices: blocks it lacks, more channels, other heads or another kind of tower."""
    layers = check(source.config, config, {"visual": layers_image, "text": layers_text})
    images = dataclasses.replace(source.config.preprocess_cfg, size=config.vision_cfg.image_size)
    model = empty_model(dataclasses.replace(config, preprocess_cfg=images))
    theirs, weights, problems = source.state_dict(), {}, []
    for name in [name for name in theirs if name.endswith("in_proj_weight")]:  # named otherwise where widths differ
        theirs |= {name.replace("in_proj", f"{part}_proj"): t for part, t in zip("qkv", theirs[name].chunk(3))}
    blocks = {}  # of the small model: those they come from
    for kind, numbers in layers.items():
        for place in ("blocks", "cross_attn")[: 1 + (kind == "text_decoder")]:
            ours, big = (block_names(one, kind, place) for one in (model, source))
            blocks |= {name: big[number] for name, number in zip(ours, numbers)}
    for name, expected in model.state_dict().items():
        block = next((block for block in blocks if name.startswith(block)), "")
        there = blocks.get(block, "") + name.removeprefix(block)
        parts = stacked(theirs, there)
        if name.endswith("positional_embedding") and parts and len(parts[0]) != len(expected):
            parts = [resize_positions(parts[0], len(expected), name.startswith("visual")).to(parts[0].dtype)]
        shape = (len(expected) // len(parts), *expected.shape[1:]) if len(parts) > 1 else expected.shape
        if not parts or any(a > b for part in parts for a, b in zip(shape, part.shape)):
            has = f"has {there} {tuple(theirs.get(there, parts[0]).shape)}" if parts else f"has no {there}"
            problems.append(f"{name} is {tuple(expected.shape)}, the source {has}")
        else:
            slices = [part[tuple(map(slice, shape))] for part in parts]
            weights[name] = torch.cat(slices) if len(slices) > 1 else slices[0].clone()
    if problems:
        raise InputError(f"{NOTHING}: {'; '.join(problems)}")
    model.load_state_dict(weights, strict=True, assign=True)
    with TemporaryDirectory() as folder:  # the source's tokenizer, whose ids its word embeddings are for
        source.text.save_files(Path(folder))
        model.text.load_files(Path(folder))
    return model.eval()


def stacked(weights: dict[str, Tensor], name: str) -> list[Tensor]:
    """The matrices stacked in a tensor, of queries, keys and values, or the tensor itself; none if it is not there."""
    if name.endswith("in_proj_weight"):
        return [weights[one] for part in "qkv" if (one := name.replace("in_proj", f"{part}_proj")) in weights]
    number = 3 if "in_proj" in name else 2 if ".kv." in name else 1
    return [] if name not in weights else [weights[name]] if number == 1 else list(weights[name].chunk(number))


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


def block_names(model: MiniClip, kind: str, attribute: str) -> list[str]:  # "visual.blocks.0.", ...
    tower = getattr(model, kind)
    names = {module: name for name, module in tower.named_modules()}
    return [f"{kind}.{names[block]}." for block in getattr(tower, attribute)]


def sizes(section, other, embed_dim: int) -> dict:
    """The fields of a section, with those that only `other` has at their defaults, and sizes that follow from them."""
    values = dataclasses.asdict(section)
    values.setdefault("head_width", values["width"] // values.get("heads", 1))
    values["MLP width"] = int(values["width"] * values.get("mlp_ratio", 0))
    values["own tokenizer"] = bool(values.get("hf_tokenizer_name"))
    if isinstance(section, CocaVisionConfig):
        values["pooler's head width"] = embed_dim // section.attn_pooler_heads
    return {field.name: field.default for field in dataclasses.fields(other)} | values


def check(source: MiniClipConfig, target: MiniClipConfig, given: dict[str, list[int] | None]) -> dict[str, list[int]]:
    """The blocks of `chosen_layers`. Raises InputError, listing why `source` has no slices for `target`."""
    problems, layers = [], {}
    for name, (section, kind) in list(SECTIONS.items())[: 2 + isinstance(target, CocaConfig)]:
        ours, theirs = getattr(target, section), getattr(source, section, None)
        first, second = (next((one for one in KINDS if isinstance(cfg, one)), None) for cfg in (ours, theirs))
        if first is None or first is not second:
            us, them = type(ours).__name__, type(theirs).__name__
            raise InputError(f"the {kind}, {us}, cannot inherit from {them}: docs/finetuning.md says which towers can")
        us, them = sizes(ours, theirs, target.embed_dim), sizes(theirs, ours, source.embed_dim)
        for size in ("width", "MLP width"):
            if us[size] > them[size]:
                problems.append(f"the {kind}'s {size} is {us[size]}, the source's only {them[size]}")
        for size in sorted({*us, *them} - SIZES):
            if us[size] != them[size]:
                problems.append(f"the {kind}'s {size} is {us[size]}, the source's {them[size]}")
        chosen = layers[name] = chosen_layers(theirs, ours, given.get(name))
        there, wanted = them["layers"], us["layers"]
        if wanted > there if isinstance(there, int) else any(a > b for a, b in zip(wanted, there)):
            problems.append(f"the {kind} has {wanted} layers, the source's only {there}")
        elif isinstance(there, int) and (len(chosen) != wanted or not all(0 <= layer < there for layer in chosen)):
            problems.append(f"layers_{kind.split()[0]} {chosen} are no {wanted} of the source's 0 to {there - 1}")
    if target.embed_dim > source.embed_dim:
        problems.append(f"embed_dim is {target.embed_dim}, the source's only {source.embed_dim}")
    if target.quick_gelu != source.quick_gelu:
        us, them = ACTIVATION_NAMES[target.quick_gelu], ACTIVATION_NAMES[source.quick_gelu]
        problems.append(f"the activation is {us}, the source's {them} (quick_gelu)")
    if problems:
        raise InputError(f"{NOTHING}: {'; '.join(problems)}")
    return layers
