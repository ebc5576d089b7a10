"""transformers' SiglipModel: the config of such a folder, and a folder for it."""

import math
import warnings
from pathlib import Path

from safetensors.torch import save_file

from miniclip.checkpoint import from_miniclip
from miniclip.config import MiniClipConfig, PreprocessConfig
from miniclip.model import MiniClip
from miniclip.towers.hf_config import RESAMPLE, preprocessing_of
from miniclip.towers.siglip import EPS, SigLipTextConfig, SigLipVisionConfig, join_in_proj
from miniclip.utils.errors import CheckpointError, InputError
from miniclip.utils.files import write_json
from miniclip.utils.weight_files import read_json

ACTIVATIONS = {"gelu": None, "gelu_pytorch_tanh": {"approximate": "tanh"}}
SHARED = {  # transformers' names and defaults of both sections
    "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072,
    "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": EPS,
}  # fmt: skip
VISION = SHARED | {"image_size": 224, "patch_size": 16, "num_channels": 3, "vision_use_head": True}
TEXT = SHARED | {"max_position_embeddings": 64, "vocab_size": 32000, "projection_size": None}


def read_config(values: dict, folder: Path) -> MiniClipConfig:
    """The config of transformers' SiglipModel in a folder. Raises InputError for what MiniCLIP cannot compute."""
    sections = []
    for name, usual in (("vision_config", VISION), ("text_config", TEXT)):
        given = values.get(name) or {}
        if not isinstance(given, dict):
            raise InputError(f"{folder / 'config.json'}: {name} is not an object")
        section = {field: given.get(field, default) for field, default in usual.items()}
        for field, value in section.items():
            fixed = field in ("layer_norm_eps", "num_channels", "vision_use_head") and value != usual[field]
            count = type(usual[field]) is int and (type(value) is not int or value < 1)
            if fixed or count or field == "hidden_act" and value not in ACTIVATIONS:
                raise InputError(f"{folder / 'config.json'}: {name}.{field} is {value!r:.100}, which is not supported")
        section["mlp_ratio"] = section["intermediate_size"] / section["hidden_size"]
        if int(section["mlp_ratio"] * section["hidden_size"]) != section["intermediate_size"]:
            section["mlp_ratio"] = math.nextafter(section["mlp_ratio"], math.inf)
        sections.append(section)
    vision, text = sections
    both = [
        {"width": s["hidden_size"], "layers": s["num_hidden_layers"], "mlp_ratio": s["mlp_ratio"]}
        | {"act_kwargs": ACTIVATIONS[s["hidden_act"]]}
        for s in sections
    ]
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
            "norm_kwargs": {"eps": EPS}, "hf_tokenizer_name": str(folder), "tokenizer_kwargs": {"clean": clean},
        },
        "preprocess_cfg": preprocessing_of(folder, "SiglipImageProcessor"),
    }, f"the config in {folder}")  # fmt: skip


def section(cfg, heads: int, activation: str) -> dict:
    """The sizes of a tower as transformers names them."""
    return {
        "hidden_size": cfg.width, "intermediate_size": int(cfg.width * cfg.mlp_ratio),
        "num_hidden_layers": cfg.layers, "num_attention_heads": heads, "hidden_act": activation,
    }  # fmt: skip


def levels(images: PreprocessConfig) -> dict:
    """How the levels of images are resized and normalised, as transformers names it."""
    resample = next(number for number, name in RESAMPLE.items() if name == images.interpolation)
    return {"image_mean": images.mean, "image_std": images.std, "resample": resample}


def is_siglip(config: MiniClipConfig) -> bool:
    return (type(config.vision_cfg), type(config.text_cfg)) == (SigLipVisionConfig, SigLipTextConfig)


def write_siglip(path: Path, model: MiniClip):
    """A folder for transformers: SiglipModel, AutoProcessor, AutoTokenizer and the zero-shot pipeline."""
    config, precision = model.config, str(model.logit_scale.dtype).removeprefix("torch.")
    vision, text, images = config.vision_cfg, config.text_cfg, config.preprocess_cfg
    eps = (text.norm_kwargs or {}).get("eps", 1e-5)
    for fine, problem in (
        (model.logit_bias is not None, "has no bias of the logits"),
        (text.ls_init_value is None, "has layer scale in its text tower"),
        (images.resize_mode == "squash", f"prepares images by resize_mode {images.resize_mode!r}"),
    ):
        if not fine:
            fix = "convert to miniclip or openclip instead"
            raise CheckpointError(f"transformers' SiglipModel cannot hold this model, which {problem}: {fix}")
    acts = ["gelu_pytorch_tanh" if cfg.act_kwargs else "gelu" for cfg in (vision, text)]
    sizes = {"image_size": vision.image_size, "patch_size": vision.patch_size, "layer_norm_eps": EPS}
    texts = {"max_position_embeddings": text.context_length, "vocab_size": text.vocab_size, "layer_norm_eps": eps}
    weights = join_in_proj(from_miniclip(model.state_dict(), "hf", (model.visual.key_rows(), model.text.key_rows())))
    weights |= {name: weights[name].reshape(1) for name in ("logit_scale", "logit_bias")}
    tokenizer = model.text.tokenizer
    if not text.hf_tokenizer_name:
        warnings.warn(
            "no tokenizer is written: this text tower has CLIP's, which SiglipModel does not read", stacklevel=4
        )
    else:
        texts |= {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.tokenizer.eos_token_id}
        texts |= {"bos_token_id": tokenizer.tokenizer.bos_token_id}
    path.mkdir()
    write_json(path / "config.json", {
        "architectures": ["SiglipModel"], "model_type": "siglip", "dtype": precision,
        "vision_config": section(vision, vision.width // vision.head_width, acts[0]) | sizes,
        "text_config": section(text, text.heads, acts[1]) | texts | {"projection_size": config.embed_dim},
    })  # fmt: skip
    write_json(path / "preprocessor_config.json", {
        "processor_class": "SiglipProcessor", "image_processor_type": "SiglipImageProcessor",
        "size": {"height": images.size, "width": images.size}, **levels(images),
    })  # fmt: skip
    if text.hf_tokenizer_name:
        write_tokenizer(path, tokenizer)
    save_file(weights, path / "model.safetensors", {"format": "pt"})


def write_tokenizer(path: Path, tokenizer):
    """Writes the tokenizer with the cleaning of captions in it; of broken encodings and HTML nothing is repaired."""
    tokenizer.tokenizer.save_pretrained(path)
    tokenizer.fast().save(str(path / "tokenizer.json"))
    settings = read_json(path / "tokenizer_config.json")
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": tokenizer.context_length}
    settings |= {"model_input_names": ["input_ids"]}  # padding is read, not masked
    write_json(path / "tokenizer_config.json", settings)
