"""Conversion of weights into the form of another library."""

import dataclasses
import json
import warnings
from collections.abc import Callable
from pathlib import Path

from miniclip.config import MiniClipConfig
from miniclip.model import MiniClip
from miniclip.towers.hf_config import read_preprocessing
from miniclip.utils.errors import CheckpointError, InputError
from miniclip.utils.files import replacing
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
from miniclip.weights.to_huggingface import write_hf, write_sentence_transformers
from miniclip.weights.to_openclip import SUFFIXES, write_openclip


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


EXPORTERS: dict[str, Callable[[Path, MiniClip], None]] = {  # each writes a new file or folder
    "openclip": write_openclip, "hf": write_hf, "sentence-transformers": write_sentence_transformers,
    "miniclip": lambda path, model: model.save_pretrained(path),
}  # fmt: skip
