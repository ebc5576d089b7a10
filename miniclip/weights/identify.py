"""Which model is a weight file for? The sizes follow from the shapes; the activation has to be known from elsewhere."""

import math
import re
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from miniclip.config import MiniClipConfig, list_models
from miniclip.utils.weight_files import read_json

# The activation of well-known weights, by a word in their names (OpenCLIP's list of pretrained models; TinyCLIP's code)
ACTIVATIONS = {
    "quickgelu": True, "openai": True, "metaclip": True, "dfn": True,
    "tinyclip": False, "laion2b": False, "datacomp": False, "commonpool": False,
}  # fmt: skip
ACTIVATION_NAMES = {True: "QuickGELU", False: "GELU"}


def known_activation(path: Path, keys: Iterable[str], run: str = "") -> tuple[bool | None, str]:
    """Tells whether weights were trained with QuickGELU, or None, and from what: shapes cannot tell it."""
    if any(key.endswith("input_resolution") for key in keys):
        return True, "input_resolution is a key of OpenAI's archives"
    for file in (path.with_name("config.json"), path.with_name("open_clip_config.json")):
        config = read_json(file)
        if "vision_cfg" in config or "model_cfg" in config:  # MiniCLIP's or OpenCLIP's
            return config.get("model_cfg", config).get("quick_gelu", False), f"{file} says so"
        if config.get("model_type") == "clip":  # transformers', which leaves out what is its default
            return config.get("vision_config", {}).get("hidden_act", "quick_gelu") == "quick_gelu", f"{file} says so"
    for name in (path.name, run):
        for word, quick_gelu in ACTIVATIONS.items():
            if word in name.lower():
                return quick_gelu, f"{word!r} in the name {name}"
    return None, "nothing tells"


def infer_config(weights: dict[str, Tensor]) -> dict:
    """The sizes of a model from the shapes of its weights (under MiniCLIP's names), in the form of a model config.

    Shapes do not tell the activation, which is left out, nor the heads, which are taken to be 64 channels wide.
    """
    sections = {}
    for tower in ("visual", "text"):
        hidden, width = weights[f"{tower}.blocks.0.mlp.c_fc.weight"].shape
        layers = sum(re.fullmatch(tower + r"\.blocks\.\d+\.ln_1\.bias", key) is not None for key in weights)
        sections[tower] = {"layers": layers, "width": width, "mlp_ratio": hidden / width}
    lengths = {name: len(tensor) for name, tensor in weights.items() if tensor.ndim}
    patch, grid = weights["visual.conv1.weight"].shape[-1], math.isqrt(lengths["visual.positional_embedding"] - 1)
    vision = {"image_size": grid * patch, "patch_size": patch} | sections["visual"]
    text = {
        "context_length": lengths["text.positional_embedding"],
        "vocab_size": lengths["text.token_embedding.weight"],
    }
    text |= {"heads": max(1, sections["text"]["width"] // 64)} | sections["text"]
    return {"embed_dim": lengths["visual.proj.weight"], "vision_cfg": vision, "text_cfg": text}


def fitting_configs(weights: dict[str, Tensor], quick_gelu: bool | None = None) -> list[str]:
    """Names of the shipped configs with the sizes of these weights, and with that activation unless it is None."""
    sizes = infer_config(weights)
    embed_dim, vision, text = sizes["embed_dim"], sizes["vision_cfg"], sizes["text_cfg"]
    del text["heads"]  # a guess
    known = {name: MiniClipConfig.from_name(name).to_dict() for name in list_models()}
    return [
        name for name, config in known.items()
        if quick_gelu in (None, config["quick_gelu"]) and embed_dim == config["embed_dim"]
        and vision.items() <= config["vision_cfg"].items() and text.items() <= config["text_cfg"].items()
    ]  # fmt: skip
