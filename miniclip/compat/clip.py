"""OpenAI's package: `import miniclip.compat.clip as clip`. See docs/compat.md."""

import os
from pathlib import Path

import torch
from torch import Tensor

from miniclip.compat.model import OpenAIClip, convert_weights_to_lp
from miniclip.compat.open_clip import TOKENIZER, create_model, refuse
from miniclip.compat.transforms import Compose, image_transform_v2
from miniclip.config import MiniClipConfig
from miniclip.model import MiniClip
from miniclip.utils.errors import InputError
from miniclip.weights.load import fill, infer_config, open_checkpoint

MODELS = {  # OpenAI's names: the configs
    **{name: f"{name}-quickgelu" for name in ("RN50", "RN101", "RN50x4", "RN50x16", "RN50x64")},
    "ViT-B/32": "ViT-B-32-quickgelu", "ViT-B/16": "ViT-B-16-quickgelu", "ViT-L/14": "ViT-L-14-quickgelu",
    "ViT-L/14@336px": "ViT-L-14-336-quickgelu",
}  # fmt: skip


def available_models() -> list[str]:
    """Returns OpenAI's names of the models that `load` knows."""
    return list(MODELS)


def load(
    name: str, device: str | torch.device | None = None, jit: bool = False, download_root: str | None = None
) -> tuple[OpenAIClip, Compose]:
    """Returns OpenAI's model, in evaluation mode, and its transform of PIL images.

    `name` is one of `available_models()`, a weight file of any layout that MiniCLIP reads, or a folder it saved. As in
    OpenAI's package a GPU is used if there is one, and then the weights are in half precision; a file's activation is
    QuickGELU unless it is known to be GELU. Raises InputError for another name."""
    refuse("jit", jit, "TorchScript is deprecated: use torch.compile(model)")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if name in MODELS:
        model = create_model(MODELS[name], "openai", cache_dir=download_root).miniclip
    elif os.path.isdir(name):
        model = create_model(f"local-dir:{name}").miniclip
    elif os.path.isfile(name):
        checkpoint = open_checkpoint(name)
        values = infer_config(checkpoint.weights) | {"quick_gelu": checkpoint.quick_gelu is not False}
        model = MiniClip(MiniClipConfig.from_dict(values, name))
        fill(model, checkpoint, Path(name))
    else:
        raise InputError(f"Model {name} not found; available models = {available_models()}")
    model = OpenAIClip(model)
    model.visual.input_resolution = model.visual.image_size
    if torch.device(device).type != "cpu":
        convert_weights_to_lp(model)
    return model.to(device).eval(), image_transform_v2(model.miniclip.config.preprocess_cfg, is_train=False)


def tokenize(texts: str | list[str], context_length: int = 77, truncate: bool = False) -> Tensor:
    """Returns token ids, int32 (n, context_length). Raises RuntimeError for too long a text, unless `truncate`."""
    cut, texts = TOKENIZER.truncated, [texts] if isinstance(texts, (str, bytes)) else list(texts)
    ids = TOKENIZER(texts, context_length)
    if TOKENIZER.truncated > cut and not truncate:
        long = next(text for text in texts if len(TOKENIZER.encode(text)) > context_length - 2)
        raise RuntimeError(f"Input {long} is too long for context length {context_length}")
    return ids.int()
