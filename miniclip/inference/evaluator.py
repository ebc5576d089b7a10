"""Retrieval evaluation over whole caption sets, during training and in evaluate.py."""

from functools import partial
from pathlib import Path

import numpy as np
import torch

from miniclip.data import text_id
from miniclip.datasets.records import flatten_captions
from miniclip.inference.embed import embed_images, embed_patches, embed_texts, embed_words, on_all_processes
from miniclip.inference.fast import InferenceClip, inference_copy
from miniclip.inference.late_interaction import position_caches, rerank, reranked
from miniclip.model import MiniClip
from miniclip.retrieval import KS, metrics_of, retrieval_metrics, search_both
from miniclip.utils.files import replacing, write_npy


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


class RetrievalEvaluator(Evaluator):
    """Evaluates models, or inference copies of them, on `records` as `read_captions` returns them, on all processes.

    Late interaction re-ranks the first `rerank` results of each query: by default 100, or none of a model without it.
    `caches` are feature caches for images and texts; `num_workers` threads read images. For reports it keeps the last
    `result` by direction, `image_embeds` (N, E) and `text_embeds` (M, E)."""

    def __init__(
        self, records: list[dict], preprocess, tokenizer, *, precision: str = "fp32", first_caption_only: bool = False,
        ks=KS, batch_size: int = 64, text_batch_size: int | None = None, caches=(None, None),
        num_workers: int | None = None, progress: bool = False, rerank: int | None = None,
    ):  # fmt: skip
        self.preprocess, self.tokenizer, self.precision, self.rerank = preprocess, tokenizer, precision, rerank
        self.for_images = dict(batch_size=batch_size, num_workers=num_workers, progress=progress, cache=caches[0])
        self.for_texts = dict(batch_size=text_batch_size or batch_size, progress=progress, cache=caches[1])
        self.positions = ()  # caches of their features, made when they are needed
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
        fast = inference_copy(model, self.precision)
        images = partial(embed_images, fast, self.preprocess, **self.for_images)
        texts = partial(embed_texts, fast, self.tokenizer, **self.for_texts)
        metrics = self.measure(on_all_processes(self.images, images), on_all_processes(self.texts, texts))
        return metrics if (n := reranked(model, self.rerank)) == 0 else self.measure_again(model, n)

    def measure_again(self, model: MiniClip, n: int) -> dict[str, float]:
        """The metrics when late interaction has re-ranked the first n results of each query."""
        if not self.positions:
            self.positions = position_caches(model, self.preprocess, self.for_images["cache"], self.for_texts["cache"])
        patches = embed_patches(model, self.preprocess, self.images, **self.for_images | {"cache": self.positions[0]})
        words = embed_words(model, self.tokenizer, self.texts, **self.for_texts | {"cache": self.positions[1]})
        first = search_both(self.image_embeds, self.text_embeds, self.image_of_text, max(n, *self.ks))
        self.result = rerank(first, words, patches, n)
        return metrics_of(self.result, self.ks)

    def measure(self, image_embeds: np.ndarray, text_embeds: np.ndarray) -> dict[str, float]:
        """The metrics of given embeddings."""
        self.image_embeds, self.text_embeds = image_embeds, text_embeds
        self.result = search_both(image_embeds, text_embeds, self.image_of_text, max(self.ks))
        return metrics_of(self.result, self.ks)

    def repeated_captions(self) -> dict | None:
        """What captions that several images share cost: in the metrics, as in published ones, each is right for its own
        image alone. Returns how many such `captions` there are, and `metrics`, the R@K if they count as right for all
        of these images, or None if there are none. As in training, letter case and spaces do not count."""
        ids = np.unique([text_id(text) for text in self.texts], return_inverse=True)[1]
        pairs = np.unique(np.stack([ids, self.image_of_text]), axis=1)  # of a caption and an image that it is right for
        shared = np.bincount(pairs[0])[ids] > 1
        if not shared.any() or not any(self.texts):  # without a caption file the texts are unknown
            return None
        n, (images, texts) = len(self.images), (self.result[way] for way in ("image_to_text", "text_to_image"))
        right, metrics = pairs[0] * n + pairs[1], {}
        for way, found in (
            ("image_to_text", ids[images.found] * n + np.arange(n)[:, None]),
            ("text_to_image", ids[:, None] * n + texts.found),
        ):
            hits = np.isin(found, right)
            metrics |= {f"{way}_R@{k}": float(hits[:, :k].any(1).mean()) for k in self.ks}
        return {"captions": int(shared.sum()), "metrics": metrics}

    def check_precision(self, model: MiniClip) -> str:
        """One line on how close the embeddings are to those of the plain model in fp32, of the first few."""
        if isinstance(model, InferenceClip):
            return model.about
        n, device = 8 if self.precision == "fp32" else 64, model.logit_scale.device
        pixel_values = torch.stack([self.preprocess.load(path) for path in self.images[:n]]).to(device)
        input_ids = self.tokenizer(self.texts[:n], trim=True).to(device)
        with torch.inference_mode():
            models = model, inference_copy(model, self.precision)
            exact, ours = ((m.encode_image(pixel_values, True), m.encode_text(input_ids, True)) for m in models)
        image, text = ((a * b).sum(dim=1).min() for a, b in zip(exact, ours))
        cosines = f"at least {image:.6f} (images), {text:.6f} (texts), of the first {len(pixel_values)}"
        return f"{self.precision}: cosine to plain fp32 {cosines}"


def save_features(folder: str | Path, image_embeds: np.ndarray, text_embeds: np.ndarray):
    """Writes embeddings to `image.npy` and `text.npy`; old images never lie beside new texts."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / "image.npy") as image, replacing(folder / "text.npy") as text:
        write_npy(image, np.float32, image_embeds.shape, [image_embeds])
        write_npy(text, np.float32, text_embeds.shape, [text_embeds])
        (folder / "image.npy").unlink(missing_ok=True)
