"""Model folders of MiniCLIP, OpenCLIP and transformers: which config is in them, and which weights."""

import dataclasses
import json
import math
import warnings
from pathlib import Path

from miniclip.config import MiniClipConfig, TextConfig
from miniclip.model import MiniClip
from miniclip.tokenizer import Tokenizer
from miniclip.towers.hf_config import preprocessing_of
from miniclip.utils.errors import CheckpointError, InputError
from miniclip.utils.model_folder import limited_by
from miniclip.utils.weight_files import find_weights, read_json
from miniclip.weights.load import Checkpoint, empty_model, fill, fitting_configs, infer_config, open_checkpoint

OLD_NAMES = {"proj": "hf_proj_type", "pooler_type": "hf_pooler_type"}  # of older OpenCLIP versions
SIGLIP_EPS = 1e-6
SIGLIP_ACTIVATIONS = {"gelu": None, "gelu_pytorch_tanh": {"approximate": "tanh"}}
SIGLIP = {  # of transformers' SiglipModel: names and defaults of both sections
    "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072,
    "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": SIGLIP_EPS,
}  # fmt: skip
SIGLIP_VISION = SIGLIP | {"image_size": 224, "patch_size": 16, "num_channels": 3, "vision_use_head": True}
SIGLIP_TEXT = SIGLIP | {"max_position_embeddings": 64, "vocab_size": 32000, "projection_size": None}


def load_folder(folder: Path) -> MiniClip:
    """Returns the model in a folder of MiniCLIP, OpenCLIP (`open_clip_config.json`) or transformers (CLIPModel,
    SiglipModel), in evaluation mode. Raises InputError for another folder, damaged files and unknown towers."""
    values = read_json(folder / "config.json")
    theirs = (folder / "open_clip_config.json").is_file()
    if "vision_cfg" in values or not theirs and "model_type" not in values:
        return MiniClip.from_pretrained(folder)
    if not theirs and values["model_type"] not in ("clip", "siglip"):
        kind = f"{folder} holds a model of type {str(values['model_type'])[:50]!r}"
        loaded = "CLIPModel and SiglipModel (not SigLIP 2's NaFlex, whose images keep their shape)"
        raise InputError(f"{kind}, and MiniCLIP has no such towers: of transformers' models it loads {loaded}")
    if (source := find_weights(folder)) == folder:
        raise CheckpointError(f"{folder} has a config but no weights beside it: copy or download it again")
    config, reason, checkpoint = open_layout(source)
    if config is None:
        raise CheckpointError(f"{source}: {reason}")
    if type(config.text_cfg) is TextConfig and (size := config.text_cfg.vocab_size) < Tokenizer.vocab_size:
        raise InputError(f"{folder} has another tokenizer, with a vocabulary of {size}: MiniCLIP has CLIP's alone")
    with limited_by(source, config_file(folder)):
        model = MiniClip(config)
    fill(model, checkpoint, source)
    return model.eval()


def open_layout(source: Path, model: str | None = None) -> tuple[MiniClipConfig | None, str, Checkpoint]:
    """Returns the config of a weight file (the one with the name `model`, that beside it, or the only shipped one that
    fits), the reason, and the weights. Without exactly one, the config is None and the reason says what is in doubt."""
    config, reason = named_config(source.parent, model)
    with limited_by(source, model or config_file(source.parent)):
        towers = config and empty_model(config)
    checkpoint = open_checkpoint(source, towers)
    if config is None:
        config, reason = guess_config(checkpoint.weights, checkpoint.quick_gelu, source.parent)
    return config, reason, checkpoint


def config_file(folder: Path) -> Path:
    """The config in a folder: OpenCLIP's where config.json is none of MiniCLIP."""
    ours, theirs = folder / "config.json", folder / "open_clip_config.json"
    return theirs if theirs.is_file() and "vision_cfg" not in read_json(ours) else ours


def named_config(folder: Path, name: str | None) -> tuple[MiniClipConfig | None, str]:
    """The config with a name or in a folder of MiniCLIP or OpenCLIP, if there is one, and where it comes from."""
    if name:
        config = MiniClipConfig.from_name(name)
        theirs = preprocessing_of(folder, "CLIPImageProcessor") or dataclasses.asdict(config.preprocess_cfg)
        if differing := [k for k, v in dataclasses.asdict(config.preprocess_cfg).items() if theirs.get(k, v) != v]:
            problem = f"the config {name} prepares images otherwise than {folder}, in {', '.join(differing)}"
            warnings.warn(f"{problem}; {name} is followed", stacklevel=3)
        return config, f"config {name}, as asked"
    file = config_file(folder)
    values = read_json(file)
    if file.name == "open_clip_config.json":
        images = values.get("preprocess_cfg", {})
        if not isinstance(images, dict) or not isinstance(values.get("model_cfg"), dict):
            raise InputError(f"{file} has no objects model_cfg and preprocess_cfg")
        images = {k: v for k, v in images.items() if k != "size"}  # the model's image size
        values = {k: v for k, v in values["model_cfg"].items() if k != "custom_text"}  # only how the weights are named
        values |= {"preprocess_cfg": images}
        if isinstance(text := values.get("text_cfg"), dict) and "hf_model_name" in text:
            values["text_cfg"] = {OLD_NAMES.get(name, name): value for name, value in text.items()}
    if values.get("model_type") == "siglip":
        return siglip_config(values, folder), f"config of {folder}"
    if "vision_cfg" not in values:
        return None, ""
    return MiniClipConfig.from_dict(values, f"the config in {folder}"), f"config of {folder}"


def siglip_config(values: dict, folder: Path) -> MiniClipConfig:
    """The config of transformers' SiglipModel in a folder. Raises InputError for what MiniCLIP cannot compute."""
    sections, both = [], []
    for name, usual in (("vision_config", SIGLIP_VISION), ("text_config", SIGLIP_TEXT)):
        given = values.get(name) or {}
        if not isinstance(given, dict):
            raise InputError(f"{folder / 'config.json'}: {name} is not an object")
        section = {field: given.get(field, default) for field, default in usual.items()}
        for field, value in section.items():
            fixed = field in ("layer_norm_eps", "num_channels", "vision_use_head") and value != usual[field]
            count = type(usual[field]) is int and (type(value) is not int or value < 1)
            if fixed or count or field == "hidden_act" and value not in SIGLIP_ACTIVATIONS:
                raise InputError(f"{folder / 'config.json'}: {name}.{field} is {value!r:.100}, which is not supported")
        width, hidden = section["hidden_size"], section["intermediate_size"]
        ratio = hidden / width if int(width * (hidden / width)) == hidden else math.nextafter(hidden / width, math.inf)
        ours = {"width": width, "layers": section["num_hidden_layers"], "mlp_ratio": ratio}
        both.append(ours | {"act_kwargs": SIGLIP_ACTIVATIONS[section["hidden_act"]]})
        sections.append(section)
    vision, text = sections
    # SigLIP's own tokenizer leaves out punctuation itself, in Python; that of SigLIP 2 only lowers.
    kind = str(read_json(folder / "tokenizer_config.json").get("tokenizer_class", ""))
    clean = "canonicalize" if kind.startswith("SiglipTokenizer") else "lower"
    return MiniClipConfig.from_dict({
        "embed_dim": vision["hidden_size"],
        "vision_cfg": both[0] | {
            "pool_type": "map", "image_size": vision["image_size"], "patch_size": vision["patch_size"],
            "head_width": vision["hidden_size"] // vision["num_attention_heads"],
        },
        "text_cfg": both[1] | {
            "heads": text["num_attention_heads"], "context_length": text["max_position_embeddings"],
            "vocab_size": text["vocab_size"], "no_causal_mask": True, "proj_bias": True, "pool_type": "last",
            "norm_kwargs": {"eps": SIGLIP_EPS}, "hf_tokenizer_name": str(folder), "tokenizer_kwargs": {"clean": clean},
        },
        "preprocess_cfg": preprocessing_of(folder, "SiglipImageProcessor"),
    }, f"the config in {folder}")  # fmt: skip


def guess_config(weights: dict, quick_gelu: bool | None, folder: Path) -> tuple[MiniClipConfig | None, str]:
    """The config that fits the weights and the reason; None and what is in doubt, if there is not exactly one."""
    config = read_json(file := folder / "config.json")
    sizes = infer_config(weights)
    if config.get("model_type") == "clip":  # transformers omits its defaults
        vision, text = (config.get(name) or {} for name in ("vision_config", "text_config"))
        if not (isinstance(vision, dict) and isinstance(text, dict)):
            raise CheckpointError(f"{file}: vision_config and text_config are not both objects")
        activations = {str(tower.get("hidden_act", "quick_gelu")) for tower in (vision, text)}
        if activations not in ({"gelu"}, {"quick_gelu"}):
            raise CheckpointError(f"{folder}: hidden_act is {activations}; only gelu and quick_gelu can be converted")
        sizes["quick_gelu"] = activations == {"quick_gelu"}
        for eps in (tower.get("layer_norm_eps", 1e-5) for tower in (vision, text)):
            if eps != 1e-5:
                raise CheckpointError(f"{file}: layer_norm_eps is {eps!r:.100}; only CLIP's 1e-05 can be converted")
        heads, width = vision.get("num_attention_heads", 12), sizes["vision_cfg"]["width"]
        if type(heads) is not int or heads < 1 or width % heads:
            raise CheckpointError(f"{file}: num_attention_heads is {heads!r:.100}, not a divisor of the width {width}")
        sizes["vision_cfg"]["head_width"] = width // heads
        sizes["text_cfg"]["heads"] = text.get("num_attention_heads", 8)
        if images := preprocessing_of(folder, "CLIPImageProcessor"):
            if (size := images["size"]) != sizes["vision_cfg"]["image_size"]:
                model_size = f"the model's images are of {sizes['vision_cfg']['image_size']}"
                warnings.warn(f"{folder}: images are cropped to {size}, but {model_size}, which is kept", stacklevel=3)
            sizes["preprocess_cfg"] = images | {"size": sizes["vision_cfg"]["image_size"]}
        return MiniClipConfig.from_dict(sizes, f"the config in {folder}"), f"config of {folder}"
    if len(fitting := fitting_configs(weights, quick_gelu)) == 1:
        return MiniClipConfig.from_name(fitting[0]), f"config {fitting[0]}, the only one shipped that fits"
    sizes = json.dumps(sizes)
    return None, f"it fits {' and '.join(fitting)}" if fitting else f"no shipped config has its sizes, {sizes}"
