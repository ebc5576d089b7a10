"""TODO docstring."""

import warnings
from pathlib import Path

import torch

from miniclip.config import MiniClipConfig
from miniclip.inference.fast import inference_copy
from miniclip.model import MiniClip
from miniclip.tokenizer import Tokenizer
from miniclip.transforms import Preprocess
from miniclip.weights.load import load_weights


def load(
    name_or_path: str | Path,
    pretrained: str | Path | None = None,
    device: str | torch.device = "cpu",
    precision: str | None = None,
):
    """Gives `(model, preprocess, tokenizer)`, the model in evaluation mode.

    `name_or_path` is the name of a config (`miniclip.list_models()`), a config file, or a folder that MiniCLIP saved.
    `pretrained` is a local weight file in any layout that `miniclip.checkpoint` knows; a config without one is
    initialised randomly, with a warning. `preprocess` turns a PIL image into a (3, S, S) tensor, `tokenizer` a list
    of n strings into (n, context_length) ids. With a `precision`, "fp32", "bf16" or "int8", the model is for inference
    only, and fast at it. Raises InputError for an unknown name, and what `load_weights` raises.
    """
    if Path(name_or_path).is_dir():
        model = MiniClip.from_pretrained(name_or_path)
    else:
        model = MiniClip(MiniClipConfig.from_name(str(name_or_path)))
        if foreign(model):
            from miniclip.towers.huggingface import load_towers

            load_towers(model, weights=pretrained is None)
        known = any(getattr(cfg, "pretrained", False) for cfg in (model.config.vision_cfg, model.config.text_cfg))
        if pretrained is None and not known:
            warnings.warn(f"{name_or_path} has random weights: no pretrained file was named", stacklevel=2)
    if pretrained is not None and foreign(model):
        from miniclip.towers.huggingface import load_hf_weights

        load_hf_weights(model, pretrained)
    elif pretrained is not None:
        load_weights(model, pretrained)
    config = model.config
    tokenizer = model.text.tokenizer or Tokenizer(config.text_cfg.context_length)
    model = model.to(device).eval()
    if precision is not None:
        model = inference_copy(model, precision)
    return model, Preprocess(config.preprocess_cfg), tokenizer


def foreign(model: MiniClip) -> bool:
    """Whether a tower is another than model.py's."""
    return hasattr(model.visual, "trunk") or hasattr(model.text, "trunk")
