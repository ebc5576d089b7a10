"""The config of transformers' SiglipModel."""

import math
from pathlib import Path

from miniclip.config import MiniClipConfig
from miniclip.towers.hf_config import read_preprocessing
from miniclip.utils.errors import InputError
from miniclip.utils.weight_files import read_json

EPS = 1e-6
ACTIVATIONS = {"gelu": None, "gelu_pytorch_tanh": {"approximate": "tanh"}}
SHARED = {  # transformers' names and defaults of both sections
    "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072,
    "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": EPS,
}  # fmt: skip
FILES = "preprocessor_config", "processor_config"
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
    images = next((folder / f"{n}.json" for n in FILES if (folder / f"{n}.json").is_file()), None)
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
        "preprocess_cfg": read_preprocessing(images, "SiglipImageProcessor") if images else {},
    }, f"the config in {folder}")  # fmt: skip
