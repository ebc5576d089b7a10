"""Interpolation between the weights of two models."""

import torch
from torch import Tensor

from miniclip.config import MiniClipConfig
from miniclip.utils.errors import InputError


def interpolate(before: dict[str, Tensor], after: dict[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """(1 - alpha) before + alpha after, for two state dicts with the same names, shapes and types. Bit-equal to one of
    them at alpha 0 and 1, and to both where they are equal. Raises InputError if names, shapes or types differ."""
    kinds = [{name: (tuple(t.shape), t.dtype) for name, t in weights.items()} for weights in (before, after)]
    for name in kinds[0] | kinds[1]:
        a, b = (kind.get(name) for kind in kinds)
        if a != b:
            raise InputError(f"{name} is {a} before and {b} after: not the same model")
    mixed = {n: torch.lerp(t, after[n], alpha) for n, t in before.items() if t.is_floating_point()}
    return after | mixed  # integers count BatchNorm's batches


def check_same(before: MiniClipConfig, after: MiniClipConfig):
    """Raises InputError, naming the fields, for two models that compute differently. Dropout makes no difference."""
    flat = [dict(_flatten(config.to_dict())) for config in (before, after)]
    harmless = "patch_dropout", "token_dropout", "hf_proj_dropout", "hf_model_name"  # weights compute the same
    fields = [field for field in flat[0] | flat[1] if field.rpartition(".")[2] not in harmless]
    if differing := [field for field in fields if flat[0].get(field) != flat[1].get(field)]:
        both = [(field, flat[0].get(field), flat[1].get(field)) for field in differing]
        problems = ", ".join(f"{field} is {before} before and {after} after" for field, before, after in both)
        raise InputError(f"{problems}: only weights of the same model, before and after fine-tuning, can be mixed")


def _flatten(values: dict, prefix: str = ""):
    for name, value in values.items():
        yield from _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else [(prefix + name, value)]
