"""Conversion of weights into the form of another library."""

import dataclasses
import json
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from miniclip.checkpoint import from_miniclip
from miniclip.config import MiniClipConfig, PreprocessConfig, TextConfig, VisionConfig
from miniclip.model import MiniClip
from miniclip.towers.hf_config import RESAMPLE, read_preprocessing
from miniclip.utils.errors import CheckpointError, InputError
from miniclip.utils.files import replacing, write_json, write_manifest
from miniclip.utils.model_folder import limited_by, load_state_dict
from miniclip.utils.weight_files import find_weights, read_json
from miniclip.weights.load import (
    ACTIVATION_NAMES,
    empty_model,
    fit_weights,
    fitting_configs,
    infer_config,
    open_checkpoint,
)

SUFFIXES = {".safetensors", ".pt"}  # of OpenCLIP's single files that can be written
FOLDER = {"size", "mode", "mean", "std", "interpolation", "resize_mode", "fill_color"}  # what OpenCLIP knows of images


def convert(source: str | Path, target: str | Path, to: str, model: str | None = None, force: bool = False) -> str:
    """Writes weights in another library's form, atomically, and returns a sentence on what it did.

    `source` is a weight file of any known layout or a folder of MiniCLIP, transformers or OpenCLIP; `to` is a key of
    EXPORTERS, each of which warns of what its form cannot hold. The model config, which folders need for the
    activation, is `model` (a name or a .json file), the one in the folder of `source`, or the only shipped one that
    fits. Raises CheckpointError for weights that cannot be used or an unclear config, and FileExistsError if `target`
    exists, unless `force`.
    """
    source, target = Path(source), Path(target)
    if to not in EXPORTERS:
        raise InputError(f"cannot convert to {to!r}, only to {', '.join(EXPORTERS)}")
    if target.exists() and not force:
        raise FileExistsError(f"{target} exists already: choose another name, or add --force")
    source = find_weights(source)
    config, reason = named_config(source.parent, model)
    with limited_by(source):
        towers = config and empty_model(config)
    checkpoint = open_checkpoint(source, towers)
    if config is None:
        config, reason = guess_config(checkpoint.weights, checkpoint.quick_gelu, source.parent)
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


def named_config(folder: Path, name: str | None) -> tuple[MiniClipConfig | None, str]:
    """The config with a name or in a folder of MiniCLIP or OpenCLIP, if there is one, and where it comes from."""
    if name:
        config = MiniClipConfig.from_name(name)
        theirs = preprocessing_of(folder) or dataclasses.asdict(config.preprocess_cfg)
        if differing := [k for k, v in dataclasses.asdict(config.preprocess_cfg).items() if theirs.get(k, v) != v]:
            problem = f"the config {name} prepares images otherwise than {folder}, in {', '.join(differing)}"
            warnings.warn(f"{problem}; {name} is followed", stacklevel=3)
        return config, f"config {name}, as asked"
    values = read_json(folder / "config.json")
    if "vision_cfg" not in values and (theirs := read_json(folder / "open_clip_config.json")):
        images = theirs.get("preprocess_cfg", {})
        if not isinstance(images, dict) or not isinstance(theirs.get("model_cfg"), dict):
            raise InputError(f"{folder / 'open_clip_config.json'} has no objects model_cfg and preprocess_cfg")
        images = {k: v for k, v in images.items() if k != "size"}  # the model's image size
        values = theirs["model_cfg"] | {"preprocess_cfg": images}
    if "vision_cfg" not in values:
        return None, ""
    return MiniClipConfig.from_dict(values, f"the config in {folder}"), f"config of {folder}"


def preprocessing_of(folder: Path) -> dict:
    """The preprocessing in a folder of transformers: in a file of its own, or in its processor's."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (file := folder / name).is_file():
            return read_preprocessing(file, "CLIPImageProcessor")
    return {}


def guess_config(weights: dict, quick_gelu: bool | None, folder: Path) -> tuple[MiniClipConfig | None, str]:
    """The config that fits the weights and the reason; None and what is in doubt, if there is not exactly one."""
    config, sizes = read_json(folder / "config.json"), infer_config(weights)
    if config.get("model_type") == "clip":  # transformers omits its defaults
        vision, text = (config.get(name) or {} for name in ("vision_config", "text_config"))
        if not (isinstance(vision, dict) and isinstance(text, dict)):
            raise CheckpointError(f"{folder / 'config.json'}: vision_config and text_config are not both objects")
        activations = {str(tower.get("hidden_act", "quick_gelu")) for tower in (vision, text)}
        if activations not in ({"gelu"}, {"quick_gelu"}):
            raise CheckpointError(f"{folder}: hidden_act is {activations}; only gelu and quick_gelu can be converted")
        sizes["quick_gelu"] = activations == {"quick_gelu"}
        heads = vision.get("num_attention_heads", 12)
        if type(heads) is not int or heads < 1 or sizes["vision_cfg"]["width"] % heads:
            raise CheckpointError(f"{folder / 'config.json'}: num_attention_heads is {heads!r:.100}, not a divisor of"
                                  f" the width {sizes['vision_cfg']['width']}")  # fmt: skip
        sizes["vision_cfg"]["head_width"] = sizes["vision_cfg"]["width"] // heads
        sizes["text_cfg"]["heads"] = text.get("num_attention_heads", 8)
        if images := preprocessing_of(folder):
            if (size := images["size"]) != sizes["vision_cfg"]["image_size"]:
                model_size = f"the model's images are of {sizes['vision_cfg']['image_size']}"
                warnings.warn(f"{folder}: images are cropped to {size}, but {model_size}, which is kept", stacklevel=3)
            sizes["preprocess_cfg"] = images | {"size": sizes["vision_cfg"]["image_size"]}
        return MiniClipConfig.from_dict(sizes, f"the config in {folder}"), f"config of {folder}"
    fitting = fitting_configs(weights, quick_gelu)
    if len(fitting) == 1:
        return MiniClipConfig.from_name(fitting[0]), f"config {fitting[0]}, the only one shipped that fits"
    sizes = json.dumps(sizes)
    return None, f"it fits {' and '.join(fitting)}" if fitting else f"no shipped config has its sizes, {sizes}"


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
