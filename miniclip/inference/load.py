"""Loading a model, its preprocessing and its tokenizer."""

import warnings
from pathlib import Path

import torch

from miniclip.config import MiniClipConfig
from miniclip.inference.fast import inference_copy
from miniclip.inference.onnx import OnnxClip, is_onnx
from miniclip.inference.precision import settle
from miniclip.model import MiniClip
from miniclip.transforms import Preprocess
from miniclip.utils.errors import InputError
from miniclip.utils.local_copy import localised
from miniclip.utils.model_folder import limited_by
from miniclip.utils.weight_files import find_weights
from miniclip.weights.layouts import load_folder
from miniclip.weights.load import fill, load_weights, open_checkpoint
from miniclip.weights.pretrained import check_model, download_pretrained, find_folder, find_tag, follow


def load(
    name_or_path: str | Path, pretrained: str | Path | None = None, device: str | torch.device = "cpu",
    precision: str | None = None, cache_dir: str | Path | None = None,
):  # fmt: skip
    """Returns `(model, preprocess, tokenizer)`, the model in evaluation mode.

    `name_or_path` is the name of a config (`miniclip.list_models()`), a config file, `hf-hub:org/repo` (also with
    `@revision`), or a folder (also as `local-dir:FOLDER`) in the layout of MiniCLIP, OpenCLIP or transformers'
    CLIPModel, or of an export to ONNX. `pretrained` is a tag of the config (`miniclip.list_pretrained()`), whose
    activation and preprocessing are followed, or a weight file in any layout that `miniclip.checkpoint` knows, or a
    folder with one; without one a config's weights are random, with a warning. Both may lie on a store
    (s3://bucket/run), of which a copy is kept. Downloads are kept in `cache_dir`, by default the Hugging Face cache.
    Weights in half precision are loaded as float32. `preprocess` turns a PIL image into a (3, S, S) tensor, `tokenizer`
    a list of n strings into (n, context_length) ids. With a `precision`, "fp32", "bf16", "int8" or "auto"
    (`inference/precision.py`), the model is a faster copy for inference only. Raises InputError for an unknown name,
    for what cannot be downloaded, StoreError for an address that cannot be read, and what `load_weights` raises."""
    name_or_path, pretrained = localised(name_or_path), localised(pretrained or None)
    if is_onnx(name_or_path):
        if pretrained is not None:
            raise InputError(f"{name_or_path} is an export to ONNX, with its own weights: remove pretrained")
        model = inference_copy(OnnxClip(name_or_path, device), "fp32" if precision in (None, "auto") else precision)
        return model, Preprocess(model.config.preprocess_cfg), model.text.tokenizer
    check_model(name_or_path)
    tag = find_tag(name_or_path, pretrained)
    found = find_folder(pretrained or "", cache_dir)
    weights = download_pretrained(tag, cache_dir=cache_dir) if tag else found or pretrained
    if folder := find_folder(name_or_path, cache_dir):
        model = load_folder(folder)
    else:
        config = MiniClipConfig.from_name(str(name_or_path))
        if tag is not None:
            follow(config, tag, f"{name_or_path} {pretrained}")
        with limited_by(None if weights is None else find_weights(weights), name_or_path):
            model = MiniClip(config)
        if weights is None:
            model.visual.load_pretrained()
            model.text.load_pretrained()
            if not (config.vision_cfg.pretrained or config.text_cfg.pretrained):
                warnings.warn(f"{name_or_path} has random weights: no pretrained file was named", stacklevel=2)
    if tag is not None:  # what is published is better evidence of the activation than the names of files
        fill(model, open_checkpoint(weights, model), weights, check_activation=False)
    elif weights is not None:
        load_weights(model, weights)
    model = model.to(device).eval()
    model = model if precision is None else inference_copy(model, settle(model, precision))
    return model, Preprocess(model.config.preprocess_cfg), model.text.tokenizer
