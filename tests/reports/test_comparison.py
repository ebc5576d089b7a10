"""The table of several models: its intervals against ones worked out by hand and in another way, and its four forms."""

import csv
import itertools
import random
import re
import time

import numpy as np
import pytest

from miniclip.reports.comparison import NAMES, NOTE, WRITERS, bootstrap, compare, count_hits, recalls
from miniclip.retrieval import RetrievalResult, retrieval_metrics, search_both


def counts_of(hits_i2t, hits_t2i, image_of_text) -> np.ndarray:
    """`count_hits` where only R@1 matters: all is found among the first five."""
    result = [
        RetrievalResult(None, None, np.c_[hits, np.ones(len(hits))] > 0, None, None) for hits in (hits_i2t, hits_t2i)
    ]
    return count_hits(dict(zip(("image_to_text", "text_to_image"), result)), np.asarray(image_of_text))


def test_two_images_by_hand():
    """Image 0 (three captions, one finds it) is right at once, image 1 (one caption) is not. Of two draws both are of
    image 0 in a quarter of all resamples, of image 1 in a quarter, one of each in half."""
    counts = counts_of([1, 0], [1, 0, 0, 1], [0, 0, 0, 1])
    assert counts.tolist() == [[1, 1, 1, 1, 3, 3, 3], [0, 1, 1, 1, 1, 1, 1]]
    assert recalls(counts.sum(0), 2)[[0, 3]].tolist() == [1 / 2, 2 / 4]
    (found,) = bootstrap([counts], samples=4000)
    values, times = np.unique(found[:, [0, 3]].round(6), axis=0, return_counts=True)
    assert values.tolist() == [[0, 1], [0.5, 0.5], [1, 0.333333]]  # captions are weighted, not averaged by image
    assert np.abs(times / 4000 - [0.25, 0.5, 0.25]).max() < 0.03


def random_embeds(seed: int, noise: float, n: int = 60):
    rng = np.random.default_rng(seed)
    owner = np.sort(rng.integers(n, size=4 * n)) if seed else np.repeat(np.arange(n), 3)
    owner = np.concatenate([np.arange(n), owner])  # from one caption to many
    base = np.random.default_rng(99).standard_normal((n, 8))
    images, texts = (x + noise * rng.standard_normal(x.shape) for x in (base, base[owner]))
    return *(np.float32(x / np.linalg.norm(x, axis=1, keepdims=True)) for x in (images, texts)), owner


def test_against_a_loop_over_queries():
    """The same with Python's own generator, one query after the other: all ends within the noise of 1,000 resamples."""
    (images, texts, owner), (others, other_texts, _) = random_embeds(0, 0.6), random_embeds(0, 0.9)
    pairs, ranks, n = [(images, texts), (others, other_texts)], [], 60
    rows = compare([("d", m, count_hits(search_both(*p, owner, 10), owner)) for m, p in zip("ab", pairs)])
    assert [row.name for row in rows] == ["a", "b", "b - a"] and (rows[0].images, rows[0].captions) == (60, 240)
    for (i, t), row in zip(pairs, rows):
        metrics, scores = retrieval_metrics(i, t, owner), i @ t.T
        assert row.metrics == pytest.approx({name: metrics[name] for name in NAMES}, abs=1e-12)
        own = [[1 + (scores[:, m] > scores[owner[m], m]).sum() for m in np.flatnonzero(owner == j)] for j in range(n)]
        best = [1 + (scores[j] > scores[j, owner == j].max()).sum() for j in range(n)]
        ranks.append((best, own))
    generator, found = random.Random(1), []
    for _ in range(1000):
        drawn, each = [generator.randrange(n) for _ in range(n)], []
        for best, own in ranks:
            shares = [sum(best[j] <= k for j in drawn) / n for k in (1, 5, 10)]
            queries = [rank for j in drawn for rank in own[j]]
            shares += [sum(rank <= k for rank in queries) / len(queries) for k in (1, 5, 10)]
            each.append([*shares, sum(shares) / 6])
        found.append([*each, [b - a for a, b in zip(*each)]])
    for row, ordered in zip(rows, np.sort(np.array(found), axis=0).transpose(1, 2, 0)):
        ours, theirs = np.array([row.intervals[name] for name in NAMES]), ordered[:, [24, 975]]
        assert np.abs(ours - theirs).max() < 0.03, row.name
        assert (ours[:, 0] <= list(row.metrics.values())).all() and (ours[:, 1] >= list(row.metrics.values())).all()


def test_intervals_cover():
    """Test sets drawn from a population: the true recall, and the true difference of two models whose hits go together,
    are in about 95% of the intervals, captions of an image being alike. Intervals that treat the captions as
    independent would cover far less."""
    rng, n, k, inside, naive = np.random.default_rng(0), 200, 5, [], []
    for _ in range(300):
        easy = rng.beta(1, 1, n)  # how easy an image is, for both models
        hits = [rng.random((n, k)) < easy[:, None] ** power for power in (1, 2)]  # expected recall: 1/2 and 1/3
        counts = [counts_of(h[:, 0], h.ravel(), np.repeat(np.arange(n), k)) for h in hits]
        rows = compare([("d", name, c) for name, c in zip("ab", counts)], samples=200)
        for row, truth in zip(rows, (1 / 2, 1 / 3, 1 / 3 - 1 / 2)):
            inside.append([low <= truth <= high for low, high in (row.intervals[f"{way}_R@1"] for way in WAYS)])
        p = hits[0].mean()
        naive.append(abs(p - 1 / 2) < 1.96 * np.sqrt(p * (1 - p) / (n * k)))
    covered = np.array(inside).reshape(300, 3, 2).mean(0)
    assert covered.min() > 0.90 and covered.max() < 0.985, covered
    assert np.mean(naive) < 0.85


WAYS = ("image_to_text", "text_to_image")


def test_pairs_are_compared_on_the_same_images():
    """A model against itself differs by nothing; against one with a few answers fewer the sign is certain, although
    the two intervals overlap. The same call gives the same figures."""
    rng = np.random.default_rng(0)
    hits, owner = rng.random(400) < 0.5, np.arange(400)
    fewer = hits & (rng.random(400) < 0.97)
    a, b = (counts_of(h, h, owner) for h in (hits, fewer))
    rows = compare([("x", "a", a), ("y", "a", a), ("x", "b", b), ("x", "a again", a)])
    assert [(r.dataset, r.name) for r in rows] == [
        ("x", "a"), ("x", "b"), ("x", "a again"), ("x", "b - a"), ("x", "a again - a"), ("y", "a"),
    ]  # fmt: skip
    by_name = {(row.dataset, row.name): row.intervals["text_to_image_R@1"] for row in rows}
    assert by_name["x", "a again - a"] == [0, 0] and by_name["x", "b - a"][1] < 0
    assert by_name["x", "b"][1] > by_name["x", "a"][0]
    assert by_name["x", "a"] == by_name["y", "a"] == compare([("x", "a", a)])[0].intervals["text_to_image_R@1"]


def test_a_thousand_resamples_of_coco_take_a_moment():
    rng = np.random.default_rng(0)
    counts = [counts_of(rng.random(5000) < 0.5, rng.random(25000) < 0.4, np.repeat(np.arange(5000), 5)) for _ in "ab"]
    start = time.process_time()
    compare([("coco", name, c) for name, c in zip("ab", counts)])
    assert time.process_time() - start < 2


def test_the_four_forms():
    a, b = (counts_of(h, h, [0, 1, 2, 3]) for h in ([1, 1, 0, 0], [1, 0, 0, 0]))
    rows = compare([("50%_of|all", r"runs\a", a), ("50%_of|all", "[b]", b)])
    text, table, markdown, latex = (WRITERS[ending](rows) for ending in (".txt", ".csv", ".md", ".tex"))
    low, high = rows[0].intervals["image_to_text_R@1"]
    interval = f"[{100 * low:.1f}, {100 * high:.1f}]"
    lines = text.splitlines()
    assert lines[1].split()[:4] == ["data", "model", "R@1", "R@5"] and lines[2].split()[2:4] == ["50.0", "100.0"]
    assert lines[3].strip().startswith(interval) and lines[6].split()[:5] == [
        "50%_of|all",
        "[b]",
        "-",
        r"runs\a",
        "-25.0",
    ]
    ends = [{m.end() for m in re.finditer(r"\S+( \S+\])?", line[25:])} for line in (lines[2], lines[3])]
    assert ends[0] == ends[1], "columns are aligned"
    first, _, minus = csv.DictReader(table.splitlines())
    assert float(first["text_to_image_R@1"]) == 0.5 and float(minus["mean_recall"]) == pytest.approx(-0.5 / 6, abs=1e-6)
    assert (first["image_to_text_R@1_low"], minus["minus"]) == (f"{low:.6f}", r"runs\a") and first["captions"] == "4"
    cells = [re.split(r"(?<!\\)\|", line) for line in markdown.splitlines() if line.startswith("|")]
    assert (
        {len(line) for line in cells} == {11}
        and cells[2][3].strip() == f"50.0 {interval}"
        and r"of\|all" in cells[2][1]
    )
    assert r"50\%\_of|all & runs\textbackslash{}a & 50.0 {\scriptsize " + interval in latex
    assert r"{[}b] $-$ runs\textbackslash{}a & $-$25.0" in latex
    body = latex.partition(r"\midrule")[2].partition(r"\bottomrule")[0].strip().splitlines()
    assert all(line.count("&") == 8 and line.endswith(r"\\") for line in body) and len(body) == 3
    assert all(NOTE in form for form in (text, markdown, latex))
    assert "-0.0" not in text and all(ord(c) < 128 for c in itertools.chain(text, table, markdown, latex))
