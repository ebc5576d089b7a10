"""A folder for transformers' SiglipModel."""

import warnings
from pathlib import Path

from safetensors.torch import save_file

from miniclip.checkpoint import from_miniclip
from miniclip.config import MiniClipConfig, PreprocessConfig
from miniclip.model import MiniClip
from miniclip.towers.hf_config import RESAMPLE
from miniclip.towers.siglip import EPS, SigLipTextConfig, SigLipVisionConfig, join_in_proj
from miniclip.utils.errors import CheckpointError
from miniclip.utils.files import write_json
from miniclip.utils.weight_files import read_json


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
    config = model.config
    precision = str(model.logit_scale.dtype).removeprefix("torch.")
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
    if text.hf_tokenizer_name:
        texts |= {name: getattr(tokenizer.tokenizer, name) for name in ("pad_token_id", "eos_token_id", "bos_token_id")}
    else:
        problem = "this text tower has CLIP's, which SiglipModel does not read"
        warnings.warn(f"no tokenizer is written: {problem}", stacklevel=4)
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
