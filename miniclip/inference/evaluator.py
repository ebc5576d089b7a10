"""Retrieval evaluation over whole caption sets, during training and in evaluate.py."""

from functools import partial

import numpy as np
import torch.distributed as dist

from miniclip.datasets.records import flatten_captions
from miniclip.inference.embed import embed_images, embed_texts
from miniclip.inference.fast import inference_copy
from miniclip.model import MiniClip
from miniclip.retrieval import KS, metrics_of, retrieval_metrics, search_both


class Evaluator:
    """Base class: `evaluator(model)` returns metrics by name. The best model is the best by `primary_metric`."""

    primary_metric = "mean_recall"

    def metric_names(self) -> set[str]:
        """All metric names, so that a wrong one is refused early; empty if they are not known in advance."""
        return set()

    def __call__(self, model: MiniClip) -> dict[str, float]:
        raise NotImplementedError


class RetrievalEvaluator(Evaluator):
    """Evaluates models on `records`, as `read_captions` returns them.

    Several processes share the embedding. `caches` are feature caches for images and texts; `options` go to
    `embed_images`. For reports it keeps the last `result` by direction, `image_embeds` (N, E) and `text_embeds` (M, E).
    """

    def __init__(
        self, records: list[dict], preprocess, tokenizer, *, precision: str = "fp32", first_caption_only: bool = False,
        ks=KS, batch_size: int = 64, text_batch_size: int | None = None, caches=(None, None), **options,
    ):  # fmt: skip
        self.preprocess, self.tokenizer, self.precision, self.ks = preprocess, tokenizer, precision, ks
        self.batch_size, self.text_batch_size = batch_size, text_batch_size or batch_size
        self.caches, self.options = caches, options
        self.images = [record["image"] for record in records]
        captions = [record["caption"][: 1 if first_caption_only else None] for record in records]
        self.texts, self.image_of_text = flatten_captions([{"caption": each} for each in captions])

    def metric_names(self) -> set[str]:
        one = np.eye(1, dtype=np.float32)
        return set(retrieval_metrics(one, one, [0], self.ks))

    def embed(self, model: MiniClip) -> tuple[np.ndarray, np.ndarray]:
        """The embeddings of all images (N, E) and of all captions (M, E), by an inference copy of the model."""
        model, (image_cache, text_cache) = inference_copy(model, self.precision), self.caches
        images = {"batch_size": self.batch_size, "cache": image_cache, **self.options}
        texts = {"batch_size": self.text_batch_size, "cache": text_cache}
        texts["progress"] = self.options.get("progress", False)
        return (
            on_all_processes(self.images, partial(embed_images, model, self.preprocess, **images)),
            on_all_processes(self.texts, partial(embed_texts, model, self.tokenizer, **texts)),
        )

    def __call__(self, model: MiniClip) -> dict[str, float]:
        self.image_embeds, self.text_embeds = self.embed(model)
        return self.measure(self.image_embeds, self.text_embeds)

    def measure(self, image_embeds: np.ndarray, text_embeds: np.ndarray) -> dict[str, float]:
        """The metrics of given embeddings."""
        self.result = search_both(image_embeds, text_embeds, self.image_of_text, max(self.ks))
        return metrics_of(self.result, self.ks)


def on_all_processes(items: list, embed) -> np.ndarray:
    """`embed(items)` on every process, of which process i of n computes items i, i + n, i + 2n, ..."""
    n = dist.get_world_size() if dist.is_initialized() else 1
    if n == 1:
        return embed(items)
    shares: list = [None] * n
    dist.all_gather_object(shares, embed(items[dist.get_rank() :: n]))
    embeds = np.empty((len(items), shares[0].shape[1]), np.float32)
    for rank, share in enumerate(shares):
        embeds[rank::n] = share
    return embeds


class Tasks:
    """Caption sets by name for one model, which encodes images that they share only once."""

    def __init__(self, records: dict[str, list[dict]]):
        self.images = list(dict.fromkeys(record["image"] for task in records.values() for record in task))
        self.texts, self.places = [], {}
        row = {path: i for i, path in enumerate(self.images)}
        for name, task in records.items():
            texts, image_of_text = flatten_captions(task)
            rows = np.array([row[record["image"]] for record in task])
            self.places[name] = rows, slice(len(self.texts), len(self.texts) + len(texts)), image_of_text
            self.texts += texts

    def measure(self, image_embeds: np.ndarray, text_embeds: np.ndarray) -> dict[str, dict[str, float]]:
        """The metrics of each task, from the embeddings of `images` (N, E) and of `texts` (M, E)."""
        return {
            name: retrieval_metrics(image_embeds[rows], text_embeds[texts], image_of_text)
            for name, (rows, texts, image_of_text) in self.places.items()
        }
