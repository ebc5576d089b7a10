"""TODO docstring."""

import math
import re
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miniclip.checkpoint import (
    to_miniclip,
)
from miniclip.model import MiniClip
from miniclip.utils.errors import CheckpointError
from miniclip.utils.weight_files import read_checkpoint, shorten
from miniclip.weights.identify import ACTIVATION_NAMES, fitting_configs, infer_config, known_activation


class Checkpoint(NamedTuple):
    """What a weight file turned out to hold."""

    weights: dict[str, Tensor]  # under MiniCLIP's names
    source: str  # the layout that they came in
    quick_gelu: bool | None  # the activation that they were trained with; None where nothing tells
    evidence: str  # what tells


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Reads a weight file of any known layout. Raises CheckpointError as `read_state_dict` and `to_miniclip` do, and
    for numbers that are not finite and patches that form no square."""
    state_dict, run = read_checkpoint(path)
    try:
        weights, source = to_miniclip(state_dict)
    except (CheckpointError, RuntimeError) as error:  # torch's, for q, k and v that do not go together
        raise CheckpointError(f"{path}: {error}") from None
    if odd := [key for key, t in weights.items() if t.ndim != dimensions(key) or not t.numel()]:
        shapes = shorten(f"{key} {tuple(weights[key].shape)}" for key in odd)
        raise CheckpointError(f"{path}: these have shapes that no CLIP model has: {shapes}")
    if broken := [key for key, t in weights.items() if not (t.is_floating_point() and t.isfinite().all())]:
        raise CheckpointError(f"{path}: integers, infinite or undefined numbers in {shorten(broken)}")
    patches = len(weights["visual.positional_embedding"]) - 1
    if patches < 1 or math.isqrt(patches) ** 2 != patches:
        raise CheckpointError(f"{path}: {patches + 1} image positions are no class token and square grid of patches")
    return Checkpoint(weights, source, *known_activation(Path(path), state_dict, run))


def dimensions(key: str) -> int:
    """How many dimensions a tensor has, by MiniCLIP's name of it."""
    if key in ("logit_scale", "logit_bias", "visual.conv1.weight"):
        return 4 if key.startswith("visual") else 0
    return 1 if re.search(r"bias$|class_embedding$|\.ln_\w+\.weight$", key) else 2


def load_weights(model: MiniClip, path: str | Path) -> None:
    """Loads a weight file of any known layout into a model, strictly; half precision becomes the model's own.

    Warns when it interpolates position embeddings that are for another image size or context length, and when the
    weights are known to be for the other activation. Raises CheckpointError as `open_checkpoint` does and for weights
    of other sizes, naming them and the configs that they would fit.
    """
    checkpoint = open_checkpoint(path)
    if "logit_bias" in checkpoint.weights and model.logit_bias is None:  # trained by SigLIP's loss
        model.config.init_logit_bias = checkpoint.weights["logit_bias"].item()
        model.logit_bias = nn.Parameter(torch.zeros_like(model.logit_scale))
    model.load_state_dict(fit_weights(checkpoint.weights, model.state_dict(), path), strict=True)
    ours, quick_gelu = model.config.quick_gelu, checkpoint.quick_gelu
    if quick_gelu is not None and quick_gelu != ours:
        fix = " or ".join(fitting_configs(checkpoint.weights, quick_gelu)) or "one that differs in quick_gelu only"
        warnings.warn(
            f"{path} was trained with {ACTIVATION_NAMES[quick_gelu]} ({checkpoint.evidence}) and the model computes "
            f"{ACTIVATION_NAMES[ours]}: it will be worse than it could be. Use another config: {fix}",
            stacklevel=2,
        )


def fit_weights(weights: dict[str, Tensor], expected: dict[str, Tensor], path: str | Path) -> dict[str, Tensor]:
    """Compares weights with a model's state dict, key by key and shape by shape, after resizing the positions."""
    fitted, resized = dict(weights), []
    for key in ("visual.positional_embedding", "text.positional_embedding"):
        old, length = weights[key], len(expected[key])
        if len(old) != length and old.shape[1:] == expected[key].shape[1:]:
            fitted[key] = resize_positions(old, length, key.startswith("visual"))
            resized.append(f"{path}: {key} was interpolated from {len(old)} to {length} positions; fine-tune the model")
    shapes = [{key: tuple(t.shape) for key, t in tensors.items()} for tensors in (fitted, expected)]
    pairs = {key: [shape.get(key, "missing") for shape in shapes] for key in expected | fitted}
    if problems := [f"{key} is {a} in the file and {b} in the model" for key, (a, b) in pairs.items() if a != b]:
        fix = " or ".join(fitting_configs(weights)) or f"none that ships, but one with {infer_config(weights)}"
        raise CheckpointError(f"{path} does not fit the model: {shorten(problems)}. The config that fits: {fix}")
    for note in resized:
        warnings.warn(note, stacklevel=3)
    return fitted


def resize_positions(old: Tensor, length: int, is_grid: bool) -> Tensor:
    """(L, W) to (length, W), as OpenCLIP resizes: a grid of patches behind a class token, or a line of tokens."""
    if not is_grid:
        return F.interpolate(old.float().T[None], length, mode="linear", align_corners=False)[0].T
    side, new = math.isqrt(len(old) - 1), math.isqrt(length - 1)
    grid = old[1:].float().T.reshape(1, -1, side, side)
    grid = F.interpolate(grid, (new, new), mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([old[:1].float(), grid.flatten(2)[0].T])
