"""Retrieval evaluation over whole caption sets, during training and in evaluate.py."""

import math
from functools import partial
from pathlib import Path

import numpy as np
import torch

from miniclip.datasets.records import flatten_captions
from miniclip.inference.embed import embed_images, embed_texts, on_all_processes
from miniclip.inference.fast import InferenceClip, inference_copy
from miniclip.inference.feature_cache import FeatureCache
from miniclip.inference.load import load
from miniclip.inference.matmul import suggest_bf16
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


class RetrievalEvaluator(Evaluator):
    """Evaluates models, or inference copies of them, on `records` as `read_captions` returns them, on all processes.

    `caches` are feature caches for images and texts; `num_workers` threads read images. For reports it keeps the last
    `result` by direction, `image_embeds` (N, E) and `text_embeds` (M, E)."""

    def __init__(
        self, records: list[dict], preprocess, tokenizer, *, precision: str = "fp32", first_caption_only: bool = False,
        ks=KS, batch_size: int = 64, text_batch_size: int | None = None, caches=(None, None),
        num_workers: int | None = None, progress: bool = False,
    ):  # fmt: skip
        self.preprocess, self.tokenizer, self.precision = preprocess, tokenizer, precision
        self.for_images = dict(batch_size=batch_size, num_workers=num_workers, progress=progress, cache=caches[0])
        self.for_texts = dict(batch_size=text_batch_size or batch_size, progress=progress, cache=caches[1])
        if first_caption_only:
            records = [record | {"caption": record["caption"][:1]} for record in records]
        self.images = [record["image"] for record in records]
        self.texts, image_of_text = flatten_captions(records)
        self.image_of_text = np.array(image_of_text, np.int64)
        # With one caption for each image also K = 3, as in the article.
        self.ks = ks or (KS if len(self.texts) > len(self.images) else (1, 3, 5, 10))

    def metric_names(self) -> set[str]:
        one = np.eye(1, dtype=np.float32)
        return set(retrieval_metrics(one, one, [0], self.ks))

    def __call__(self, model: MiniClip) -> dict[str, float]:
        model = model if isinstance(model, InferenceClip) else inference_copy(model, self.precision)
        images = partial(embed_images, model, self.preprocess, **self.for_images)
        texts = partial(embed_texts, model, self.tokenizer, **self.for_texts)
        return self.measure(on_all_processes(self.images, images), on_all_processes(self.texts, texts))

    def measure(self, image_embeds: np.ndarray, text_embeds: np.ndarray) -> dict[str, float]:
        """The metrics of given embeddings."""
        self.image_embeds, self.text_embeds = image_embeds, text_embeds
        self.result = search_both(image_embeds, text_embeds, self.image_of_text, max(self.ks))
        return metrics_of(self.result, self.ks)

    def check_precision(self, model: MiniClip) -> str:
        """One line on how close the embeddings are to those of the plain model in fp32, of the first few."""
        n, device = 8 if self.precision == "fp32" else 64, model.logit_scale.device
        pixel_values = torch.stack([self.preprocess.load(path) for path in self.images[:n]]).to(device)
        input_ids = self.tokenizer(self.texts[:n], trim=True).to(device)
        with torch.inference_mode():
            models = model, inference_copy(model, self.precision)
            exact, ours = ((m.encode_image(pixel_values, True), m.encode_text(input_ids, True)) for m in models)
        image, text = ((a * b).sum(dim=1).min() for a, b in zip(exact, ours))
        cosines = f"at least {image:.6f} (images), {text:.6f} (texts), of the first {len(pixel_values)}"
        return f"{self.precision}: cosine to plain fp32 {cosines}"


def evaluate_model(options, records: list[dict], device) -> tuple[RetrievalEvaluator, dict, dict, list[str]]:
    """Measures the model that evaluate.py's options name. Returns the evaluator, the metrics, the temperature (scale,
    bias and initial scale), and notes on what was truncated."""
    suggest_bf16(options.precision, device)
    model, preprocess, tokenizer = load(options.model, options.pretrained, device)
    preprocess, cache = Preprocess(model.config.preprocess_cfg, options.decode), None
    if options.feature_cache:
        cache = FeatureCache.for_images(options.feature_cache, model, preprocess, options.precision)
    image_batch, text_batch = (32, 64) if device.type == "cpu" else (256, 256)
    evaluator = RetrievalEvaluator(
        records, preprocess, tokenizer, ks=None, precision=options.precision, progress=True, caches=(cache, None),
        first_caption_only=options.captions == "first", batch_size=options.batch_size or image_batch,
        text_batch_size=options.batch_size or text_batch, num_workers=options.num_workers,
    )  # fmt: skip
    metrics, notes = evaluator(model), []
    if tokenizer.truncated:
        length = tokenizer.context_length
        notes.append(f"{tokenizer.truncated} of {len(evaluator.texts)} captions were truncated to {length} tokens")
        print(notes[0])
    if cache is not None:
        print(f"{cache.reused} of {len(evaluator.images)} images were in {options.feature_cache}")
    print(evaluator.check_precision(model))
    scale, bias, start = model.logit_scale.exp().item(), model.logit_bias, math.exp(model.config.init_logit_scale)
    return evaluator, metrics, {"scale": scale, "bias": None if bias is None else bias.item(), "start": start}, notes


def read_features(folder: str | Path, records: list[dict] | None, first_caption_only: bool):
    """Embeddings made elsewhere: `image.npy` (N, E) and `text.npy` (M, E), and their records. Without `records` each
    image has M / N captions. If only first captions count, those of the others are dropped."""
    images, texts = (np.load(Path(folder) / f"{kind}.npy").astype(np.float32, copy=False) for kind in ("image", "text"))
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
