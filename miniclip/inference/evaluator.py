"""TODO docstring."""

import numpy as np

from miniclip.datasets.records import flatten_captions
from miniclip.retrieval import retrieval_metrics


class Tasks:
    """Caption sets, by name, that are measured with the same model. Pictures that they share are encoded once."""

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
