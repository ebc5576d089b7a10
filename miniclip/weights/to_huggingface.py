"""Hugging Face's forms: a folder for transformers' CLIPModel or SiglipModel, and one for sentence-transformers."""

import warnings
from pathlib import Path

from safetensors.torch import save_file

from miniclip.checkpoint import from_miniclip
from miniclip.config import MiniClipConfig, PreprocessConfig, TextConfig, VisionConfig
from miniclip.model import MiniClip
from miniclip.tokenizer import Tokenizer
from miniclip.towers.hf_config import CENTER_CROP_FILE, RESAMPLE
from miniclip.towers.siglip import EPS, SigLipTextConfig, SigLipVisionConfig, join_in_proj
from miniclip.towers.tokens import without_tokens
from miniclip.utils.errors import CheckpointError
from miniclip.utils.files import write_json, write_manifest, write_text
from miniclip.utils.weight_files import read_json
from miniclip.weights.clip_tokenizer import write_tokenizer

# Nothing in a preprocessor_config.json makes transformers round like torchvision: that takes code, which runs only for
# who asks for it with trust_remote_code.
CENTER_CROP = '''\
"""CLIP's image processor, with the margins of a centre crop rounded half to even, as in torchvision."""

from transformers import CLIPImageProcessorPil


class TorchvisionCropImageProcessor(CLIPImageProcessorPil):
    def center_crop(self, image, size, **kwargs):
        (height, width), (down, across) = image.shape[-2:], (size.height, size.width)
        top, left = round((height - down) / 2), round((width - across) / 2)
        return image[..., top : top + down, left : left + across]
'''


def write_hf(path: Path, model: MiniClip):
    """A folder for transformers: CLIPModel or SiglipModel, AutoProcessor, AutoTokenizer and the zero-shot pipeline."""
    sections = type(model.config.vision_cfg), type(model.config.text_cfg)
    (_write_siglip if sections == (SigLipVisionConfig, SigLipTextConfig) else _write)(path, model)
    write_manifest(path)


def write_sentence_transformers(path: Path, model: MiniClip):
    """A folder for `SentenceTransformer(path)`, which encodes texts and images, with all that `write_hf` writes."""
    _write(path, model)
    write_json(path / "modules.json", [
        {"idx": i, "name": str(i), "path": folder, "type": f"sentence_transformers.models.{module}"}
        for i, (module, folder) in enumerate((("CLIPModel", ""), ("Normalize", "1_Normalize")))
    ])  # fmt: skip
    write_json(path / "config_sentence_transformers.json", {"similarity_fn_name": "cosine"})
    write_manifest(path)


def _write(path: Path, model: MiniClip):
    model = without_tokens(model)
    config = model.config
    precision = str(model.logit_scale.dtype).removeprefix("torch.")
    if (type(config.vision_cfg), type(config.text_cfg)) != (VisionConfig, TextConfig):
        raise CheckpointError("transformers' CLIPModel has no other towers than CLIP's own: convert to another form")
    files = {"config": hf_config(config) | {"dtype": precision}, "preprocessor_config": hf_preprocessor(config)}
    weights = from_miniclip(model.state_dict(), "hf")
    path.mkdir()
    for name, values in files.items():
        write_json(path / f"{name}.json", values)
    if "auto_map" in files["preprocessor_config"]:
        write_text(path / f"{CENTER_CROP_FILE}.py", CENTER_CROP)
        problem = "transformers crops images with odd margins one pixel elsewhere than this model expects"
        warnings.warn(f"{problem}, unless its processor is loaded with trust_remote_code=True", stacklevel=4)
    if config.text_cfg.vocab_size >= Tokenizer.vocab_size:
        write_tokenizer(path, config.text_cfg.context_length)
    else:
        problem = f"the text tower has {config.text_cfg.vocab_size} tokens, CLIP's tokenizer {Tokenizer.vocab_size}"
        warnings.warn(f"no tokenizer is written: {problem}", stacklevel=4)
    save_file(weights, path / "model.safetensors", {"format": "pt"})


def hf_config(config: MiniClipConfig) -> dict:
    """The config of the transformers CLIPModel that computes the same."""
    vision, text = config.vision_cfg, config.text_cfg
    # transformers reads a text out at the first eos_token_id, MiniCLIP at the highest id: in CLIP's vocabulary both are
    # the last one. (2, in its older configs, was a mistake, which it still reads as "the highest".)
    size = min(text.vocab_size, Tokenizer.vocab_size)  # beyond it a table may be padded
    ids = {"bos_token_id": size - 2, "eos_token_id": size - 1, "pad_token_id": 0}
    activation, dim = "quick_gelu" if config.quick_gelu else "gelu", {"projection_dim": config.embed_dim}
    images = dim | {"image_size": vision.image_size, "patch_size": vision.patch_size}
    texts = dim | {"vocab_size": text.vocab_size, "max_position_embeddings": text.context_length} | ids
    return {
        "architectures": ["CLIPModel"], "model_type": "clip", **dim,
        "vision_config": section(vision, vision.width // vision.head_width, activation) | images,
        "text_config": section(text, text.heads, activation) | texts,
    }  # fmt: skip


def hf_preprocessor(config: MiniClipConfig) -> dict:
    """The settings of the transformers CLIPImageProcessor that prepares images alike."""
    images = config.preprocess_cfg
    square = {"height": images.size, "width": images.size}
    sizes = {"shortest": {"shortest_edge": int(images.size / images.crop_pct + 1e-6)}, "squash": square}  # cannot pad
    if images.resize_mode not in sizes:
        raise CheckpointError(f"transformers cannot prepare images by resize_mode {images.resize_mode!r}")
    rounded = images.resize_mode == "shortest" and images.center_crop == "torchvision"
    code = {"auto_map": {"AutoImageProcessor": f"{CENTER_CROP_FILE}.TorchvisionCropImageProcessor"}}
    return (code if rounded else {}) | {
        "processor_class": "CLIPProcessor", "image_processor_type": "CLIPImageProcessor",
        "size": sizes[images.resize_mode], "crop_size": square, "do_center_crop": images.resize_mode == "shortest",
        **levels(images),
    }  # fmt: skip


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


def _write_siglip(path: Path, model: MiniClip):
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
        write_own_tokenizer(path, tokenizer)
    save_file(weights, path / "model.safetensors", {"format": "pt"})


def write_own_tokenizer(path: Path, tokenizer):
    """Writes the tokenizer with the cleaning of captions in it; of broken encodings and HTML nothing is repaired."""
    tokenizer.tokenizer.save_pretrained(path)
    tokenizer.fast().save(str(path / "tokenizer.json"))
    settings = read_json(path / "tokenizer_config.json")
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": tokenizer.context_length}
    settings |= {"model_input_names": ["input_ids"]}  # padding is read, not masked
    write_json(path / "tokenizer_config.json", settings)
