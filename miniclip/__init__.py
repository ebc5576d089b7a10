"""MiniCLIP: CLIP to read, to fine-tune and to measure. The README gives the order to read the files in."""

import importlib

_HOMES = {  # where each public name lives; imported when first used, so that `import miniclip` takes no time
    "MiniClipConfig": "config",
    "list_models": "config",
    "MiniClip": "model",
    "load_weights": "checkpoint",
    "clip_loss": "loss",
    "Tokenizer": "tokenizer",
    "Preprocess": "transforms",
    "open_image": "transforms",
    "read_captions": "data",
    "CaptionDataset": "data",
    "ClipTrainer": "trainer",
    "ClipTrainingArguments": "trainer",
    "retrieval_metrics": "retrieval",
    "search": "retrieval",
    "ImageSearch": "image_search",
    "load": "inference",
    "embed_images": "inference",
    "embed_texts": "inference",
    "build_zero_shot_classifier": "zero_shot",
    "zero_shot_classify": "zero_shot",
}
__all__ = list(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'miniclip' has no attribute {name!r}")
    return getattr(importlib.import_module(f"miniclip.{_HOMES[name]}"), name)


def __dir__():
    return sorted([*globals(), *_HOMES])
