"""Loading a model, its preprocessing and its tokenizer."""

import warnings
from pathlib import Path

import torch

from miniclip.config import MiniClipConfig
from miniclip.inference.fast import inference_copy
from miniclip.model import MiniClip
from miniclip.transforms import Preprocess
from miniclip.utils.model_folder import limited_by
from miniclip.utils.weight_files import find_weights
from miniclip.weights.load import load_weights


def load(
    name_or_path: str | Path, pretrained: str | Path | None = None, device: str | torch.device = "cpu",
    precision: str | None = None,
):  # fmt: skip
    """Returns `(model, preprocess, tokenizer)`, the model in evaluation mode.

    `name_or_path` is the name of a config (`miniclip.list_models()`), a config file, or a folder that MiniCLIP saved.
    `pretrained` is a weight file in any layout that `miniclip.checkpoint` knows, or a folder with one; without one a
    config's weights are random, with a warning. Weights in half precision are loaded as float32. `preprocess` turns a
    PIL image into a (3, S, S) tensor, `tokenizer` a list of n strings into (n, context_length) ids. With a `precision`,
    "fp32", "bf16" or "int8", the model is a faster copy for inference only. Raises InputError for an unknown name, and
    what `load_weights` raises."""
    if Path(name_or_path).is_dir():
        model = MiniClip.from_pretrained(name_or_path)
    else:
        config = MiniClipConfig.from_name(str(name_or_path))
        with limited_by(None if pretrained is None else find_weights(pretrained), name_or_path):
            model = MiniClip(config)
        if pretrained is None:
            model.visual.load_pretrained()
            model.text.load_pretrained()
            if not (config.vision_cfg.pretrained or config.text_cfg.pretrained):
                warnings.warn(f"{name_or_path} has random weights: no pretrained file was named", stacklevel=2)
    if pretrained is not None:
        load_weights(model, pretrained)
    model = model.to(device).eval()
    model = model if precision is None else inference_copy(model, precision)
    return model, Preprocess(model.config.preprocess_cfg), model.text.tokenizer
