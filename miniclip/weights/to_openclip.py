"""OpenCLIP's forms: a weight file for its `pretrained=`, or a folder for its `local-dir:`."""

import dataclasses
import warnings
from pathlib import Path

import torch
from safetensors.torch import save_file

from miniclip.checkpoint import from_miniclip
from miniclip.config import PreprocessConfig, TextConfig
from miniclip.model import MiniClip
from miniclip.towers.hf_config import HfTextConfig
from miniclip.towers.registry import CUSTOM_TEXT, IN_OPENCLIP, NOT_IN_OPENCLIP
from miniclip.towers.siglip import SigLipVisionConfig
from miniclip.towers.tokens import without_tokens
from miniclip.utils.errors import CheckpointError
from miniclip.utils.files import write_json, write_manifest

SUFFIXES = {".safetensors", ".pt"}  # of single files that can be written
FOLDER = {"size", "mode", "mean", "std", "interpolation", "resize_mode", "fill_color"}  # what OpenCLIP knows of images


def write_openclip(path: Path, model: MiniClip):
    """A .safetensors or .pt file for OpenCLIP, of CLIP or CustomTextCLIP; or else a `local-dir:` folder."""
    model = without_tokens(model)
    if path.suffix in (".bin", ".pth", ".ckpt"):
        raise CheckpointError("OpenCLIP: end the target in .safetensors or .pt for a file, in neither for a folder")
    is_file = path.suffix in SUFFIXES
    images = dataclasses.asdict(model.config.preprocess_cfg)
    sections = {type(model.config.vision_cfg), type(model.config.text_cfg)}
    if lacking := [NOT_IN_OPENCLIP[section] for section in sections if section in NOT_IN_OPENCLIP]:
        raise CheckpointError(f"OpenCLIP has no towers with {lacking[0]}: convert to miniclip")
    siglip = isinstance(model.config.vision_cfg, SigLipVisionConfig)
    text = None if is_file else openclip_text(model.config.text_cfg)
    named = not siglip or model.config.vision_cfg.timm_model_name
    if not is_file and not (sections <= IN_OPENCLIP | ({HfTextConfig} if text else set()) and named):
        fix = "name a config with timm_model_name, or " if siglip else ""
        raise CheckpointError(f"OpenCLIP's folder cannot describe these towers: {fix}end the target in .safetensors")
    held = {"size", "center_crop"} if is_file else FOLDER | {"center_crop"}
    usual = dataclasses.asdict(PreprocessConfig())
    if lost := [f"{name} {images[name]}" for name in usual if name not in held and images[name] != usual[name]]:
        how = "whose files hold weights only" if is_file else "which does not know it"
        warnings.warn(f"not written for OpenCLIP, {how}: {', '.join(lost)}; prepare images so there", stacklevel=3)
    if images["resize_mode"] == "shortest" and images["center_crop"] != "torchvision":
        problem = "OpenCLIP crops images with odd margins one pixel elsewhere than this model expects"
        warnings.warn(f"{problem} (center_crop {images['center_crop']!r})", stacklevel=3)
    custom = siglip or type(model.config.text_cfg) in CUSTOM_TEXT
    layout = "openclip" if isinstance(model.config.text_cfg, TextConfig) and not custom else "custom_text"
    weights = from_miniclip(model.state_dict(), layout, (model.visual.key_rows(), model.text.key_rows()))
    if not is_file:
        model_cfg = {name: value for name, value in model.config.to_dict().items() if value is not None}
        del model_cfg["preprocess_cfg"]
        config = {"model_cfg": model_cfg, "preprocess_cfg": {name: images[name] for name in sorted(FOLDER)}}
        path.mkdir()
        model_cfg["text_cfg"].pop("token_dropout", None)  # of training, and unknown there
        if text:
            model_cfg["text_cfg"] = text
        if custom or text:
            model_cfg["custom_text"] = True
        if text or siglip and model.config.text_cfg.hf_tokenizer_name:
            model.text.tokenizer.tokenizer.save_pretrained(path)
        write_json(path / "open_clip_config.json", config)
        save_file(weights, path / "open_clip_model.safetensors", {"format": "pt"})
        write_manifest(path)
    elif path.suffix == ".safetensors":
        save_file(weights, path, {"format": "pt"})
    else:
        torch.save(weights, path)


def openclip_text(cfg) -> dict | None:
    """OpenCLIP's `text_cfg` for a text tower from transformers; None where there is none. Raises CheckpointError for
    the max pooler: that of OpenCLIP 3.3.0 fails on its mask of integers, which also marks words instead of padding."""
    if not isinstance(cfg, HfTextConfig) or not cfg.hf_model_name or cfg.hf_model_name.startswith("package:"):
        return None
    if cfg.hf_model_config["model_type"] not in ("bert", "roberta", "xlm-roberta"):
        return None
    if cfg.pooler == "max":
        raise CheckpointError("OpenCLIP's max_pooler does not work: end the target in .safetensors, or keep miniclip")
    return {
        "hf_model_name": cfg.hf_model_name, "hf_tokenizer_name": cfg.hf_tokenizer_name or cfg.hf_model_name,
        "hf_proj_type": None if cfg.hf_proj_type == "none" else cfg.hf_proj_type,
        "context_length": cfg.context_length, "hf_pooler_type": cfg.pooler and f"{cfg.pooler}_pooler",
    }  # fmt: skip
