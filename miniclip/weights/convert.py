"""Conversion of weights into the form of another library."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from miniclip.checkpoint import from_miniclip
from miniclip.config import MiniClipConfig, TextConfig, VisionConfig
from miniclip.model import MiniClip
from miniclip.towers.hf_config import RESAMPLE, read_preprocessing
from miniclip.utils.errors import CheckpointError, InputError
from miniclip.utils.files import replacing, write_json, write_manifest
from miniclip.utils.weight_files import load_state_dict, read_json
from miniclip.weights.load import (
    ACTIVATION_NAMES,
    empty_model,
    fit_weights,
    fitting_configs,
    infer_config,
    open_checkpoint,
)

WEIGHT_FILES = "model.safetensors pytorch_model.bin open_clip_model.safetensors open_clip_pytorch_model.bin".split()


def convert(source: str | Path, target: str | Path, to: str, model: str | None = None, force: bool = False) -> str:
    """Writes weights in another library's form, atomically, and returns a sentence on what it did.

    `source` is a weight file of any known layout or a folder of MiniCLIP, transformers or OpenCLIP; `to` is a key of
    EXPORTERS. The model config, which folders need for the activation, is `model` (a name or a .json file), the one in
    the folder of `source`, or the only shipped one that fits. Raises CheckpointError for weights that cannot be used or
    an unclear config, and FileExistsError if `target` exists, unless `force`.
    """
    source, target = Path(source), Path(target)
    if to not in EXPORTERS:
        raise InputError(f"cannot convert to {to!r}, only to {', '.join(EXPORTERS)}")
    if target.exists() and not force:
        raise FileExistsError(f"{target} exists already: choose another name, or add --force")
    if source.is_dir():
        source = next((source / name for name in WEIGHT_FILES if (source / name).is_file()), source)
    config, reason = named_config(source.parent, model)
    checkpoint = open_checkpoint(source, config and empty_model(config))
    if config is None:
        config, reason = guess_config(checkpoint.weights, checkpoint.quick_gelu, source.parent)
    if config is None and to != "openclip":  # whose files do not contain the config
        raise CheckpointError(f"{source}: {reason}: name one with --model")
    name = "" if config is None else f", {ACTIVATION_NAMES[config.quick_gelu]}"
    sizes = config or MiniClipConfig.from_dict(infer_config(checkpoint.weights))
    if "logit_bias" in checkpoint.weights:  # trained with SigLIP's loss
        sizes.init_logit_bias = checkpoint.weights["logit_bias"].item()
    network = empty_model(sizes)
    weights = fit_weights(checkpoint.weights, network.state_dict(), source)
    if config and checkpoint.quick_gelu not in (None, config.quick_gelu):
        trained = f"{source} was trained with {ACTIVATION_NAMES[checkpoint.quick_gelu]} ({checkpoint.evidence})"
        warnings.warn(f"{trained}, the config says {ACTIVATION_NAMES[config.quick_gelu]}", stacklevel=2)
    if len({t.dtype for t in weights.values() if t.is_floating_point()}) > 1:  # OpenAI's; others have one precision
        weights = {key: t.float() if t.is_floating_point() else t for key, t in weights.items()}
    load_state_dict(network, weights, source)
    if (source.parent / "tokenizer").is_dir():
        network.text.load_files(source.parent)
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target) as scratch:
        EXPORTERS[to](scratch, network)
        if target.exists() and target.is_dir() != scratch.is_dir():
            kinds = ["a folder" if path.is_dir() else "a file" for path in (target, scratch)]
            raise FileExistsError(f"{target} exists already, and is {kinds[0]}, not {kinds[1]}: choose another name")
    return f"{source} ({checkpoint.source} layout{name}) -> {target} ({to}); {reason}"


def named_config(folder: Path, name: str | None) -> tuple[MiniClipConfig | None, str]:
    """The config with a name or in a folder of MiniCLIP or OpenCLIP, if there is one, and where it comes from."""
    if name:
        return MiniClipConfig.from_name(name), f"config {name}, as asked"
    values = read_json(folder / "config.json")
    if "vision_cfg" not in values and (theirs := read_json(folder / "open_clip_config.json")):
        images = {k: v for k, v in theirs.get("preprocess_cfg", {}).items() if k != "size"}  # the model's image size
        values = theirs["model_cfg"] | {"preprocess_cfg": images}
    if "vision_cfg" not in values:
        return None, ""
    return MiniClipConfig.from_dict(values, f"the config in {folder}"), f"config of {folder}"


def guess_config(weights: dict, quick_gelu: bool | None, folder: Path) -> tuple[MiniClipConfig | None, str]:
    """The config that fits the weights and the reason; None and what is in doubt, if there is not exactly one."""
    config, sizes = read_json(folder / "config.json"), infer_config(weights)
    if config.get("model_type") == "clip":  # transformers omits its defaults
        vision, text = config.get("vision_config", {}), config.get("text_config", {})
        activations = {tower.get("hidden_act", "quick_gelu") for tower in (vision, text)}
        if activations not in ({"gelu"}, {"quick_gelu"}):
            raise CheckpointError(f"{folder}: hidden_act is {activations}; only gelu and quick_gelu can be converted")
        sizes["quick_gelu"] = activations == {"quick_gelu"}
        sizes["vision_cfg"]["head_width"] = sizes["vision_cfg"]["width"] // vision.get("num_attention_heads", 12)
        sizes["text_cfg"]["heads"] = text.get("num_attention_heads", 8)
        if (file := folder / "preprocessor_config.json").is_file():
            sizes["preprocess_cfg"] = read_preprocessing(file, "CLIPImageProcessor")
            del sizes["preprocess_cfg"]["size"]  # the model's image size
        return MiniClipConfig.from_dict(sizes, f"the config in {folder}"), f"config of {folder}"
    fitting = fitting_configs(weights, quick_gelu)
    if len(fitting) == 1:
        return MiniClipConfig.from_name(fitting[0]), f"config {fitting[0]}, the only one shipped that fits"
    sizes = json.dumps(sizes)
    return None, f"it fits {' and '.join(fitting)}" if fitting else f"no shipped config has its sizes, {sizes}"


def write_openclip(path: Path, model: MiniClip):
    """A .safetensors or .pt file for OpenCLIP, of CLIP or, with another text tower, of CustomTextCLIP."""
    if path.suffix not in (".safetensors", ".pt"):
        raise CheckpointError("OpenCLIP reads single files: end the name of the target in .safetensors or .pt")
    layout = "openclip" if isinstance(model.config.text_cfg, TextConfig) else "custom_text"
    weights = from_miniclip(model.state_dict(), layout, (model.visual.key_rows(), model.text.key_rows()))
    save_file(weights, path, {"format": "pt"}) if path.suffix == ".safetensors" else torch.save(weights, path)


def write_hf(path: Path, model: MiniClip):
    """A folder for transformers' CLIPModel and CLIPImageProcessor."""
    config, precision = model.config, str(model.logit_scale.dtype).removeprefix("torch.")
    if not (isinstance(config.vision_cfg, VisionConfig) and isinstance(config.text_cfg, TextConfig)):
        raise CheckpointError("transformers' CLIPModel has no other towers than CLIP's own: convert to another form")
    files = {"config": hf_config(config) | {"dtype": precision}, "preprocessor_config": hf_preprocessor(config)}
    path.mkdir()
    for name, values in files.items():
        write_json(path / f"{name}.json", values)
    save_file(from_miniclip(model.state_dict(), "hf"), path / "model.safetensors", {"format": "pt"})
    write_manifest(path)


EXPORTERS: dict[str, Callable[[Path, MiniClip], None]] = {  # each writes a new file or folder
    "openclip": write_openclip, "hf": write_hf, "miniclip": lambda path, model: model.save_pretrained(path),
}  # fmt: skip


def hf_config(config: MiniClipConfig) -> dict:
    """The config of the transformers CLIPModel that computes the same."""
    vision, text = config.vision_cfg, config.text_cfg
    # transformers reads a text out at the first eos_token_id, MiniCLIP at the highest id: in CLIP's vocabulary both are
    # the last one. (2, in its older configs, was a mistake, which it still reads as "the highest".)
    ids = {"bos_token_id": text.vocab_size - 2, "eos_token_id": text.vocab_size - 1, "pad_token_id": 0}

    def tower(cfg, heads: int) -> dict:
        return {
            "hidden_size": cfg.width, "intermediate_size": int(cfg.width * cfg.mlp_ratio),
            "num_hidden_layers": cfg.layers, "num_attention_heads": heads, "projection_dim": config.embed_dim,
            "hidden_act": "quick_gelu" if config.quick_gelu else "gelu",
        }  # fmt: skip

    images = {"image_size": vision.image_size, "patch_size": vision.patch_size}
    texts = {"vocab_size": text.vocab_size, "max_position_embeddings": text.context_length} | ids
    return {
        "architectures": ["CLIPModel"], "model_type": "clip", "projection_dim": config.embed_dim,
        "vision_config": tower(vision, vision.width // vision.head_width) | images,
        "text_config": tower(text, text.heads) | texts,
    }  # fmt: skip


def hf_preprocessor(config: MiniClipConfig) -> dict:
    """The settings of the transformers CLIPImageProcessor that prepares images alike."""
    images = config.preprocess_cfg
    square = {"height": images.size, "width": images.size}
    sizes = {"shortest": {"shortest_edge": int(images.size / images.crop_pct + 1e-6)}, "squash": square}  # cannot pad
    if images.resize_mode not in sizes:
        raise CheckpointError(f"transformers cannot prepare images by resize_mode {images.resize_mode!r}")
    return {
        "image_processor_type": "CLIPImageProcessor", "image_mean": images.mean, "image_std": images.std,
        "size": sizes[images.resize_mode], "crop_size": square, "do_center_crop": images.resize_mode == "shortest",
        "resample": next(number for number, name in RESAMPLE.items() if name == images.interpolation),
    }  # fmt: skip
