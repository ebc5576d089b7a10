"""Cosines of matching pairs and of all others: histograms, ROC AUC, probabilities, chance, best and worst queries.

Pairs are scored a block at a time, for sums and counts: 5,000 images and 25,000 captions take half a gigabyte."""

from typing import NamedTuple

import numpy as np

BINS = 2000  # of the cosine, from -1 to 1: each is 0.001 wide


class Similarities(NamedTuple):
    """What `similarities` returns for N images and M captions."""

    right: np.ndarray  # (M,) float32: cosine of each caption and its image
    wrong_image: np.ndarray  # (M,) float32: cosine of each caption and its nearest wrong image; -inf if there is none
    wrong_text: np.ndarray  # (N,) float32: cosine of each image and its nearest wrong caption; -inf if there is none
    matching: np.ndarray  # (BINS,) int64: number of the M matching pairs in each bin
    others: np.ndarray  # (BINS,) int64: number of the N x M - M other pairs in each bin
    means: tuple[float, float]  # of matching pairs and of others; NaN if there are none
    p_right: np.ndarray | None  # (M,): softmax probability of the correct image, where a scale was given
    p_first: np.ndarray | None  # (M,): softmax probability of the image that ranks first


def similarities(
    image_embeds: np.ndarray, text_embeds: np.ndarray, image_of_text, scale: float | None = None, memory: int = 1 << 25
) -> Similarities:
    """Scores all pairs of N images (N, E) and M captions (M, E), float32 of unit length, caption m being one of image
    `image_of_text[m]`. `scale`: the logit scale. A block of scores takes `memory` bytes, the peak a few times that."""
    n, m = len(image_embeds), len(text_embeds)
    (right, wrong_image), wrong_text = np.empty((2, m), np.float32), np.full(n, -np.inf, np.float32)
    p_right, p_first = (None, None) if scale is None else np.empty((2, m))
    block = max(1, min(1024, memory // (4 * n)))  # captions at a time
    counts, total = np.zeros(BINS, np.int64), 0.0  # of all pairs
    for start in range(0, m, block):
        rows = slice(start, start + block)
        scores = text_embeds[rows] @ image_embeds.T
        own = np.arange(len(scores)), image_of_text[rows]
        right[rows] = scores[own]
        counts += histogram(scores)
        total += scores.sum(dtype=np.float64)
        if scale is not None:
            odds = np.exp((scores - scores.max(1, keepdims=True)) * scale)  # relative to the first: no overflow
            p_first[rows] = 1 / odds.sum(1, dtype=np.float64)
            p_right[rows] = odds[own] * p_first[rows]
        scores[own] = -np.inf
        wrong_image[rows] = scores.max(1)
        np.maximum(wrong_text, scores.max(0), out=wrong_text)
    matching, of_right = histogram(right), right.sum(dtype=np.float64)
    means = of_right / m, (total - of_right) / (n * m - m) if n > 1 else float("nan")
    return Similarities(right, wrong_image, wrong_text, matching, counts - matching, means, p_right, p_first)


def histogram(cosines: np.ndarray) -> np.ndarray:
    """The number of cosines in each bin, (BINS,) int64. Bin b begins at 2 b / BINS - 1; rounding is clipped."""
    places = (cosines * np.float32(BINS / 2) + np.float32(BINS / 2)).clip(0, BINS - 1)
    return np.bincount(places.astype(np.int32).ravel(), minlength=BINS)


def roc_auc(matching: np.ndarray, others: np.ndarray) -> float:
    """The area under the ROC curve, from histograms. Pairs in the same bin count half."""
    return float((matching * (others.cumsum() - others / 2)).sum() / (matching.sum() * others.sum()))


def overlap(matching: np.ndarray, others: np.ndarray) -> float:
    """The area that two histograms share when each is scaled to an area of 1."""
    return float(np.minimum(matching / matching.sum(), others / others.sum()).sum())


def recall_curve(ranks: np.ndarray, ks) -> np.ndarray:
    """R@K for each K: the share of queries whose first relevant result is among the first K."""
    return np.searchsorted(np.sort(ranks), ks, side="right") / len(ranks)


def chance_curve(gallery: int, n_relevant: np.ndarray) -> np.ndarray:
    """R@K of a random order for K from 1 to `gallery`. `n_relevant` (Q,): number of relevant results per query."""
    ks, missed = np.arange(1, gallery + 1), np.zeros(gallery)
    for n, queries in zip(*np.unique(n_relevant, return_counts=True)):
        left = gallery - np.arange(min(n, gallery))[:, None]  # results not yet drawn when each relevant one is
        missed += queries * (np.maximum(left - ks, 0) / left).prod(axis=0)  # none is among the first K
    return 1 - missed / len(n_relevant)


def worst_and_best(ranks: np.ndarray, margins: np.ndarray, image_of_query: np.ndarray, n_worst: int, n_best: int):
    """The worst queries, by rank and then lowest margin, and the best, by largest margin: at most one of each image."""
    worst, best = np.lexsort((margins, -ranks)), np.argsort(-margins, kind="stable")
    chosen = []
    for queries, most in (worst[ranks[worst] > 1], n_worst), (best[ranks[best] == 1], n_best):
        first = np.sort(np.unique(image_of_query[queries], return_index=True)[1])
        chosen.append(queries[first[:most]].tolist())
    return chosen
