"""Zero-shot accuracy while a model trains, on a folder of class folders (OpenCLIP's --imagenet-val)."""

from functools import partial
from pathlib import Path

import numpy as np

from miniclip.classify.images import choose_classes, find_images, usable
from miniclip.classify.prompts import TEMPLATES
from miniclip.classify.zero_shot import build_zero_shot_classifier
from miniclip.inference.embed import embed_images, on_all_processes
from miniclip.inference.evaluator import Evaluator, Evaluators, RetrievalEvaluator
from miniclip.inference.fast import InferenceClip, inference_copy
from miniclip.model import MiniClip
from miniclip.reports.confusion import classification_metrics
from miniclip.retrieval import search
from miniclip.utils.errors import InputError


class ZeroShotEvaluator(Evaluator):
    """Zero-shot accuracy on `folder`, with one folder of images for each class, on all processes. The classes are asked
    for in English, by the names of their folders or the words that lie beside folders of ids (names.py). Raises
    InputError for another folder, and for damaged images, unless `on_bad_sample` is "skip": before a run starts."""

    primary_metric = "zero_shot_top1"

    def __init__(
        self, folder: str | Path, preprocess, tokenizer, *, precision: str = "fp32", batch_size: int = 64,
        num_workers: int | None = None, cache=None, on_bad_sample: str = "stop", bad_samples=None,
    ):  # fmt: skip
        found = usable(find_images([str(folder)]), str(folder), on_bad_sample, bad_samples, num_workers)
        self.preprocess, self.tokenizer, self.precision = preprocess, tokenizer, precision
        self.for_images = dict(batch_size=batch_size, num_workers=num_workers, cache=cache)
        classes, truth = choose_classes(None, [name for _, name in found], "en", [str(folder)])
        if truth is None or len(classes) < 2:
            raise InputError(f"{folder}: zero-shot accuracy needs a folder with a folder of images for each class")
        self.images, self.words, self.truth = [path for path, _ in found], list(classes.values()), np.array(truth)

    def metric_names(self) -> set[str]:
        top5 = {"zero_shot_top5"} if len(self.words) > 5 else set()
        return {"zero_shot_top1", "zero_shot_mean_per_class_recall"} | top5

    def __call__(self, model: MiniClip) -> dict[str, float]:
        model = model if isinstance(model, InferenceClip) else inference_copy(model, self.precision)
        classifier = build_zero_shot_classifier(model, self.tokenizer, self.words, TEMPLATES["en"])
        embeds = on_all_processes(self.images, partial(embed_images, model, self.preprocess, **self.for_images))
        found = search(classifier.T.numpy(), embeds, min(5, len(self.words)))[1]  # among equals the first
        metrics, _ = classification_metrics(found, self.truth, len(self.words))
        return {f"zero_shot_{name}": value for name, value in metrics.items()}


def make_evaluator(records, folder, preprocess, tokenizer, *, caches=(None, None), bad=(), **how) -> Evaluator | None:
    """The evaluator of caption records, of a folder of classes (`bad`: its bad images), or of both; None without."""
    parts = [RetrievalEvaluator(records, preprocess, tokenizer, caches=caches, **how)] if records else []
    how |= {"cache": caches[0], **dict(bad)}
    parts += [ZeroShotEvaluator(folder, preprocess, tokenizer, **how)] if folder else []
    return Evaluators(parts) if len(parts) > 1 else next(iter(parts), None)
