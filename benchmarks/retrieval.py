"""How fast is search, and what do approximate indexes gain and lose against the exact one?

    python benchmarks/retrieval.py                  1k, 10k, 100k and 1M vectors; peak about 11 GB
    python benchmarks/retrieval.py --quick          1k and 10k, in half a minute

Compared, all by inner product: MiniCLIP's `search` and the faiss index within it (exact), the same in fewer bits, a
graph (HNSW) and lists around centroids (IVF), usearch where it is installed, and what `miniclip search` makes of them,
each with several settings of how much it looks at. Queries come in a batch, which may use all
threads, and one at a time. Writes its part of RESULTS.md, after each size.
"""

import argparse
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import faiss  # noqa: E402
import numpy as np  # noqa: E402
import results  # noqa: E402
from tqdm import tqdm  # noqa: E402

from miniclip.index.neighbours import EFFORTS, Neighbours  # noqa: E402
from miniclip.retrieval import TIE, search  # noqa: E402

DIM, K = 512, 10
SIZES, QUICK = [1_000, 10_000, 100_000, 1_000_000], [1_000, 10_000]
EF_SEARCH = (16, 64, 256)  # candidates that the graph's search keeps
N_PROBE = (4, 16, 64)  # lists that are looked into


def spectrum() -> np.ndarray:
    """Standard deviations of the (512,) axes: few matter much, many little, as in embeddings. Of unit length."""
    deviations = (1 / (16 + np.arange(DIM))).astype(np.float32)
    return deviations / np.linalg.norm(deviations)


def make_gallery(n: int, seed: int = 0) -> np.ndarray:
    """n vectors of unit length, (n, 512) float32, that lie as embeddings of pictures do.

    Each is a common direction (embeddings fill a narrow cone) + the centre of one of 3 x sqrt(n) clusters + its own
    deviation, centres and deviations both drawn with the falling `spectrum`. The constants were chosen to fit
    TinyCLIP's embeddings of 1,000 Flickr8k images, whose numbers are in brackets: mean cosine of two vectors 0.41
    (0.40), its deviation 0.10 (0.10), cosine to the nearest other vector 0.74 (0.74), to the tenth 0.63 (0.65),
    dimensions in effect, (sum of variances)^2 / sum of squares, 40 (49). Of independent uniform vectors, which are the
    worst case for every index and like no embedding, these would be 0, 0.04, 0.16, 0.12 and 340.
    """
    rng = np.random.default_rng(seed)
    common = rng.standard_normal(DIM, dtype=np.float32)
    common *= np.float32(0.82 / np.linalg.norm(common))
    centres = 0.64 * spectrum() * rng.standard_normal((round(3 * n**0.5), DIM), dtype=np.float32) + common
    gallery = np.empty((n, DIM), np.float32)
    for start in range(0, n, 1 << 16):  # piece by piece: a million vectors at once would take their memory thrice
        part = gallery[start : start + (1 << 16)]
        rng.standard_normal(out=part, dtype=np.float32)
        part *= 0.77 * spectrum()
        part += centres[rng.integers(len(centres), size=len(part))]
        part /= np.linalg.norm(part, axis=1, keepdims=True)
    return gallery


def make_queries(gallery: np.ndarray, n: int, seed: int = 1) -> np.ndarray:
    """n queries of unit length, (n, 512) float32: members of the gallery, moved to a cosine of about 0.8."""
    rng = np.random.default_rng(seed)
    queries = gallery[rng.integers(len(gallery), size=n)]
    queries += 0.75 * spectrum() * rng.standard_normal((n, DIM), dtype=np.float32)
    return queries / np.linalg.norm(queries, axis=1, keepdims=True)


class Contestant(NamedTuple):
    """One way to search. `run` takes queries (Q, 512) and gives row numbers (Q, 10), -1 where it found too few."""

    method: str
    setting: str
    build_seconds: float
    megabytes: float
    run: Callable[[np.ndarray], np.ndarray]


def exact(gallery: np.ndarray) -> list[Contestant]:
    """`search` takes the gallery as it is: nothing to build, no copy, nothing that could be stale."""
    start, index = time.perf_counter(), faiss.IndexFlatIP(DIM)
    index.add(gallery)
    seconds = time.perf_counter() - start
    return [
        Contestant(
            "`miniclip.retrieval.search`", "exact, no index", 0, 0.0,
            lambda queries: search(gallery, queries, K)[1],
        ),
        Contestant(
            "faiss `IndexFlatIP`", "exact", seconds, megabytes(index), lambda queries: index.search(queries, K)[1]
        ),
    ]  # fmt: skip


def hnsw(gallery: np.ndarray) -> list[Contestant]:
    """A graph of neighbours. Above 100k vectors it is made with less care, in a few minutes instead of a quarter of an
    hour. That loses little: of 10k vectors, at efSearch=64, recall@10 is 0.996 either way."""
    m, ef_construction = 32, 200 if len(gallery) <= 100_000 else 40
    start, index = time.perf_counter(), faiss.IndexHNSWFlat(DIM, m, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction = ef_construction
    add(index, gallery, "HNSW")
    seconds, size = time.perf_counter() - start, megabytes(index)

    def run(queries: np.ndarray, ef_search: int) -> np.ndarray:
        index.hnsw.efSearch = ef_search
        return index.search(queries, K)[1]

    name = f"HNSW, M={m}, efConstruction={ef_construction}"
    return [Contestant(name, f"efSearch={ef}", seconds, size, lambda q, ef=ef: run(q, ef)) for ef in EF_SEARCH]


def ivf(gallery: np.ndarray) -> list[Contestant]:
    """4 x sqrt(N) lists. Their centroids are found from up to 40 vectors for each, which is nearly as good as from all
    of them."""
    lists = max(1, round(4 * len(gallery) ** 0.5))
    start, quantizer = time.perf_counter(), faiss.IndexFlatIP(DIM)
    index = faiss.IndexIVFFlat(quantizer, DIM, lists, faiss.METRIC_INNER_PRODUCT)
    index.cp.min_points_per_centroid, index.cp.max_points_per_centroid = 1, 40
    tqdm.write(f"IVF: looking for {lists} centroids", sys.stderr)
    index.train(gallery)
    add(index, gallery, "IVF")
    seconds, size = time.perf_counter() - start, megabytes(index)

    def run(queries: np.ndarray, probes: int) -> np.ndarray:
        index.nprobe = probes
        return index.search(queries, K)[1]

    name = f"IVF, nlist={lists}"
    return [Contestant(name, f"nprobe={n}", seconds, size, lambda q, n=n: run(q, n)) for n in N_PROBE if n <= lists]


def scalars(gallery: np.ndarray) -> list[Contestant]:
    """All are compared, in 16 or 8 bits a number, or 64 bytes a vector (PQ), without a second look."""
    found = []
    for kind in ("SQfp16", "SQ8", "PQ64"):
        start, index = time.perf_counter(), faiss.index_factory(DIM, kind, faiss.METRIC_INNER_PRODUCT)
        index.train(gallery[:50_000])
        add(index, gallery, kind)
        seconds, size = time.perf_counter() - start, megabytes(index)
        run = lambda queries, index=index: index.search(queries, K)[1]  # noqa: E731
        found.append(Contestant(f"faiss {kind}", "all", seconds, size, run))
    return found


def ours(gallery: np.ndarray) -> list[Contestant]:
    """What `miniclip search` builds: candidates by 8 bits a number (HNSW) or 2 (IVF), then the float32 vectors, which
    may stay on the disk. MB are those of the index alone."""
    found = []
    for method in ("hnsw", "ivf"):
        start, index = time.perf_counter(), Neighbours.build(gallery, method)
        seconds, size = time.perf_counter() - start, megabytes(index.index)

        def run(queries: np.ndarray, index: Neighbours, effort: int) -> np.ndarray:
            index.effort = effort
            return index.find(gallery, queries, K)[1]

        for effort in EFFORTS[method][1::2]:
            name = f"effort {effort}"
            searched = partial(run, index=index, effort=effort)
            found.append(Contestant(f"`miniclip search`, {method}", name, seconds, size, searched))
    return found


def usearch(gallery: np.ndarray) -> list[Contestant]:
    """Its graph, in 16 and 8 bits a number. Optional: pip install usearch."""
    try:
        from usearch.index import Index
    except ImportError:
        return []
    found = []
    for kind in ("f16", "i8"):
        start, index = time.perf_counter(), Index(ndim=DIM, metric="ip", dtype=kind, connectivity=32)
        index.add(np.arange(len(gallery)), gallery)
        seconds, size = time.perf_counter() - start, index.memory_usage / 1e6

        def run(queries: np.ndarray, index, effort: int) -> np.ndarray:
            index.expansion_search = effort
            rows = index.search(queries, K).keys.astype(np.int64)
            return rows[None] if rows.ndim == 1 else rows

        for effort in EF_SEARCH:
            searched = partial(run, index=index, effort=effort)
            found.append(Contestant(f"usearch {kind}", f"expansion {effort}", seconds, size, searched))
    return found


METHODS = {"exact": exact, "scalars": scalars, "hnsw": hnsw, "ivf": ivf, "ours": ours, "usearch": usearch}


def add(index: faiss.Index, gallery: np.ndarray, name: str):
    """Adds all vectors, in pieces, for the progress bar."""
    step = max(1_000, len(gallery) // 50)
    with tqdm(total=len(gallery), desc=name, unit=" vectors", leave=False) as progress:
        for start in range(0, len(gallery), step):
            part = gallery[start : start + step]
            index.add(part)
            progress.update(len(part))


def megabytes(index: faiss.Index) -> float:
    """What the index holds, in 10^6 bytes: counted while it is written to nowhere, which needs no second copy."""
    total = 0

    def count(data: bytes):
        nonlocal total
        total += len(data)

    faiss.write_index(index, faiss.PyCallbackIOWriter(count))
    return total / 1e6


def recalls(gallery: np.ndarray, queries: np.ndarray, best: np.ndarray, found: np.ndarray) -> tuple[float, float]:
    """How much of the exact result `best` (Q, k) is in `found` (Q, k), row numbers both: of the first places, and of
    all k. What scores as high as the last of the exact ones counts, so that of equal vectors any will do."""

    def scores(rows: np.ndarray) -> np.ndarray:
        products = np.einsum("qkd,qd->qk", gallery[rows].astype(np.float64), queries)
        return np.where(rows < 0, -2, products)  # -1 is where an index found too few

    wanted, given = scores(best), scores(found)
    first = given[:, 0] >= wanted[:, 0] - TIE
    return float(first.mean()), float((given >= wanted.min(axis=1, keepdims=True) - TIE).mean())


def rate(run: Callable, queries: np.ndarray, at_once: int, seconds: float) -> float:
    """Queries per second, over as many calls as it takes to fill the time; at least one."""
    calls, start = 0, time.perf_counter()
    while calls == 0 or time.perf_counter() - start < seconds:
        place = calls * at_once % len(queries)
        run(queries[place : place + at_once])
        calls += 1
    return calls * at_once / (time.perf_counter() - start)


def measure(n: int, options: argparse.Namespace) -> list[dict]:
    """One row for each contestant at a size: its rates in each round, and its recall."""
    tqdm.write(f"{n:,} vectors", sys.stderr)
    gallery = make_gallery(n)
    queries = make_queries(gallery, options.queries)
    best = search(gallery, queries, K)[1]
    contestants = [one for method in options.methods for one in METHODS[method](gallery)]
    rows = []
    for c in contestants:  # this also lets each run once before it is timed
        first, ten = recalls(gallery, queries, best, c.run(queries))
        rows.append(c._asdict() | {"vectors": n, "recall@1": first, "recall@10": ten, "batch": [], "single": []})
    progress = tqdm(total=options.rounds * len(contestants), desc="rounds", leave=False)
    for number in range(options.rounds):
        for i in range(len(contestants)):  # in turn, each round beginning with another one
            turn = (i + number) % len(contestants)
            run, row = contestants[turn].run, rows[turn]
            row["batch"].append(rate(run, queries, len(queries), options.seconds))
            row["single"].append(rate(run, queries, 1, options.seconds))
            progress.update()
    progress.close()
    return rows


def table(rows: list[dict], options: argparse.Namespace) -> str:
    """The part of RESULTS.md."""

    def number(x: float) -> str:
        return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"

    def spread(rates: list[float]) -> str:
        return f"{number(statistics.median(rates))} ({number(min(rates))} to {number(max(rates))})"

    def recall(share: float) -> str:
        return f"{share:.4f} ({100 * (1 - share):.2f})"

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9
    of = f" of {options.sizes[0]:,} vectors" if len(options.sizes) == 1 else ""
    beside = any(row["method"].startswith("usearch") for row in rows)
    missing = "" if beside or "usearch" not in options.methods else " usearch was not installed."
    lines = [
        f"## Search{of}{', and usearch' if of and beside else ''}", "",
        f"{results.machine()}; faiss {faiss.__version__}, threads: {faiss.omp_get_max_threads()}; peak {peak:.1f} GB."
        f" `python benchmarks/retrieval.py --sizes {' '.join(map(str, options.sizes))} --methods"
        f" {' '.join(options.methods)}`.{missing}", "",
        f"The {K} nearest of N vectors by inner product, {DIM} dimensions, float32. The vectors are made, clustered and"
        " with a falling spectrum fitted to TinyCLIP's embeddings of Flickr8k (`make_gallery`), not uniform; the"
        f" queries are members of the gallery moved to a cosine of about 0.8. Queries/s: median (lowest to highest) of"
        f" {options.rounds} rounds in which all take turns. recall@1, recall@10: share of the exact first and first"
        " ten that are found (lost, in percent). Above 100,000 vectors HNSW is built with efConstruction=40 instead of"
        " 200, to keep building short.", "",
        f"| vectors | method | setting | build, s | index, MB | queries/s, {options.queries} at once"
        " | queries/s, one at a time | recall@1 (lost) | recall@10 (lost) |",
        "|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row in rows:
        cells = [f"{row['vectors']:,}", row["method"], row["setting"], f"{row['build_seconds']:.2f}"]
        cells += [number(row["megabytes"]), spread(row["batch"]), spread(row["single"])]
        lines.append(f"| {' | '.join([*cells, recall(row['recall@1']), recall(row['recall@10'])])} |")
    return "\n".join(lines)


def main():
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="vectors to search in")
    parser.add_argument("--methods", choices=METHODS, nargs="+", default=list(METHODS), help="those to compare")
    parser.add_argument("--quick", action="store_true", help="1,000 and 10,000 vectors only")
    parser.add_argument("--queries", type=int, default=1000, help="queries in a batch")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.2, help="for one measurement, or as long as one call takes")
    parser.add_argument("--results", type=Path, default=results.RESULTS, help="the file that gets the table")
    options = parser.parse_args()
    options.sizes = QUICK if options.quick else options.sizes
    results.RESULTS = options.results
    if hasattr(os, "sched_getaffinity"):  # faiss's threads wait in a loop: with more of them than cores it crawls
        faiss.omp_set_num_threads(min(faiss.omp_get_max_threads(), len(os.sched_getaffinity(0))))
    name = results.section("retrieval", parser, options, "sizes", "methods")
    start, rows = time.perf_counter(), []
    for n in options.sizes:
        rows += measure(n, options)
        results.write_section(name, table(rows, options))
        tqdm.write(f"{n:,} vectors: done after {time.perf_counter() - start:.0f} s", sys.stderr)
    print(table(rows, options))


if __name__ == "__main__":
    main()
