"""Retrieval evaluation over whole caption sets, during training and in evaluate.py."""

from functools import partial

import numpy as np
import torch

from miniclip.inference.embed import embed_images, embed_patches, embed_texts, embed_words, on_all_processes
from miniclip.inference.fast import InferenceClip, inference_copy
from miniclip.inference.late_interaction import position_caches, rerank, reranked
from miniclip.inference.measure import RetrievalMeasure
from miniclip.model import MiniClip
from miniclip.retrieval import KS, metrics_of, retrieval_metrics, search_both


class Evaluator:
    """Base class: `evaluator(model)` returns metrics by name. The best model is the best by `primary_metric`."""

    primary_metric = "mean_recall"

    def metric_names(self) -> set[str]:
        """All metric names, so that a wrong one is refused early; empty if they are not known in advance."""
        return set()


class Evaluators(Evaluator):
    """Several evaluators as one, with the metrics of all and the `primary_metric` of the first."""

    def __init__(self, parts: list[Evaluator]):
        self.parts, self.primary_metric = parts, parts[0].primary_metric

    def metric_names(self) -> set[str]:
        return set().union(*(part.metric_names() for part in self.parts))

    def __call__(self, model: MiniClip) -> dict[str, float]:
        return {name: value for part in self.parts for name, value in part(model).items()}


class RetrievalEvaluator(RetrievalMeasure, Evaluator):
    """Evaluates models, or inference copies of them, on `records` as `read_captions` returns them, on all processes.

    Late interaction re-ranks the first `rerank` results of each query: by default 100, or none of a model without it.
    `caches` are feature caches for images and texts; `num_workers` threads read images."""

    def __init__(
        self, records: list[dict], preprocess, tokenizer, *, precision: str = "fp32", first_caption_only: bool = False,
        ks=KS, batch_size: int = 64, text_batch_size: int | None = None, caches=(None, None),
        num_workers: int | None = None, progress: bool = False, rerank: int | None = None,
    ):  # fmt: skip
        self.preprocess, self.tokenizer, self.precision, self.rerank = preprocess, tokenizer, precision, rerank
        self.for_images = dict(batch_size=batch_size, num_workers=num_workers, progress=progress, cache=caches[0])
        self.for_texts = dict(batch_size=text_batch_size or batch_size, progress=progress, cache=caches[1])
        self.positions = ()  # caches of their features, made when they are needed
        super().__init__(records, ks, first_caption_only)

    def metric_names(self) -> set[str]:
        one = np.eye(1, dtype=np.float32)
        return set(retrieval_metrics(one, one, [0], self.ks))

    def __call__(self, model: MiniClip) -> dict[str, float]:
        fast = inference_copy(model, self.precision)
        n = reranked(model, self.rerank)  # refused before the work
        images = partial(embed_images, fast, self.preprocess, **self.for_images)
        texts = partial(embed_texts, fast, self.tokenizer, **self.for_texts)
        metrics = self.measure(on_all_processes(self.images, images), on_all_processes(self.texts, texts))
        return self.measure_again(model, n) if n else metrics

    def measure_again(self, model: MiniClip, n: int) -> dict[str, float]:
        """The metrics when late interaction has re-ranked the first n results of each query."""
        if not self.positions:
            self.positions = position_caches(model, self.preprocess, self.for_images["cache"], self.for_texts["cache"])
        patches = embed_patches(model, self.preprocess, self.images, **self.for_images | {"cache": self.positions[0]})
        words = embed_words(model, self.tokenizer, self.texts, **self.for_texts | {"cache": self.positions[1]})
        first = search_both(self.image_embeds, self.text_embeds, self.image_of_text, max(n, *self.ks))
        self.result = rerank(first, words, patches, n)
        return metrics_of(self.result, self.ks)

    def check_precision(self, model: MiniClip) -> str:
        """One line on how close the embeddings are to those of the plain model in fp32, of the first few."""
        if isinstance(model, InferenceClip):
            return model.about
        n = 8 if self.precision == "fp32" else 64
        pixel_values = torch.stack(list(map(self.preprocess.load, self.images[:n]))).to(model.logit_scale.device)
        input_ids = self.tokenizer(self.texts[:n], trim=True).to(model.logit_scale.device)
        with torch.inference_mode():
            models = model, inference_copy(model, self.precision)
            exact, ours = ((m.encode_image(pixel_values, True), m.encode_text(input_ids, True)) for m in models)
        image, text = ((a * b).sum(dim=1).min() for a, b in zip(exact, ours))
        cosines = f"at least {image:.6f} (images), {text:.6f} (texts), of the first {len(pixel_values)}"
        return f"{self.precision}: cosine to plain fp32 {cosines}"
