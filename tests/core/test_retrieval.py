"""Metrics against numbers worked out by hand, and against the figures published for TinyCLIP's vectors."""

import numpy as np
import pytest

from miniclip.reports.html_page import format_table
from miniclip.retrieval import FEW, metrics_from_hits, rank_of_first_relevant, retrieval_metrics, search


def unit(rows) -> np.ndarray:
    rows = np.asarray(rows, np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def from_similarity(similarity) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors (images, texts) whose order of similarity is that of the matrix (images, texts)."""
    similarity = np.asarray(similarity, np.float64)
    n, m = similarity.shape
    images, texts = np.eye(n, n + m), np.zeros((m, n + m))
    texts[:, :n] = 0.1 * similarity.T
    texts[np.arange(m), n + np.arange(m)] = np.sqrt(1 - (texts**2).sum(1))
    return images.astype(np.float32), texts.astype(np.float32)


def test_one_caption_each_by_hand():
    # rows: images, columns: captions; caption i belongs to image i
    images, texts = from_similarity([
        [0.9, 0.1, 0.2, 0.0],  # image 0: its caption comes 1st
        [0.8, 0.5, 0.6, 0.7],  # image 1: 4th
        [0.1, 0.2, 0.9, 0.3],  # image 2: 1st
        [0.3, 0.4, 0.1, 0.2],  # image 3: 3rd
    ])  # fmt: skip
    metrics = retrieval_metrics(images, texts, [0, 1, 2, 3], ks=(1, 3))
    assert metrics["image_to_text_R@1"] == 0.5
    assert metrics["image_to_text_R@3"] == 0.75
    assert metrics["image_to_text_mean_rank"] == (1 + 4 + 1 + 3) / 4
    assert metrics["image_to_text_median_rank"] == 2
    assert metrics["image_to_text_MRR"] == pytest.approx((1 + 1 / 4 + 1 + 1 / 3) / 4)
    # captions: 0 -> image 0 (1st), 1 -> image 1 (1st), 2 -> image 2 (1st), 3 -> image 3 behind images 1 and 2 (3rd)
    assert metrics["text_to_image_R@1"] == 0.75
    assert metrics["text_to_image_R@3"] == 1.0
    assert metrics["text_to_image_mean_rank"] == 1.5
    assert metrics["mean_recall"] == pytest.approx((0.5 + 0.75) / 2)  # R@3 is not among the usual three


def test_several_captions_by_hand():
    # image 0 has captions 0, 1, 2; image 1 has captions 3, 4
    images, texts = from_similarity([
        [0.9, 0.2, 0.7, 0.8, 0.1],  # order 0, 3, 2, 1, 4: hits at places 1, 3, 4
        [0.6, 0.5, 0.9, 0.2, 0.7],  # order 2, 4, 0, 1, 3: hits at places 2, 5
    ])  # fmt: skip
    metrics = retrieval_metrics(images, texts, [0, 0, 0, 1, 1], ks=(1, 2, 3))
    assert metrics["image_to_text_R@1"] == 0.5  # any caption counts
    assert metrics["image_to_text_R@2"] == 1.0
    assert metrics["image_to_text_precision@3"] == pytest.approx((2 / 3 + 1 / 3) / 2)
    assert metrics["image_to_text_recall@3"] == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert metrics["image_to_text_recall@1"] == pytest.approx((1 / 3 + 0) / 2)
    assert metrics["image_to_text_mean_rank"] == 1.5
    # captions 0 and 1 prefer image 0 and image 1; 2 prefers 1; 3 prefers 0; 4 prefers 1
    assert metrics["text_to_image_R@1"] == pytest.approx(2 / 5)


def test_metrics_from_hits_by_hand():
    hits = np.array([[False, True, True], [False, False, False]])
    metrics = metrics_from_hits(hits, np.array([2, 9]), np.array([2, 1]), ks=(1, 2, 3))
    assert [metrics[f"R@{k}"] for k in (1, 2, 3)] == [0.0, 0.5, 0.5]
    assert metrics["precision@3"] == pytest.approx(1 / 3) and metrics["recall@2"] == 0.25
    assert (metrics["mean_rank"], metrics["median_rank"]) == (5.5, 5.0)
    assert metrics["MRR"] == pytest.approx((1 / 2 + 1 / 9) / 2)


@pytest.mark.parametrize(("n", "width"), [(7, 4), (64, 16), (500, 512), (1023, 512)])
def test_a_collapsed_model_scores_as_chance_does(n, width):
    """With one embedding for everything, faiss could put the right answer anywhere; we must not profit from it."""
    same = np.tile(unit(np.random.default_rng(n).standard_normal((1, width))), (n, 1))
    metrics = retrieval_metrics(same, same, np.arange(n))
    for k in (1, 5):
        assert metrics[f"text_to_image_R@{k}"] == pytest.approx(k / n)
        assert metrics[f"image_to_text_R@{k}"] == pytest.approx(k / n)
    assert metrics["text_to_image_mean_rank"] == metrics["image_to_text_mean_rank"] == (n + 1) / 2


def test_ties_are_cut_at_the_lower_row():
    rng = np.random.default_rng(0)
    gallery = unit(rng.standard_normal((5, 8)))[np.array([0, 1, 0, 2, 0, 3, 0, 4])]  # rows 0, 2, 4, 6 are the same
    scores, found = search(gallery, gallery[:1], 3)
    assert found.tolist() == [[0, 2, 4]]
    assert scores[0] == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("n", [500, 503, 1000])
def test_of_two_equal_rows_the_lower_comes_first(n):
    """Equal vectors get scores that differ in the last bits, depending on their place in the matrix."""
    rng = np.random.default_rng(n)
    rows = unit(rng.standard_normal((n, 512)))
    _, found = search(np.concatenate([rows, rows]), rows, 4)
    assert found[:, :2].tolist() == [[i, n + i] for i in range(n)]
    assert (found[:, 2] + n == found[:, 3]).all()


def test_search_is_exact_and_never_gives_minus_one():
    rng = np.random.default_rng(0)
    gallery, queries = unit(rng.standard_normal((50, 8))), unit(rng.standard_normal((20, 8)))
    scores, found = search(gallery, queries, 10)
    assert (found == np.argsort(-(queries @ gallery.T), axis=1)[:, :10]).all()
    assert np.allclose(scores, np.sort(queries @ gallery.T, axis=1)[:, ::-1][:, :10], atol=1e-6)
    assert search(gallery[:3], queries, 10)[1].shape == (20, 3)


def test_ranks_agree_with_a_full_sort():
    rng = np.random.default_rng(1)
    gallery, queries = unit(rng.standard_normal((200, 6))), unit(rng.standard_normal((70, 6)))
    relevant = [rng.choice(200, size=rng.integers(1, 5), replace=False) for _ in queries]
    order = np.argsort(-(queries @ gallery.T), axis=1)
    expected = [min(np.flatnonzero(np.isin(row, right))) + 1 for row, right in zip(order, relevant)]
    assert rank_of_first_relevant(gallery, queries, relevant, memory=16 * 4 * len(gallery)).tolist() == expected


def test_published_features(flickr8k):
    image, text = (np.load(flickr8k / "published_features" / f"{kind}.npy") for kind in ("image", "text"))
    metrics = retrieval_metrics(image, text, np.arange(1000), ks=(1, 3, 5, 10))
    assert [round(100 * metrics[f"text_to_image_R@{k}"], 1) for k in (1, 3, 5, 10)] == [52.0, 70.5, 78.5, 86.3]
    assert [round(100 * metrics[f"image_to_text_R@{k}"], 1) for k in (1, 3, 5, 10)] == [55.6, 73.6, 81.5, 89.7]


@pytest.mark.parametrize(("image", "text", "owner", "problem"), [
    (np.ones((2, 3)), np.ones((2, 4)), [0, 1], "same width"),
    (unit(np.eye(2, 3)), unit(np.eye(2, 3)), [0], "2 text embeddings for 1 captions"),
    (unit(np.eye(2, 3)), unit(np.eye(2, 3)), [0, 0], "2 images, but captions for 1"),
    (np.full((2, 3), np.nan), unit(np.eye(2, 3)), [0, 1], "image embedding 0 is not finite"),
    (unit(np.eye(2, 3)), 3 * np.eye(2, 3), [0, 1], "text embedding 0 is not of unit length"),
    (np.ones((0, 3)), np.ones((0, 3)), [], "0 images, but captions for 0"),
])  # fmt: skip
def test_embeddings_that_cannot_be_measured_raise(image, text, owner, problem):
    with pytest.raises(ValueError, match=problem):
        retrieval_metrics(image, text, owner)


def test_table_shows_percent():
    metrics = retrieval_metrics(np.eye(4, dtype=np.float32), np.eye(4, dtype=np.float32), range(4), ks=(1, 3))
    table = format_table(metrics, ks=(1, 3))
    assert table.splitlines()[1].split() == ["image", "to", "text", "100.0", "100.0", "1", "1.0", "1.000"]


def test_a_few_queries_find_what_many_do():
    """Two ways to compute: a product of one's own, and faiss. Half of the gallery is there twice."""
    rng = np.random.default_rng(3)
    gallery = unit(rng.standard_normal((300, 16)).astype(np.float32))
    gallery[150:] = gallery[:150]
    queries = unit(rng.standard_normal((FEW + 20, 16)).astype(np.float32))
    order = np.lexsort((np.arange(300) * np.ones((len(queries), 1)), -(queries @ gallery.T).round(6)), axis=1)
    for k in (1, 5, 6, 300):
        scores, found = search(gallery, queries, k)
        pieces = [search(gallery, queries[at : at + 7], k) for at in range(0, len(queries), 7)]
        assert np.array_equal(found, np.concatenate([piece[1] for piece in pieces]))
        assert np.abs(scores - np.concatenate([piece[0] for piece in pieces])).max() < 1e-6
        assert (found == order[:, :k]).mean() > 0.99  # all but what rounding at the sixth digit parts or joins
