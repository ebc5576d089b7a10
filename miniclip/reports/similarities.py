"""How much more alike are a picture and its caption than a picture and another's?

All pairs are scored, a block of captions at a time, and only sums and counts of them are kept: the whole matrix of
5,000 pictures and 25,000 captions would be half a gigabyte. From ranks come the recall at every depth, and the queries
that went best and worst. Plain numpy arrays in and out, as in `retrieval.py`.
"""

from typing import NamedTuple

import numpy as np

BINS = 2000  # of the cosine, from -1 to 1: each is 0.001 wide


class Similarities(NamedTuple):
    """What `similarities` gives, of N images and M captions."""

    right: np.ndarray  # (M,) float32: the cosine of each caption and its image
    wrong_image: np.ndarray  # (M,) float32: that of each caption and the nearest wrong image; -inf: there is none
    wrong_text: np.ndarray  # (N,) float32: that of each image and the nearest wrong caption; -inf: there is none
    matching: np.ndarray  # (BINS,) int64: how many of the M matching pairs have a cosine in each bin
    others: np.ndarray  # (BINS,) int64: the same of the N x M - M others
    means: tuple[float, float]  # of matching pairs and of others; NaN where there are none
    p_right: np.ndarray | None  # (M,): what a softmax over the images gives to the right one, where a scale was given
    p_first: np.ndarray | None  # (M,): what it gives to the image that comes first


def similarities(
    image_embeds: np.ndarray, text_embeds: np.ndarray, image_of_text, scale: float | None = None, memory: int = 1 << 25
) -> Similarities:
    """Scores all pairs of N images (N, E) and M captions (M, E), as many captions at a time as have their scores in
    `memory`, in bytes (a few times that is needed). Float32 of unit length; caption m belongs to image
    `image_of_text[m]`. `scale` is what the model multiplies cosines with before its softmax."""
    image_of_text = np.asarray(image_of_text)
    n, m = len(image_embeds), len(text_embeds)
    right, wrong_image, wrong_text = np.empty(m, np.float32), np.empty(m, np.float32), np.full(n, -np.inf, np.float32)
    p_right, p_first = (None, None) if scale is None else (np.empty(m), np.empty(m))
    counts, total = np.zeros(BINS, np.int64), 0.0
    block = max(1, min(1024, memory // (4 * n)))
    for start in range(0, m, block):
        rows = slice(start, start + block)
        scores = text_embeds[rows] @ image_embeds.T
        own = np.arange(len(scores)), image_of_text[rows]
        right[rows] = scores[own]
        counts += histogram(scores)
        total += scores.sum(dtype=np.float64)
        if scale is not None:
            odds = scores - scores.max(1, keepdims=True)  # to the first one's: nothing overflows
            odds = np.exp(np.multiply(odds, scale, out=odds), out=odds)
            p_first[rows] = 1 / odds.sum(1, dtype=np.float64)
            p_right[rows] = odds[own] * p_first[rows]
        scores[own] = -np.inf
        wrong_image[rows] = scores.max(1)
        np.maximum(wrong_text, scores.max(0), out=wrong_text)
    matching, of_right = histogram(right), right.sum(dtype=np.float64)
    means = of_right / m, (total - of_right) / (n * m - m) if n > 1 else float("nan")
    return Similarities(right, wrong_image, wrong_text, matching, counts - matching, means, p_right, p_first)


def histogram(cosines: np.ndarray) -> np.ndarray:
    """How many cosines are in each bin, (BINS,) int64. Bin b begins at 2 b / BINS - 1; what rounding puts beyond 1 or
    -1 is in the last or the first."""
    places = cosines * np.float32(BINS / 2)
    places += np.float32(BINS / 2)
    return np.bincount(places.clip(0, BINS - 1, out=places).astype(np.int32).ravel(), minlength=BINS)


def ordered_right(matching: np.ndarray, others: np.ndarray) -> float:
    """How often a matching pair has the higher cosine of the two, if one of each is drawn: the area under the ROC
    curve, from histograms. Within a bin they are taken as equal, and equal counts half."""
    below = others.cumsum() - others / 2
    return float((matching * below).sum() / (matching.sum() * others.sum()))


def overlap(matching: np.ndarray, others: np.ndarray) -> float:
    """The share of their area that two histograms have in common when both are drawn with an area of 1."""
    return float(np.minimum(matching / matching.sum(), others / others.sum()).sum())


def recall_curve(ranks: np.ndarray, ks) -> np.ndarray:
    """The share of queries whose right answer is among the first K, for each K."""
    return np.searchsorted(np.sort(ranks), ks, side="right") / len(ranks)


def chance_curve(gallery: int, n_relevant: np.ndarray) -> np.ndarray:
    """The same for K from 1 to `gallery` if the order were drawn by lot, (gallery,). `n_relevant` (Q,) has how many
    answers are right for each query."""
    ks, missed = np.arange(1, gallery + 1), np.zeros(gallery)
    for n, queries in zip(*np.unique(n_relevant, return_counts=True)):
        none = np.ones(gallery)  # the chance that none of n right answers is among the first K
        for j in range(min(n, gallery)):
            none *= np.maximum(gallery - ks - j, 0) / (gallery - j)
        missed += none * queries
    return 1 - missed / len(n_relevant)


def worst_queries(ranks: np.ndarray, margins: np.ndarray, image_of_query: np.ndarray, most: int) -> list[int]:
    """The queries whose right answer comes last, of different images, none whose right answer comes first. Among equal
    ranks those come first that the wrong answer beats by the most."""
    order = np.lexsort((np.arange(len(ranks)), margins, -ranks))
    return _of_different_images(order[ranks[order] > 1], image_of_query, most)


def best_queries(ranks: np.ndarray, margins: np.ndarray, image_of_query: np.ndarray, most: int) -> list[int]:
    """The queries whose right answer comes first with the largest margin, of different images. A margin is the cosine
    of the best right answer less that of the best wrong one."""
    order = np.lexsort((np.arange(len(ranks)), -margins))
    return _of_different_images(order[ranks[order] == 1], image_of_query, most)


def _of_different_images(queries: np.ndarray, image_of_query: np.ndarray, most: int) -> list[int]:
    first = {}
    for query in queries:
        if len(first) == most:
            break
        first.setdefault(int(image_of_query[query]), int(query))
    return list(first.values())
