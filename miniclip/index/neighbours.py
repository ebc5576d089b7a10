"""How are the nearest of a million vectors found in milliseconds?

    exact   up to 100,000: all are compared, which takes 6 milliseconds there, and nothing is lost
    hnsw    up to 500,000: a graph that leads from neighbour to neighbour (Malkov and Yashunin, arXiv 1603.09320)
    ivf     above: lists around centroids, the nearest of which are looked into; built sooner than a graph

The last two, of faiss, hold each number in 8 bits and only name candidates, 4 k of them; the float32 vectors decide
among those. So scores and their order are exact, and what can go wrong is that a vector is not found. How often it is,
is measured against the exact search, and how much is looked at, the effort, is chosen by that.
"""

import time
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from miniclip.retrieval import search
from miniclip.utils.errors import InputError

EXACT, HNSW = 100_000, 500_000  # vectors up to which each is chosen
METHODS = ("exact", "hnsw", "ivf")
# How much is looked at: candidates that the search in a graph keeps, lists that are looked into.
EFFORTS = {"hnsw": (64, 128, 256, 512, 1024), "ivf": (32, 64, 128, 256, 512, 1024)}
TARGET, K = 0.98, 10  # the recall that an effort has to reach, of the first so many


def choose(n: int) -> tuple[str, str]:
    """The method for n vectors, and why."""
    if n <= EXACT:
        return "exact", f"up to {EXACT:,} pictures all are compared"
    if n <= HNSW:
        return "hnsw", f"above {EXACT:,} pictures a graph finds nearly all in a few milliseconds"
    return "ivf", f"above {HNSW:,} pictures a graph takes long to build, lists answer as soon"


def exact(vectors: np.ndarray, queries: np.ndarray, k: int, alive: np.ndarray | None = None):
    """`retrieval.search` for the k of `vectors` (N, E) nearest to each of `queries` (Q, E), of the rows that are
    `alive`, (N,) bool: scores and row numbers, (Q, k), k being at most as many as there are."""
    if alive is None:
        return search(vectors, queries, k)
    k = wanted = min(k, int(alive.sum()))
    while True:  # few are dead: leaving them out afterwards is less work than a copy of the others
        wanted = min(2 * wanted + K, len(vectors))
        scores, rows = search(vectors, queries, wanted)
        if wanted == len(vectors) or (alive[rows].sum(axis=1) >= k).all():
            order = np.argsort(~alive[rows], axis=1, kind="stable")[:, :k]
            return np.take_along_axis(scores, order, axis=1), np.take_along_axis(rows, order, axis=1)


class Neighbours:
    """A faiss index over rows of unit length, for `hnsw` and `ivf`. `built` is how many rows it was made for."""

    def __init__(self, index, method: str, effort: int = 0, built: int = 0):
        self.index, self.method, self.built = index, method, built
        self.effort = effort or EFFORTS[method][0]

    @classmethod
    def build(cls, vectors: np.ndarray, method: str, progress: bool = False):
        """Makes one for `vectors` (N, E) float32. The graph has 32 neighbours a vector, found among 40 candidates (200
        up to 200,000 vectors); there are 4 x sqrt(N) lists, their centroids found from 40 vectors each."""
        import faiss

        n, width = vectors.shape
        lists = min(n, round(4 * n**0.5))
        index = faiss.index_factory(
            width, "HNSW32,SQ8" if method == "hnsw" else f"IVF{lists},SQ8", faiss.METRIC_INNER_PRODUCT
        )
        if method == "hnsw":
            index.hnsw.efConstruction = 200 if n <= 200_000 else 40
        else:
            index.cp.min_points_per_centroid, index.cp.max_points_per_centroid = 1, 40
        sample = min(n, max(100_000, 40 * lists))
        index.train(np.ascontiguousarray(vectors[np.linspace(0, n - 1, sample).astype(int)]))
        found = cls(index, method, built=n)
        found.add(vectors, progress)
        return found

    @classmethod
    def read(cls, path: str | Path, method: str, effort: int, built: int):
        """One that `write` has written."""
        import faiss

        return cls(faiss.read_index(str(path)), method, effort, built)

    def write(self, path: str | Path):
        """Writes it into a file."""
        import faiss

        with open(path, "wb") as file:  # faiss by itself does not notice it if the disk is full at the very end
            faiss.write_index(self.index, faiss.PyCallbackIOWriter(file.write))

    def __len__(self) -> int:
        return self.index.ntotal

    def add(self, vectors: np.ndarray, progress: bool = False):
        """Adds rows (N, E), which get the next numbers. In pieces, for the progress bar."""
        step = 10_000
        for start in tqdm(range(0, len(vectors), step), self.method, disable=not progress, leave=False):
            self.index.add(np.ascontiguousarray(vectors[start : start + step]))

    def find(self, vectors: np.ndarray, queries: np.ndarray, k: int, alive: np.ndarray | None = None):
        """As `exact`, of what it finds. Queries for which that is fewer than k, because k is large or because much is
        not alive, are compared with all."""
        import faiss

        k = min(k, len(vectors) if alive is None else int(alive.sum()))
        wanted, kind = min(4 * k, len(vectors)), {}
        if alive is not None:
            kind["sel"] = faiss.IDSelectorBitmap(np.packbits(alive, bitorder="little"))
        if self.method == "hnsw":
            how = faiss.SearchParametersHNSW(efSearch=max(wanted, self.effort), **kind)
        else:
            how = faiss.SearchParametersIVF(nprobe=self.effort, **kind)
        _, candidates = self.index.search(np.ascontiguousarray(queries), wanted, params=how)
        scores, rows = np.full((len(queries), k), -np.inf, np.float32), np.full((len(queries), k), -1)
        for query, among, score, row in zip(queries, candidates, scores, rows):
            among = np.sort(among[among >= 0])  # faiss says -1 where it has found no more
            products = vectors[among] @ query
            order = np.argsort(-products, kind="stable")[:k]
            score[: len(order)], row[: len(order)] = products[order], among[order]
        if len(short := np.flatnonzero(rows[:, -1] < 0)):
            scores[short], rows[short] = exact(vectors, queries[short], k, alive)
        return scores, rows

    def tune(self, vectors: np.ndarray, alive: np.ndarray | None, texts: np.ndarray, pictures: int = 200) -> dict:
        """Takes the least effort that reaches the TARGET, else the greatest, and says what came of it: recall@10, the
        share of the exact first ten that is found, by some of the `vectors` themselves (each without itself) and by
        `texts` (Q, E), and milliseconds for a query alone."""
        rows = np.arange(len(vectors)) if alive is None else np.flatnonzero(alive)
        rows = np.random.default_rng(0).choice(rows, min(pictures, len(rows)), replace=False)
        asked = {"pictures": (np.array(vectors[rows]), rows), "texts": (texts, np.full(len(texts), -1))}
        best = {name: self._best(vectors, *pair, alive) for name, pair in asked.items()}
        for effort in EFFORTS[self.method]:
            self.effort = effort
            recall, start = {}, time.perf_counter()
            for name, (queries, _) in asked.items():
                found = [self.find(vectors, query[None], K + 1, alive)[1] for query in queries]
                shares = [np.isin(line, got).mean() for line, got in zip(best[name], found) if len(line)]
                recall[name] = float(np.mean(shares)) if shares else 1.0  # of one picture nothing can be missed
            milliseconds = 1000 * (time.perf_counter() - start) / sum(len(queries) for queries, _ in asked.values())
            if min(recall.values()) >= TARGET:
                break
        return {"effort": self.effort, "recall@10": recall, "milliseconds": round(milliseconds, 2)}

    @staticmethod
    def _best(vectors: np.ndarray, queries: np.ndarray, own: np.ndarray, alive: np.ndarray | None) -> list[np.ndarray]:
        """The first ten rows for each query but for its own."""
        return [row[row != itself][:K] for row, itself in zip(exact(vectors, queries, K + 1, alive)[1], own)]

    def parameters(self) -> str:
        """What it was made with, for people."""
        if self.method == "hnsw":
            return f"HNSW, M=32, efConstruction={self.index.hnsw.efConstruction}, efSearch={self.effort}, 8 bits"
        return f"IVF, nlist={self.index.nlist}, nprobe={self.effort}, 8 bits"


def check_method(method: str):
    """Raises InputError for one that is not known."""
    if method not in ("auto", *METHODS):
        raise InputError(f"method {method!r} is none of auto, {', '.join(METHODS)}")
