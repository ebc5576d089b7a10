"""MiniCLIP: CLIP to read, to fine-tune and to measure. The README gives the order to read the files in."""

import importlib

from miniclip import towers  # noqa: F401  (makes the fields known that describe other towers)
from miniclip.utils.push import PushToHub

_PUBLIC = {  # where the public names live; imported when first used, so that `import miniclip` takes no time
    "config": "MiniClipConfig list_models", "model": "MiniClip", "loss": "clip_loss", "tokenizer": "Tokenizer",
    "transforms": "Preprocess", "data": "CaptionDataset", "trainer": "ClipTrainer ClipTrainingArguments",
    "retrieval": "retrieval_metrics search", "utils.image_files": "open_image", "datasets.read": "read_captions",
    "weights.pretrained": "list_pretrained list_pretrained_tags_by_model list_pretrained_models_by_tag"
    " get_pretrained_cfg download_pretrained", "weights.load": "load_weights", "training.trainer": "RunTrainer",
    "training.arguments": "RunArguments", "training.dataset": "RunDataset", "inference.evaluator": "RetrievalEvaluator",
    "inference.load": "load", "inference.embed": "embed_images embed_texts", "index.search": "ImageSearch",
    "classify.evaluator": "ZeroShotEvaluator", "classify.zero_shot": "build_zero_shot_classifier zero_shot_classify",
}  # fmt: skip
_HOMES = {name: module for module, names in _PUBLIC.items() for name in names.split()}
__all__ = list(_HOMES)
PushToHub.push = "miniclip.weights.push:push_to_hub"  # the core does not know the hub


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'miniclip' has no attribute {name!r}")
    return getattr(importlib.import_module(f"miniclip.{_HOMES[name]}"), name)


def __dir__():
    return sorted([*globals(), *_HOMES])
