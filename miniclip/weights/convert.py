"""How do I give weights to another library? The command behind

python -m miniclip convert SRC DST --to openclip|hf|miniclip [--model NAME] [--force]
"""

import json
import warnings
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from miniclip.checkpoint import from_miniclip
from miniclip.config import MiniClipConfig
from miniclip.model import MiniClip
from miniclip.utils.errors import CheckpointError
from miniclip.utils.files import replacing, write_json, write_manifest
from miniclip.utils.weight_files import read_json
from miniclip.weights.identify import ACTIVATION_NAMES, fitting_configs, infer_config
from miniclip.weights.load import Checkpoint, fit_weights, open_checkpoint

RESAMPLE = {"bilinear": 2, "bicubic": 3}  # Pillow's numbers
WEIGHT_FILES = "model.safetensors pytorch_model.bin open_clip_model.safetensors open_clip_pytorch_model.bin".split()


def convert(source: str | Path, target: str | Path, to: str, model: str | None = None, force: bool = False) -> str:
    """Writes weights in another library's form, and gives a sentence on what it did.

    `source` is a weight file of any known layout or a folder of MiniCLIP, transformers or OpenCLIP. `to` is "openclip":
    a .safetensors or .pt file; "hf": a folder for transformers' CLIPModel; or "miniclip": a folder for MiniClip. The
    model config, which the folders need for the activation, is `model` (a name or a .json file), or the one in
    the folder of `source`, or the one shipped that fits. Nothing is left half written.
    Raises CheckpointError for weights that cannot be used and where the config is needed but not clear, FileExistsError
    where there is something at `target` already, unless `force`.
    """
    source, target = Path(source), Path(target)
    if to == "openclip" and target.suffix not in (".safetensors", ".pt"):
        raise CheckpointError(f"{target}: OpenCLIP reads single files; end the name in .safetensors or .pt")
    if target.exists() and (not force or target.is_dir() != (to != "openclip")):
        raise FileExistsError(f"{target} exists already: choose another name" + ("" if force else ", or add --force"))
    if source.is_dir():
        source = next((source / name for name in WEIGHT_FILES if (source / name).is_file()), source)
    checkpoint = open_checkpoint(source)
    config, reason = choose_config(checkpoint, source, model)
    weights = checkpoint.weights
    if config:
        with torch.device("meta"):  # shapes alone
            expected = MiniClip(config).state_dict()
        weights = fit_weights(weights, expected, source)
        if checkpoint.quick_gelu not in (None, config.quick_gelu):
            theirs, ours = ACTIVATION_NAMES[checkpoint.quick_gelu], ACTIVATION_NAMES[config.quick_gelu]
            warnings.warn(
                f"{source} was trained with {theirs} ({checkpoint.evidence}), the config says {ours}", stacklevel=2
            )
    elif to != "openclip":  # where the config is not part of the file
        raise CheckpointError(f"{source}: {reason}: name one with --model")
    if len({tensor.dtype for tensor in weights.values()}) > 1:  # OpenAI's: a model has one precision elsewhere
        weights = {key: tensor.float() for key, tensor in weights.items()}
    writers = {"openclip": write_openclip, "hf": write_hf, "miniclip": write_miniclip}
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target) as scratch:
        writers[to](scratch, weights, config)
    name = "" if config is None else f", {ACTIVATION_NAMES[config.quick_gelu]}"
    return f"{source} ({checkpoint.source} layout{name}) -> {target} ({to}); {reason}"


def choose_config(checkpoint: Checkpoint, source: Path, name: str | None) -> tuple[MiniClipConfig | None, str]:
    """The config of a model and how it was found; None and what is in doubt, where more than one would do."""
    if name:
        return MiniClipConfig.from_name(name), f"config {name}, as asked"
    if values := read_config(source.parent, checkpoint.weights):
        return MiniClipConfig.from_dict(values, f"the config in {source.parent}"), f"config of {source.parent}"
    fitting = fitting_configs(checkpoint.weights, checkpoint.quick_gelu)
    if len(fitting) == 1:
        return MiniClipConfig.from_name(fitting[0]), f"config {fitting[0]}, the only one shipped that fits"
    sizes = json.dumps(infer_config(checkpoint.weights))
    return None, f"it fits {' and '.join(fitting)}" if fitting else f"no shipped config has its sizes, {sizes}"


def read_config(folder: Path, weights: dict[str, Tensor]) -> dict | None:
    """The model config in a folder of MiniCLIP, transformers or OpenCLIP, in MiniCLIP's form."""
    config = read_json(folder / "config.json")
    if "vision_cfg" in config:
        return config
    if config.get("model_type") == "clip":  # transformers leaves out what is the default
        sizes, vision, text = infer_config(weights), config.get("vision_config", {}), config.get("text_config", {})
        activations = {tower.get("hidden_act", "quick_gelu") for tower in (vision, text)}
        if activations not in ({"gelu"}, {"quick_gelu"}):
            raise CheckpointError(f"{folder}: hidden_act is {activations}; only gelu and quick_gelu can be converted")
        sizes["quick_gelu"] = activations == {"quick_gelu"}
        sizes["vision_cfg"]["head_width"] = sizes["vision_cfg"]["width"] // vision.get("num_attention_heads", 12)
        sizes["text_cfg"]["heads"] = text.get("num_attention_heads", 8)
        return sizes | {"preprocess_cfg": read_hf_preprocessor(folder / "preprocessor_config.json")}
    if config := read_json(folder / "open_clip_config.json"):
        pictures = {k: v for k, v in config.get("preprocess_cfg", {}).items() if k != "size"}  # the model's image size
        return config["model_cfg"] | {"preprocess_cfg": pictures}
    return None


def read_hf_preprocessor(file: Path) -> dict:
    """The inverse of `hf_preprocessor`, for a file that leaves out what is transformers' default."""
    theirs = {"size": 224, "resample": 3, "do_center_crop": True} | read_json(file)
    keys = (("mean", "image_mean"), ("std", "image_std"))
    pictures = {ours: theirs[key] for ours, key in keys if key in theirs}
    if theirs["resample"] not in RESAMPLE.values():
        raise CheckpointError(f"{file}: resample {theirs['resample']} is neither 2 (bilinear) nor 3 (bicubic)")
    pictures["interpolation"] = next(name for name, number in RESAMPLE.items() if number == theirs["resample"])
    if isinstance(theirs["size"], dict) and "shortest_edge" not in theirs["size"]:
        pictures["resize_mode"] = "squash"
    elif not theirs["do_center_crop"]:
        raise CheckpointError(f"{file}: pictures that are neither cropped nor squashed have no fixed size")
    return pictures


def write_openclip(path: Path, weights: dict[str, Tensor], config: MiniClipConfig | None):
    weights = from_miniclip(weights, "openclip")
    save_file(weights, path, {"format": "pt"}) if path.suffix == ".safetensors" else torch.save(weights, path)


def write_miniclip(path: Path, weights: dict[str, Tensor], config: MiniClipConfig):
    with torch.device("meta"):
        MiniClip(config).save_pretrained(path, from_miniclip(weights, "miniclip"))


def write_hf(path: Path, weights: dict[str, Tensor], config: MiniClipConfig):
    precision = str(weights["logit_scale"].dtype).removeprefix("torch.")
    files = {"config": hf_config(config) | {"dtype": precision}, "preprocessor_config": hf_preprocessor(config)}
    path.mkdir()
    for name, values in files.items():
        write_json(path / f"{name}.json", values)
    save_file(from_miniclip(weights, "hf"), path / "model.safetensors", {"format": "pt"})
    write_manifest(path)


def hf_config(config: MiniClipConfig) -> dict:
    """The config of the transformers CLIPModel that computes the same."""
    vision, text = config.vision_cfg, config.text_cfg
    # transformers reads a text out at the first eos_token_id, MiniCLIP at the highest id: in CLIP's vocabulary that is
    # one and the same, the last. (2, in its older configs, was a mistake, which it still takes for "the highest".)
    ids = {"bos_token_id": text.vocab_size - 2, "eos_token_id": text.vocab_size - 1, "pad_token_id": 0}

    def tower(cfg, heads: int, **more) -> dict:
        return {
            "hidden_size": cfg.width, "intermediate_size": int(cfg.width * cfg.mlp_ratio),
            "num_hidden_layers": cfg.layers, "num_attention_heads": heads, "projection_dim": config.embed_dim,
            "hidden_act": "quick_gelu" if config.quick_gelu else "gelu", **more,
        }  # fmt: skip

    vision_heads = vision.width // vision.head_width
    return {
        "architectures": ["CLIPModel"], "model_type": "clip", "projection_dim": config.embed_dim,
        "vision_config": tower(vision, vision_heads, image_size=vision.image_size, patch_size=vision.patch_size),
        "text_config": tower(
            text, text.heads, vocab_size=text.vocab_size, max_position_embeddings=text.context_length, **ids
        ),
    }  # fmt: skip


def hf_preprocessor(config: MiniClipConfig) -> dict:
    """The settings of the transformers CLIPImageProcessor that prepares pictures alike."""
    pictures = config.preprocess_cfg
    square = {"height": pictures.size, "width": pictures.size}
    sizes = {"shortest": {"shortest_edge": pictures.size}, "squash": square}  # it knows no way of padding
    if pictures.resize_mode not in sizes:
        raise CheckpointError(f"transformers cannot prepare pictures by resize_mode {pictures.resize_mode!r}")
    return {
        "image_processor_type": "CLIPImageProcessor", "image_mean": pictures.mean, "image_std": pictures.std,
        "size": sizes[pictures.resize_mode], "crop_size": square,
        "do_center_crop": pictures.resize_mode == "shortest",
        "resample": RESAMPLE[pictures.interpolation],
    }  # fmt: skip
