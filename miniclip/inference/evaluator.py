"""Retrieval evaluation over whole caption sets, during training and in evaluate.py."""

import math
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from miniclip.datasets.records import flatten_captions
from miniclip.inference.embed import embed_images, embed_texts
from miniclip.inference.fast import cosine_to_fp32, inference_copy
from miniclip.inference.feature_cache import FeatureCache
from miniclip.inference.load import load
from miniclip.model import MiniClip
from miniclip.retrieval import KS, metrics_of, retrieval_metrics, search_both
from miniclip.transforms import Preprocess
from miniclip.utils.files import replacing, write_npy


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
        self.preprocess, self.tokenizer, self.precision = preprocess, tokenizer, precision
        self.batch_size, self.text_batch_size = batch_size, text_batch_size or batch_size
        self.caches, self.options = caches, options
        self.images = [record["image"] for record in records]
        captions = [record["caption"][: 1 if first_caption_only else None] for record in records]
        self.texts, image_of_text = flatten_captions([{"caption": each} for each in captions])
        self.image_of_text = np.array(image_of_text, np.int64)
        # With one caption for each image also K = 3, as in the article.
        self.ks = ks or (KS if len(self.texts) > len(self.images) else (1, 3, 5, 10))

    def metric_names(self) -> set[str]:
        one = np.eye(1, dtype=np.float32)
        return set(retrieval_metrics(one, one, [0], self.ks))

    def check_precision(self, model: MiniClip) -> str:
        """One line on how close the embeddings are to those of the plain model in fp32, of the first few."""
        sample, device = slice(0, 8 if self.precision == "fp32" else 64), model.logit_scale.device
        pixel_values = torch.stack([self.preprocess.load(path) for path in self.images[sample]]).to(device)
        input_ids = self.tokenizer(self.texts[sample], trim=True).to(device)
        cosines = cosine_to_fp32(inference_copy(model, self.precision), model, pixel_values, input_ids)
        return (
            f"{self.precision}: cosine to plain fp32 at least {cosines[0]:.6f} (images), {cosines[1]:.6f} (texts),"
            f" of the first {len(pixel_values)}"
        )

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
        return self.measure(*self.embed(model))

    def measure(self, image_embeds: np.ndarray, text_embeds: np.ndarray) -> dict[str, float]:
        """The metrics of given embeddings."""
        self.image_embeds, self.text_embeds = image_embeds, text_embeds
        self.result = search_both(image_embeds, text_embeds, self.image_of_text, max(self.ks))
        return metrics_of(self.result, self.ks)


def evaluate_model(options, records: list[dict], device) -> tuple[RetrievalEvaluator, dict, dict, list[str]]:
    """Measures the model that evaluate.py's options name. Returns the evaluator, the metrics, the temperature (scale,
    bias and initial scale), and notes on what was truncated."""
    model, preprocess, tokenizer = load(options.model, options.pretrained, device)
    preprocess = Preprocess(model.config.preprocess_cfg, draft=not options.full_decode)
    cache = None
    if options.feature_cache:
        cache = FeatureCache.for_images(options.feature_cache, model, preprocess, options.precision)
    sizes = (32, 64) if device.type == "cpu" else (256, 256)
    sizes = (options.batch_size,) * 2 if options.batch_size else sizes
    evaluator = RetrievalEvaluator(
        records, preprocess, tokenizer, ks=None, precision=options.precision, batch_size=sizes[0],
        text_batch_size=sizes[1], first_caption_only=options.captions == "first", caches=(cache, None),
        num_workers=options.num_workers, progress=True,
    )  # fmt: skip
    metrics, notes = evaluator(model), []
    if tokenizer.truncated:
        length = tokenizer.context_length
        notes.append(f"{tokenizer.truncated} of {len(evaluator.texts)} captions were truncated to {length} tokens")
        print(notes[0])
    if cache is not None:
        print(f"{cache.reused} of {len(evaluator.images)} images were in {options.feature_cache}")
    print(evaluator.check_precision(model))
    bias, start = model.logit_bias, math.exp(model.config.init_logit_scale)
    temperature = {"scale": model.logit_scale.exp().item(), "bias": None if bias is None else bias.item()}
    return evaluator, metrics, temperature | {"start": start}, notes


def read_features(folder: str | Path, records: list[dict] | None, first_caption_only: bool):
    """Embeddings that were saved or made elsewhere: `image.npy` (N, E) and `text.npy` (M, E), and their records.

    Without `records` each image has M / N captions. If only first captions count, those of the others are dropped.
    """
    arrays = (np.load(Path(folder) / f"{kind}.npy") for kind in ("image", "text"))
    images, texts = (array.astype(np.float32, copy=False) for array in arrays)
    if records is None:
        records = [{"image": row, "caption": [""] * (len(texts) // len(images))} for row in range(len(images))]
    counts = [len(record["caption"]) for record in records]
    if first_caption_only and len(texts) == sum(counts):
        texts = texts[np.cumsum([0, *counts[:-1]])]
    return images, texts, records


def save_features(folder: str | Path, image_embeds: np.ndarray, text_embeds: np.ndarray):
    """Writes embeddings to `image.npy` and `text.npy`; old images never lie beside new texts."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / "image.npy") as image, replacing(folder / "text.npy") as text:
        write_npy(image, np.float32, image_embeds.shape, [image_embeds])
        write_npy(text, np.float32, text_embeds.shape, [text_embeds])
        (folder / "image.npy").unlink(missing_ok=True)


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
