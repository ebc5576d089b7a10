"""Registration of a new kind of tower, and functions that several kinds share."""

import copy
import pkgutil
import re
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Module

from miniclip.config import SECTIONS, TextConfig, VisionConfig
from miniclip.model import TOWERS, Tower
from miniclip.utils.errors import CheckpointError, InputError

IN_OPENCLIP = {VisionConfig, TextConfig}  # sections that OpenCLIP builds a tower from as they are
NOT_IN_OPENCLIP: dict[type, str] = {}  # those whose weights no tower of OpenCLIP can hold, and why
CUSTOM_TEXT: set[type] = set()  # text sections whose weights OpenCLIP names behind "text."
CAPTIONERS: set[type] = set()  # models whose `generate` writes captions


def register_tower(base: type, tells: Callable[[dict], bool], section: type, tower: type[Tower]):
    """Builds `tower` where `tells(values)` is true of the values of a model config's `base` section (VisionConfig or
    TextConfig), which are read as the dataclass `section`. tests/towers/test_toy_tower.py is an example."""
    SECTIONS.append((base, tells, section))
    TOWERS[section] = tower


def check_images(pixel_values: Tensor, side: int):
    """Raises InputError for images of another size than (B, 3, side, side)."""
    if pixel_values.shape[1:] != (3, side, side):
        raise InputError(f"images are {tuple(pixel_values.shape)}, not (B, 3, {side}, {side})")


def trimmed(input_ids: Tensor, pad: int) -> Tensor:
    """Token ids (B, L) up to the last word of the longest caption, on a CPU. Elsewhere a new size costs more than
    padding, and a trace keeps its sizes."""
    used = (input_ids != pad).any(dim=0)
    traced = torch.compiler.is_compiling() or torch.compiler.is_exporting() or torch.jit.is_tracing()
    return input_ids if traced or not input_ids.is_cpu or not used.any() else input_ids[:, : used.nonzero().max() + 1]


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None, is_causal=False) -> Tensor:
    """Attention of (B, L, W) to (B, K, W) in several heads; a mask (L, K) or (B, 1, L, K) is true where one sees."""
    q, k, v = (t.unflatten(2, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal).transpose(1, 2).flatten(2)


def altered(module: Module, modules: dict[str, Module], **attributes) -> Module:
    """A copy with the same weights, but with these modules and attributes in place of its own."""
    twin = copy.copy(module)
    twin._modules = module._modules | modules
    vars(twin).update(attributes)
    return twin


def openclip_rows(tower: Tower) -> list[tuple[str, str, str]]:
    """The `key_rows` of a tower like those of CLIP, but with other parts or without some: a row for each weight."""

    def theirs(name: str) -> str:
        name = re.sub(r"^(proj|text_projection)\.weight$", r"\1 | transpose", name)
        return name.replace("blocks.", "transformer.resblocks.").replace("attn.in_proj.", "attn.in_proj_")

    return [("{t}" + name, "{t}" + theirs(name), "{t}" + name) for name in tower.state_dict()]


# Sections whose sizes only a weight file says: functions (model, state dict) that give them to the model, and return
# the state dict without what is not a weight.
SIZED_BY_FILE: dict[type, Callable[[Module, dict[str, Tensor]], dict[str, Tensor]]] = {}
# Text sections whose tokenizer may lie beside the weights: the files of which one has to be there.
TOKENIZER_BESIDE: dict[type, tuple[str, ...]] = {}


def told_by_weights(weights: dict[str, Tensor]) -> dict | None:
    """The section of a model config for an image tower other than CLIP's own, from the names and shapes of weights in
    any layout; None for others. Raises CheckpointError for a tower that lacks some."""
    names = {name: name.rpartition("visual.")[2].replace("module.", "") for name in weights if "visual." in name}
    visual = {theirs: weights[name] for name, theirs in names.items()}
    if "layer1.0.conv1.weight" not in visual:  # a ResNet's, as OpenCLIP names it
        return None
    try:
        return pkgutil.resolve_name("miniclip.towers.resnet:from_weights")(visual)
    except KeyError as error:
        raise CheckpointError(f"the image tower has no {error}") from None
