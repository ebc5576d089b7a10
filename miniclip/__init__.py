"""MiniCLIP: CLIP to read, to fine-tune and to measure. The README gives the order to read the files in."""

import importlib

from miniclip import towers  # noqa: F401  (makes the fields known that describe other towers)

_HOMES = {  # where each public name lives; imported when first used, so that `import miniclip` takes no time
    "MiniClipConfig": "config",
    "list_models": "config",
    "MiniClip": "model",
    "load_weights": "weights.load",
    "clip_loss": "loss",
    "Tokenizer": "tokenizer",
    "Preprocess": "transforms",
    "open_image": "utils.image_files",
    "read_captions": "datasets.records",
    "CaptionDataset": "data",
    "ClipTrainer": "trainer",
    "ClipTrainingArguments": "trainer",
    "RunTrainer": "training.trainer",
    "RunArguments": "training.arguments",
    "RunDataset": "training.dataset",
    "RetrievalEvaluator": "inference.evaluator",
    "retrieval_metrics": "retrieval",
    "search": "retrieval",
    "ImageSearch": "index.search",
    "load": "inference.load",
    "embed_images": "inference.embed",
    "embed_texts": "inference.embed",
    "build_zero_shot_classifier": "classify.zero_shot",
    "zero_shot_classify": "classify.zero_shot",
}
__all__ = list(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'miniclip' has no attribute {name!r}")
    return getattr(importlib.import_module(f"miniclip.{_HOMES[name]}"), name)


def __dir__():
    return sorted([*globals(), *_HOMES])
