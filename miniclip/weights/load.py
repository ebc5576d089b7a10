"""Loading weight files of any known layout, and the configs they fit. Shapes tell the sizes, but not the activation."""

import math
import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miniclip.checkpoint import to_miniclip
from miniclip.config import MiniClipConfig, TextConfig, VisionConfig, list_models
from miniclip.model import MiniClip, TextTransformer, VisionTransformer
from miniclip.towers.registry import SIZED_BY_FILE, TOKENIZER_BESIDE, told_by_weights
from miniclip.utils.errors import CheckpointError, shorten
from miniclip.utils.weight_files import find_weights, read_checkpoint, read_json

# The activation of well-known weights, by a word in their names (OpenCLIP's list of pretrained models; TinyCLIP's code)
ACTIVATIONS = {
    "quickgelu": True, "openai": True, "metaclip": True, "dfn": True,
    "tinyclip": False, "laion2b": False, "datacomp": False, "commonpool": False,
}  # fmt: skip
ACTIVATION_NAMES = {True: "QuickGELU", False: "GELU"}
CLIP_KEYS = {"visual.conv1.weight", "text.blocks.0.ln_1.bias"}  # of both of them, and of ResNets


class Checkpoint(NamedTuple):
    """The content of a weight file."""

    weights: dict[str, Tensor]  # under MiniCLIP's names
    source: str  # the layout that they came in
    quick_gelu: bool | None  # the activation that they were trained with; None if unknown
    evidence: str  # how that is known


def empty_model(config: MiniClipConfig) -> MiniClip:
    """A model of shapes alone, without values."""
    with torch.device("meta"):
        return MiniClip(config)


def load_weights(model: MiniClip, path: str | Path) -> None:
    """Loads a weight file of any known layout into a model, strictly; half precision becomes the model's own.

    Warns when it interpolates position embeddings, and when the weights are known to be for the other activation.
    `path` may be a folder with such a file or with its shards. Raises CheckpointError as `open_checkpoint` does, for a
    path that does not exist, and for other sizes, naming the configs that fit."""
    fill(model, open_checkpoint(path := find_weights(path), model), path)


def fill(model: MiniClip, checkpoint: Checkpoint, path: Path, check_activation: bool = True):
    """Makes opened weights a model's; `path` is what messages call them. Warns and raises as `load_weights` does."""
    if "logit_bias" in checkpoint.weights and model.logit_bias is None:  # trained with SigLIP's loss
        model.config.init_logit_bias = checkpoint.weights["logit_bias"].item()
        model.logit_bias = nn.Parameter(torch.zeros_like(model.logit_scale))
    model.load_state_dict(fit_weights(checkpoint.weights, model.state_dict(), path), strict=True)
    read_tokenizer_beside(model, Path(path))
    ours, quick_gelu = model.config.quick_gelu, checkpoint.quick_gelu
    own = any(type(tower) in (VisionTransformer, TextTransformer) for tower in (model.visual, model.text))
    if check_activation and own and quick_gelu not in (None, ours):
        fix = " or ".join(fitting_configs(checkpoint.weights, quick_gelu)) or "one that differs in quick_gelu only"
        trained = f"{path} was trained with {ACTIVATION_NAMES[quick_gelu]} ({checkpoint.evidence})"
        problem = f"the model computes {ACTIVATION_NAMES[ours]}: it will be worse than it could be"
        warnings.warn(f"{trained} and {problem}. Use another config: {fix}", stacklevel=3)


def read_tokenizer_beside(model: MiniClip, weights: Path):
    """Lets a text tower take the tokenizer in the folder of its weights, if one is there and none was read before."""
    names, folder = TOKENIZER_BESIDE.get(type(model.config.text_cfg), ()), weights.parent
    if any((folder / name).is_file() for name in names) and "tokenizer" not in vars(model.text):
        model.text.tokenizer = model.text.read_tokenizer(folder)


def open_checkpoint(path: str | Path, model: MiniClip | None = None) -> Checkpoint:
    """Reads a weight file of a model with the towers of `model` (by default CLIP's, or what names tell) in any size.
    Raises CheckpointError as `read_state_dict` and `to_miniclip` do, and for pruned blocks, odd shapes, NaN and
    infinity. Pruned towers of `model` get the sizes of the file."""
    state_dict, run = read_checkpoint(path)
    start = next((key for key in state_dict if key.endswith(".logit_scale")), "").removesuffix("logit_scale")
    if start and all(key.startswith(start) for key in state_dict):  # of a module around the model: Lightning's "model."
        state_dict = {key.removeprefix(start): tensor for key, tensor in state_dict.items()}
    try:
        if model is None:  # a block is enough: all are named alike
            sections = {"vision_cfg": told_by_weights(state_dict) or {"layers": 1}, "text_cfg": {"layers": 1}}
            model = empty_model(MiniClipConfig.from_dict(sections, "the config told by its names"))
        for section in {type(model.config.vision_cfg), type(model.config.text_cfg)} & SIZED_BY_FILE.keys():
            state_dict = SIZED_BY_FILE[section](model, state_dict)
        weights, source = to_miniclip(state_dict, (model.visual.key_rows(), model.text.key_rows()))
    except (CheckpointError, RuntimeError) as error:  # torch's, for q, k and v that do not go together
        raise CheckpointError(f"{path}: {error}") from None
    shapes = {}
    towers = {"visual.blocks.": model.visual, "text.blocks.": model.text}
    alike = tuple(start for start, tower in towers.items() if any("{b}" in row[0] for row in tower.key_rows()))
    for key, tensor in ((key, tensor) for key, tensor in weights.items() if key.startswith(alike)):
        first, shape = shapes.setdefault(first_block(key), (key, tuple(tensor.shape)))
        if tuple(tensor.shape) != shape:
            sizes = f"{first} is {shape}, {key} is {tuple(tensor.shape)}"
            problem = f"{path}: its blocks differ in size, as in TinyCLIP's pruned 'auto' files: {sizes}"
            raise CheckpointError(f"{problem}. Name such a config, as TinyCLIP-auto-ViT-45M-32-Text-18M")
    expected = {"logit_bias": model.logit_scale} | {first_block(key): t for key, t in model.state_dict().items()}
    pairs = {key: (t, expected.get(first_block(key), t)) for key, t in weights.items()}
    if odd := [f"{key} {tuple(t.shape)}" for key, (t, like) in pairs.items() if t.ndim != like.ndim or not t.numel()]:
        raise CheckpointError(f"{path}: these have shapes that no CLIP model has: {shorten(odd)}")
    integers = {key for key, (t, like) in pairs.items() if t.is_floating_point() != like.is_floating_point()}
    if broken := [key for key, t in weights.items() if key in integers or not t.isfinite().all()]:
        raise CheckpointError(f"{path}: integers, infinite or undefined numbers in {shorten(broken)}")
    if type(model.visual) is VisionTransformer:
        positions = len(weights["visual.positional_embedding"])
        if positions < 2 or math.isqrt(positions - 1) ** 2 != positions - 1:
            raise CheckpointError(f"{path}: {positions} image positions are no class token and square grid of patches")
    return Checkpoint(weights, source, *known_activation(Path(path), state_dict, run))


def first_block(key: str) -> str:  # the same tensor in a tower's first block
    return re.sub(r"\.blocks\.\d+\.", ".blocks.0.", key)


def fit_weights(weights: dict[str, Tensor], expected: dict[str, Tensor], path: str | Path) -> dict[str, Tensor]:
    """The weights, positions resized, if they have the keys and shapes of a model's state dict."""
    fitted, resized = dict(weights), []
    for key in (key for key in expected if key.endswith("positional_embedding") and key in weights):
        old, length = weights[key], len(expected[key])
        if len(old) != length and old.shape[1:] == expected[key].shape[1:]:
            fitted[key] = resize_positions(old, length, key.startswith("visual"))
            resized.append(f"{path}: {key} was interpolated from {len(old)} to {length} positions; fine-tune the model")
    shapes = [{key: tuple(t.shape) for key, t in tensors.items()} for tensors in (fitted, expected)]
    pairs = {key: [shape.get(key, "missing") for shape in shapes] for key in expected | fitted}
    if problems := [f"{key} is {a} in the file and {b} in the model" for key, (a, b) in pairs.items() if a != b]:
        fix = " or ".join(fitting_configs(weights)) if is_clips(weights) else "the one it was made with"
        fix = fix or f"none that ships, but one with {infer_config(weights)}"
        raise CheckpointError(f"{path} does not fit the model: {shorten(problems)}. The config that fits: {fix}")
    for note in resized:
        warnings.warn(note, stacklevel=3)
    return fitted


def resize_positions(old: Tensor, length: int, is_grid: bool) -> Tensor:
    """(L, W) to (length, W) as OpenCLIP: a grid of patches, behind a class token unless square, or a line of tokens."""
    if not is_grid:
        return F.interpolate(old.float().T[None], length, mode="linear", align_corners=False)[0].T
    first = math.isqrt(len(old)) ** 2 != len(old)  # of the patches
    side, new = math.isqrt(len(old) - first), math.isqrt(length - first)
    grid = old[first:].float().T.reshape(1, -1, side, side)
    grid = F.interpolate(grid, (new, new), mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([old[:first].float(), grid.flatten(2)[0].T])


def known_activation(path: Path, keys: Iterable[str], run: str = "") -> tuple[bool | None, str]:
    """Whether weights were trained with QuickGELU, None if unknown, and how that is known: shapes do not tell."""
    if any(key.endswith("input_resolution") for key in keys):
        return True, "input_resolution is a key of OpenAI's archives"
    for file in (path.with_name("config.json"), path.with_name("open_clip_config.json")):
        config = read_json(file)
        if "vision_cfg" in config or "model_cfg" in config:  # MiniCLIP's or OpenCLIP's
            ours = config.get("model_cfg", config)
            return isinstance(ours, dict) and ours.get("quick_gelu") is True, f"{file} says so"
        if config.get("model_type") == "clip":  # transformers', which omits its defaults
            vision = config.get("vision_config")
            theirs = vision.get("hidden_act", "quick_gelu") if isinstance(vision, dict) else "quick_gelu"
            return theirs == "quick_gelu", f"{file} says so"
    for name in (path.name, run):
        for word, quick_gelu in ACTIVATIONS.items():
            if word in name.lower():
                return quick_gelu, f"{word!r} in the name {name}"
    return None, "no sign of it"


def is_clips(weights: dict[str, Tensor]) -> bool:
    """Whether weights are of CLIP's text tower and a ViT or ResNet, and not CoCa's, whose texts have a class token."""
    return CLIP_KEYS <= weights.keys() and "text.cls_emb" not in weights


def infer_config(weights: dict[str, Tensor]) -> dict:
    """A model config from the shapes of weights (under MiniCLIP's names), without the activation. Heads are assumed to
    have 64 channels, or there is one if the width is not a multiple of 64."""
    told, sections = told_by_weights(weights), []
    for tower in ("text",) if told else ("visual", "text"):
        hidden, width = weights[f"{tower}.blocks.0.mlp.c_fc.weight"].shape
        layers = sum(re.fullmatch(tower + r"\.blocks\.\d+\.ln_1\.bias", key) is not None for key in weights)
        ratio = hidden / width if int(width * (hidden / width)) == hidden else math.nextafter(hidden / width, math.inf)
        sections.append({"layers": layers, "width": width, "mlp_ratio": ratio})
    vision, text = (told or sections[0]), sections[-1]
    if not told:
        patch, positions = weights["visual.conv1.weight"].shape[-1], len(weights["visual.positional_embedding"])
        vision |= {"image_size": math.isqrt(positions - 1) * patch, "patch_size": patch}
        vision |= {"head_width": vision["width"]} if vision["width"] % 64 else {}
    text |= {"heads": 1 if text["width"] % 64 else text["width"] // 64}
    text["context_length"] = len(weights["text.positional_embedding"])
    text["vocab_size"] = len(weights["text.token_embedding.weight"])
    return {"embed_dim": len(weights["text.text_projection.weight"]), "vision_cfg": vision, "text_cfg": text}


def fitting_configs(weights: dict[str, Tensor], quick_gelu: bool | None = None) -> list[str]:
    """Names of the shipped configs with the sizes of these weights, and with that activation unless it is None."""
    if not is_clips(weights):
        return []
    sizes, found = infer_config(weights), []
    sizes["vision_cfg"].pop("head_width", None)
    del sizes["text_cfg"]["heads"]  # both are guesses
    told = told_by_weights(weights) is not None
    for name in list_models():
        config = MiniClipConfig.from_name(name)
        if type(config.text_cfg) is not TextConfig or (type(config.vision_cfg) is VisionConfig) == told:
            continue  # towers of another kind may have these sizes too
        config = config.to_dict()
        alike = all(sizes[tower].items() <= config[tower].items() for tower in ("vision_cfg", "text_cfg"))
        if alike and config["embed_dim"] == sizes["embed_dim"] and quick_gelu in (None, config["quick_gelu"]):
            found.append(name)
    return found
