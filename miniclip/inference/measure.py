"""Measuring embeddings by retrieval, and writing them. Imports no torch."""

from pathlib import Path

import numpy as np

from miniclip.datasets.records import flatten_captions
from miniclip.retrieval import KS, metrics_of, search_both
from miniclip.utils.files import replacing, write_npy


class RetrievalMeasure:
    """The metrics of embeddings of `records`. Keeps `result`, `image_embeds` (N, E) and `text_embeds` (M, E)."""

    def __init__(self, records: list[dict], ks=KS, first_caption_only: bool = False):
        if first_caption_only:
            records = [record | {"caption": record["caption"][:1]} for record in records]
        self.images = [record["image"] for record in records]
        self.texts, image_of_text = flatten_captions(records)
        self.image_of_text = np.array(image_of_text, np.int64)
        # With one caption for each image also K = 3, as in the article.
        self.ks = ks or (KS if len(self.texts) > len(self.images) else (1, 3, 5, 10))

    def measure(self, image_embeds: np.ndarray, text_embeds: np.ndarray) -> dict[str, float]:
        """The metrics of given embeddings."""
        self.image_embeds, self.text_embeds = image_embeds, text_embeds
        self.result = search_both(image_embeds, text_embeds, self.image_of_text, max(self.ks))
        return metrics_of(self.result, self.ks)

    def repeated_captions(self) -> dict | None:
        """What captions that several images share cost: in the metrics, as in published ones, each is right for its own
        image alone. Returns how many such `captions` there are, and `metrics`, the R@K if they count as right for all
        of these images, or None if there are none. As in training, letter case and spaces do not count."""
        known: dict[str, int] = {}
        ids = np.array([known.setdefault(" ".join(text.lower().split()), len(known)) for text in self.texts])
        pairs = np.unique(np.stack([ids, self.image_of_text]), axis=1)  # of a caption and an image that it is right for
        shared = np.bincount(pairs[0])[ids] > 1
        if not shared.any() or not any(self.texts):  # without a caption file the texts are unknown
            return None
        n = len(self.images)
        found = {"image_to_text": ids[self.result["image_to_text"].found] * n + np.arange(n)[:, None]}
        found["text_to_image"] = ids[:, None] * n + self.result["text_to_image"].found
        right = pairs[0] * n + pairs[1]
        metrics = {}
        for way, numbers in found.items():  # of pairs
            hits = np.isin(numbers, right)
            metrics |= {f"{way}_R@{k}": float(hits[:, :k].any(1).mean()) for k in self.ks}
        return {"captions": int(shared.sum()), "metrics": metrics}


def save_features(folder: str | Path, image_embeds: np.ndarray, text_embeds: np.ndarray):
    """Writes embeddings to `image.npy` and `text.npy`; old images never lie beside new texts."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / "image.npy") as image, replacing(folder / "text.npy") as text:
        write_npy(image, np.float32, image_embeds.shape, [image_embeds])
        write_npy(text, np.float32, text_embeds.shape, [text_embeds])
        (folder / "image.npy").unlink(missing_ok=True)
