"""How good are the embeddings?

Every caption searches the images and every image the captions, with faiss. The ranks of the right answers give the
field's metrics. All functions take and return plain numpy arrays; none knows a model.

Words: *queries* search the *gallery*; `relevant[q]` holds the gallery rows that are right answers to query q."""

from typing import NamedTuple

import numpy as np

from miniclip.utils.errors import InputError

KS = (1, 5, 10)
TIE = 5e-7  # closer scores are ties: products of the very same vectors differ in the last bits of float32
FEW = 100  # queries; below, a matrix product with all of the gallery is faster than faiss


def search(gallery: np.ndarray, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k gallery rows with the highest inner product for each query, exactly, best first.

    `gallery` (N, E), `queries` (Q, E) float32: scores (Q, k) float32 and rows (Q, k) int64, k at most N. In a tie the
    lower row comes first, as in OpenCLIP: a model that embeds everything alike scores no better than chance."""
    gallery, queries = (np.ascontiguousarray(x, dtype=np.float32) for x in (gallery, queries))
    k = min(k, len(gallery))
    scores, found = _order(*_first(gallery, queries, min(k + 1, len(gallery))))  # one more, to see ties that cross k
    if k < len(gallery):
        for row in np.flatnonzero(scores[:, k - 1] - scores[:, k] <= TIE):  # chance chose which of them to keep
            everything = _order(*_first(gallery, queries[row : row + 1], len(gallery)))
            scores[row, :k], found[row, :k] = (part[0, :k] for part in everything)
    return scores[:, :k], found[:, :k]


def _first(gallery: np.ndarray, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k highest scores of each query, sorted, and their rows."""
    if len(queries) >= FEW:
        import faiss  # slow to import, and a few queries do not need it

        return faiss.knn(queries, gallery, k, metric=faiss.METRIC_INNER_PRODUCT)  # an index would copy the gallery
    scores = queries @ gallery.T
    rows = np.argpartition(scores, len(gallery) - k, axis=1)[:, len(gallery) - k :]
    found = np.take_along_axis(scores, rows, axis=1)
    order = np.argsort(-found, axis=1)
    return np.take_along_axis(found, order, axis=1), np.take_along_axis(rows, order, axis=1)


def _order(scores: np.ndarray, found: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Within each run of ties (scores come sorted), puts the lower row number first."""
    run = np.cumsum(np.diff(scores, axis=1, prepend=scores[:, :1]) < -TIE, axis=1)
    order = np.lexsort((found, run), axis=-1)
    return np.take_along_axis(scores, order, axis=-1), np.take_along_axis(found, order, axis=-1)


def rank_of_first_relevant(gallery, queries, relevant: list[np.ndarray], memory: int = 1 << 28) -> np.ndarray:
    """The rank (1 is best) of each query's first right answer in the whole gallery: (Q,) int64. Counted from whole rows
    of scores, for as many queries at a time as fit in `memory` bytes."""
    ranks = np.empty(len(queries), dtype=np.int64)
    block = max(1, min(1024, memory // (4 * max(1, len(gallery)))))
    for start in range(0, len(queries), block):
        scores = queries[start : start + block] @ gallery.T
        for row, (score, right) in enumerate(zip(scores, relevant[start : start + block])):
            best = score[right].max()
            first = right[score[right] >= best - TIE].min()
            tied_before = np.abs(score[:first] - best) <= TIE
            ranks[start + row] = 1 + (score > best + TIE).sum() + tied_before.sum()
    return ranks


def metrics_from_hits(hits: np.ndarray, ranks: np.ndarray, n_relevant: np.ndarray, ks=KS) -> dict[str, float]:
    """The metrics of one direction, as fractions of 1 except for the ranks.

    `hits` (Q, k): right at this rank? `ranks` (Q,): of the first right answer. `n_relevant` (Q,): right answers in all.

    - `R@K`: share of queries with at least one right answer among the first K. What CLIP papers report.
    - `precision@K`, `recall@K`: right answers among the first K, divided by K and by all right answers.
    - `mean_rank`, `median_rank` (rounded down, as OpenCLIP does), `MRR` (mean of 1 / rank): of the first right one."""
    return {
        **{f"R@{k}": float(hits[:, :k].any(1).mean()) for k in ks},
        **{f"precision@{k}": float(hits[:, :k].sum(1).mean() / k) for k in ks},
        **{f"recall@{k}": float((hits[:, :k].sum(1) / n_relevant).mean()) for k in ks},
        "mean_rank": float(ranks.mean()), "median_rank": float(np.floor(np.median(ranks))),
        "MRR": float((1 / ranks).mean()),
    }  # fmt: skip


class RetrievalResult(NamedTuple):
    """What the queries of one direction retrieved, best first, and where the right answers are."""

    scores: np.ndarray  # (Q, K) float32
    found: np.ndarray  # (Q, K) int64, rows of the gallery
    hits: np.ndarray  # (Q, K) bool: right at this rank?
    ranks: np.ndarray  # (Q,) int64, the rank of the first right answer, wherever it comes
    relevant: list[np.ndarray]  # Q arrays: all gallery rows that are right


def search_both(image_embeds, text_embeds, image_of_text, k: int) -> dict[str, RetrievalResult]:
    """Both directions, `image_to_text` and `text_to_image`: the first k answers to every query.

    `image_embeds` (N, E), `text_embeds` (M, E), float32, of unit length; caption m belongs to image `image_of_text[m]`,
    and any caption of an image is right. Raises InputError for shapes that do not fit, NaN, images without captions."""
    image_of_text = np.asarray(image_of_text)
    check_embeds(image_embeds, text_embeds, image_of_text)
    texts_of_image = np.split(np.argsort(image_of_text, kind="stable"), np.bincount(image_of_text).cumsum()[:-1])
    directions = {}
    for direction, gallery, queries, relevant in (
        ("image_to_text", text_embeds, image_embeds, texts_of_image),
        ("text_to_image", image_embeds, text_embeds, list(image_of_text[:, None])),
    ):
        scores, found = search(gallery, queries, k)
        hits = np.stack([np.isin(row, right) for row, right in zip(found, relevant)])
        ranks = 1 + hits.argmax(1)
        deeper = np.flatnonzero(~hits.any(1))
        ranks[deeper] = rank_of_first_relevant(gallery, queries[deeper], [relevant[q] for q in deeper])
        directions[direction] = RetrievalResult(scores, found, hits, ranks, relevant)
    return directions


def metrics_of(directions: dict[str, RetrievalResult], ks=KS) -> dict[str, float]:
    """The metrics of both directions, and `mean_recall`, the mean of their R@1, R@5 and R@10."""
    metrics = {}
    for direction, result in directions.items():
        n_relevant = np.array([len(right) for right in result.relevant])
        one_way = metrics_from_hits(result.hits, result.ranks, n_relevant, ks)
        metrics |= {f"{direction}_{name}": value for name, value in one_way.items()}
    recalls = [metrics[f"{way}_R@{k}"] for way in ("image_to_text", "text_to_image") for k in ks if k in KS]
    return metrics | {"mean_recall": sum(recalls) / len(recalls)}


def retrieval_metrics(image_embeds: np.ndarray, text_embeds: np.ndarray, image_of_text, ks=KS) -> dict[str, float]:
    """The metrics of embeddings in both directions; arguments and errors as in `search_both`."""
    return metrics_of(search_both(image_embeds, text_embeds, image_of_text, max(ks)), ks)


def check_embeds(image_embeds: np.ndarray, text_embeds: np.ndarray, image_of_text: np.ndarray):
    """Raises InputError for embeddings that cannot be measured."""
    if image_embeds.ndim != 2 or text_embeds.ndim != 2 or image_embeds.shape[1] != text_embeds.shape[1]:
        shapes = f"image embeddings {image_embeds.shape} and text embeddings {text_embeds.shape}"
        raise InputError(f"{shapes} must be 2-D and of the same width: were they made by the same model?")
    if len(image_of_text) != len(text_embeds):
        counts = f"{len(text_embeds)} text embeddings for {len(image_of_text)} captions"
        raise InputError(f"{counts}: were they made from others, or from the first ones only (--captions first)?")
    for kind, embeds in (("image", image_embeds), ("text", text_embeds)):
        norms = np.sqrt(np.einsum("nd,nd->n", embeds, embeds))  # np.linalg.norm would copy them all
        bad = np.flatnonzero(~np.isfinite(norms))
        if len(bad):
            raise InputError(f"{kind} embedding {bad[0]} is not finite ({len(bad)} of {len(embeds)} are not)")
        off = np.abs(norms - 1)
        if off.max(initial=0) > 1e-3:
            raise InputError(f"{kind} embedding {off.argmax()} is not of unit length: divide each row by its norm")
    if len(image_embeds) == 0 or not np.array_equal(np.unique(image_of_text), np.arange(len(image_embeds))):
        raise InputError(f"{len(image_embeds)} images, but captions for {len(np.unique(image_of_text))} of them")
