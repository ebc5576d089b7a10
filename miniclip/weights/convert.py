"""Conversion of weights into the form of another library."""

import dataclasses
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from miniclip.checkpoint import from_miniclip
from miniclip.config import MiniClipConfig, PreprocessConfig, TextConfig, VisionConfig
from miniclip.model import MiniClip
from miniclip.towers.hf_config import RESAMPLE
from miniclip.utils.errors import CheckpointError, InputError
from miniclip.utils.files import replacing, write_json, write_manifest
from miniclip.utils.model_folder import load_state_dict
from miniclip.utils.weight_files import find_weights
from miniclip.weights.layouts import open_layout
from miniclip.weights.load import ACTIVATION_NAMES, empty_model, fit_weights, infer_config
from miniclip.weights.pretrained import find_folder

SUFFIXES = {".safetensors", ".pt"}  # of OpenCLIP's single files that can be written
FOLDER = {"size", "mode", "mean", "std", "interpolation", "resize_mode", "fill_color"}  # what OpenCLIP knows of images


def convert(source: str | Path, target: str | Path, to: str, model: str | None = None, force: bool = False) -> str:
    """Writes weights in another library's form, atomically, and returns a sentence on what it did.

    `source` is a weight file of any known layout, a folder of MiniCLIP, transformers or OpenCLIP, or the name of one
    (`hf-hub:org/repo`); `to` is a key of EXPORTERS, each of which warns of what its form cannot hold. The model config,
    which folders need for the activation, is `model` (a name or a .json file), the one in the folder of `source`, or
    the only shipped one that fits. Raises CheckpointError for weights that cannot be used or an unclear config, and
    FileExistsError if `target` exists, unless `force`.
    """
    target = Path(target)
    if to not in EXPORTERS:
        raise InputError(f"cannot convert to {to!r}, only to {', '.join(EXPORTERS)}")
    if target.exists() and not force:
        raise FileExistsError(f"{target} exists already: choose another name, or add --force")
    source = find_weights(find_folder(source) or source)
    config, reason, checkpoint = open_layout(source, model)
    if config is None and (to != "openclip" or target.suffix not in SUFFIXES):  # such files do not contain the config
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


def write_openclip(path: Path, model: MiniClip):
    """A .safetensors or .pt file for OpenCLIP, of CLIP or, with another text tower, of CustomTextCLIP; or with another
    name a folder, for its `local-dir:`."""
    if path.suffix in (".bin", ".pth", ".ckpt"):
        raise CheckpointError("OpenCLIP: end the target in .safetensors or .pt for a file, in neither for a folder")
    is_file, images = path.suffix in SUFFIXES, dataclasses.asdict(model.config.preprocess_cfg)
    own = isinstance(model.config.vision_cfg, VisionConfig) and isinstance(model.config.text_cfg, TextConfig)
    if not is_file and not own:
        raise CheckpointError("OpenCLIP's folder cannot describe these towers: end the target in .safetensors")
    held = {"size", "center_crop"} if is_file else FOLDER | {"center_crop"}
    usual = dataclasses.asdict(PreprocessConfig())
    if lost := [f"{name} {images[name]}" for name in usual if name not in held and images[name] != usual[name]]:
        how = "whose files hold weights only" if is_file else "which does not know it"
        warnings.warn(f"not written for OpenCLIP, {how}: {', '.join(lost)}; prepare images so there", stacklevel=3)
    warn_of_center_crop(model.config, "torchvision", "OpenCLIP")
    layout = "openclip" if isinstance(model.config.text_cfg, TextConfig) else "custom_text"
    weights = from_miniclip(model.state_dict(), layout, (model.visual.key_rows(), model.text.key_rows()))
    if not is_file:
        model_cfg = {
            name: v for name, v in model.config.to_dict().items() if name != "preprocess_cfg" and v is not None
        }
        config = {"model_cfg": model_cfg, "preprocess_cfg": {name: images[name] for name in sorted(FOLDER)}}
        path.mkdir()
        write_json(path / "open_clip_config.json", config)
        save_file(weights, path / "open_clip_model.safetensors", {"format": "pt"})
        write_manifest(path)
    elif path.suffix == ".safetensors":
        save_file(weights, path, {"format": "pt"})
    else:
        torch.save(weights, path)


def warn_of_center_crop(config: MiniClipConfig, theirs: str, library: str):
    """Warns where another library rounds the margins of a centre crop in another way."""
    images = config.preprocess_cfg
    if images.resize_mode == "shortest" and images.center_crop != theirs:
        problem = f"{library} crops images with odd margins one pixel elsewhere"
        warnings.warn(f"{problem} than this model expects (center_crop {images.center_crop!r})", stacklevel=4)


def write_hf(path: Path, model: MiniClip):
    """A folder for transformers' CLIPModel and CLIPImageProcessor."""
    config, precision = model.config, str(model.logit_scale.dtype).removeprefix("torch.")
    if not (isinstance(config.vision_cfg, VisionConfig) and isinstance(config.text_cfg, TextConfig)):
        raise CheckpointError("transformers' CLIPModel has no other towers than CLIP's own: convert to another form")
    files = {"config": hf_config(config) | {"dtype": precision}, "preprocessor_config": hf_preprocessor(config)}
    warn_of_center_crop(config, "transformers", "transformers")
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
