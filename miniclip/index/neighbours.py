"""Nearest-neighbour search: exact, or approximate with faiss's HNSW or IVF, with measured recall (docs/index.md).

HNSW is a graph that leads from neighbour to neighbour (Malkov and Yashunin, arXiv 1603.09320); IVF searches the lists
around the nearest centroids. They propose candidates, among which the float32 vectors decide. So scores and order are
exact, and the only possible error is a missed vector. HNSW stores 8 bits per number and proposes 4 k; IVF stores 2 bits
per number and proposes 8 k: a product quantizer of 16 centroids for each pair of numbers, whose products are looked up
in registers (Andre et al., arXiv 1812.09162), after a random rotation, which makes the numbers matter equally."""

import time
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from miniclip.retrieval import search
from miniclip.utils.errors import InputError

EXACT = 100_000  # vectors up to which all are compared
METHODS = ("exact", "hnsw", "ivf")
# The efforts that are tried: candidates kept while searching a graph (efSearch), lists searched (nprobe).
EFFORTS = {"hnsw": (64, 128, 256, 512, 1024), "ivf": (32, 64, 128, 256, 512, 1024)}
FEW = 1000  # vectors below which IVF stores 8 bits per number: the quantizer has nothing to learn from
TARGET, K = 0.98, 10  # the recall@K that an effort has to reach


def choose(n: int) -> tuple[str, str]:
    """Returns the method for n vectors, and why."""
    few = "exact", f"up to {EXACT:,} images all are compared"
    return few if n <= EXACT else ("ivf", f"above {EXACT:,} images lists find nearly all in a few milliseconds")


def exact(vectors: np.ndarray, queries: np.ndarray, k: int, alive: np.ndarray | None = None):
    """`retrieval.search` among the rows of `vectors` (N, E) that are `alive`, (N,) bool. Returns scores and row numbers
    (Q, k) for `queries` (Q, E); k is at most the number of those rows."""
    if alive is None:
        return search(vectors, queries, k)
    k = wanted = min(k, int(alive.sum()))
    while True:  # few are dead: skipping them afterwards is less work than a copy of the others
        wanted = min(2 * wanted + K, len(vectors))
        scores, rows = search(vectors, queries, wanted)
        if wanted == len(vectors) or (alive[rows].sum(axis=1) >= k).all():
            order = np.argsort(~alive[rows], axis=1, kind="stable")[:, :k]
            return np.take_along_axis(scores, order, axis=1), np.take_along_axis(rows, order, axis=1)


class Neighbours:
    """A faiss index over rows of unit length, for `hnsw` and `ivf`. `built` is the number of rows it was built for."""

    def __init__(self, index, method: str, built: int, effort: int):
        self.index, self.method, self.built, self.effort = index, method, built, effort

    @classmethod
    def build(cls, vectors: np.ndarray, method: str, progress: bool = False):
        """Builds an index of `vectors` (N, E) float32. HNSW: 32 neighbours per vector, chosen among 40 candidates (200
        for up to 200,000 vectors). IVF: 4 x sqrt(N) lists, their centroids trained on 40 vectors each."""
        import faiss

        n, width = vectors.shape
        lists = min(n, round(4 * n**0.5))
        if method == "hnsw":
            index = faiss.index_factory(width, "HNSW32,SQ8", faiss.METRIC_INNER_PRODUCT)
            index.hnsw.efConstruction = 200 if n <= 200_000 else 40
        else:
            kind = f"RR{width},IVF{lists},PQ{width // 2}x4fs" if n >= FEW and width % 2 == 0 else f"IVF{lists},SQ8"
            index = faiss.index_factory(width, kind, faiss.METRIC_INNER_PRODUCT)
            clustering = faiss.extract_index_ivf(index).cp
            clustering.min_points_per_centroid, clustering.max_points_per_centroid = 1, 40
        index.train(np.ascontiguousarray(vectors[np.linspace(0, n - 1, min(n, max(100_000, 40 * lists))).astype(int)]))
        found = cls(index, method, n, EFFORTS[method][0])
        found.add(vectors, progress)
        return found

    def write(self, path: str | Path):
        import faiss

        with open(path, "wb") as file:  # faiss itself does not notice a disk that becomes full at the very end
            faiss.write_index(self.index, faiss.PyCallbackIOWriter(file.write))

    def add(self, vectors: np.ndarray, progress: bool = False):
        """Adds rows (N, E), which get the next numbers."""
        for start in tqdm(range(0, len(vectors), 10_000), self.method, disable=not progress, leave=False):
            self.index.add(np.ascontiguousarray(vectors[start : start + 10_000]))

    def find(self, vectors: np.ndarray, queries: np.ndarray, k: int, alive: np.ndarray | None = None):
        """As `exact`, among the candidates of the index. Queries with fewer than k of them are compared with all."""
        import faiss

        k = min(k, len(vectors) if alive is None else int(alive.sum()))
        rotated = isinstance(self.index, faiss.IndexPreTransform)
        wanted = min(8 * k if rotated else 4 * k, len(vectors))
        only = {} if alive is None else {"sel": faiss.IDSelectorBitmap(np.packbits(alive, bitorder="little"))}
        if self.method == "hnsw":
            how = faiss.SearchParametersHNSW(efSearch=max(wanted, self.effort), **only)
        else:
            lists = faiss.SearchParametersIVF(nprobe=self.effort, **only)
            how = faiss.SearchParametersPreTransform(index_params=lists) if rotated else lists
        _, candidates = self.index.search(np.ascontiguousarray(queries), wanted, params=how)
        scores, rows = np.full((len(queries), k), -np.inf, np.float32), np.full((len(queries), k), -1)
        for query, among, score, row in zip(queries, candidates, scores, rows):
            among = np.sort(among[among >= 0])  # faiss pads with -1
            products = vectors[among] @ query
            order = np.argsort(-products, kind="stable")[:k]
            score[: len(order)], row[: len(order)] = products[order], among[order]
        if len(short := np.flatnonzero(rows[:, -1] < 0)):
            scores[short], rows[short] = exact(vectors, queries[short], k, alive)
        return scores, rows

    def tune(self, vectors: np.ndarray, alive: np.ndarray | None, texts: np.ndarray) -> dict:
        """Sets the smallest effort that reaches TARGET, or else the largest. Returns it, recall@10 (the share of the
        exact first ten that is found, for 200 of the `vectors`, each without itself, and for `texts` (Q, E)), the
        milliseconds of a single query, and the parameters as text."""
        import faiss

        rows = np.arange(len(vectors)) if alive is None else np.flatnonzero(alive)
        rows = np.random.default_rng(0).choice(rows, min(200, len(rows)), replace=False)
        asked = {"pictures": np.array(vectors[rows]), "texts": texts}
        best = {name: exact(vectors, queries, K + 1, alive)[1] for name, queries in asked.items()}
        best["pictures"] = [line[line != row] for line, row in zip(best["pictures"], rows)]
        for effort in EFFORTS[self.method]:
            self.effort = effort
            recall, start = {}, time.perf_counter()
            for name, queries in asked.items():
                found = [self.find(vectors, query[None], K + 1, alive)[1] for query in queries]
                shares = [np.isin(line[:K], got).mean() for line, got in zip(best[name], found) if len(line)]
                recall[name] = float(np.mean(shares)) if shares else 1.0  # nothing can be missed among one image
            milliseconds = 1000 * (time.perf_counter() - start) / sum(map(len, asked.values()))
            if min(recall.values()) >= TARGET:
                break
        if self.method == "hnsw":
            text = f"HNSW, M=32, efConstruction={self.index.hnsw.efConstruction}, efSearch={self.effort}, 8 bits"
        else:
            bits = 2 if isinstance(self.index, faiss.IndexPreTransform) else 8
            text = f"IVF, nlist={faiss.extract_index_ivf(self.index).nlist}, nprobe={self.effort}, {bits} bits"
        times = {"recall@10": recall, "milliseconds": round(milliseconds, 2)}
        return {"parameters": text, "built": self.built, "effort": self.effort, **times}


def check_method(method: str):
    """Raises InputError for an unknown method."""
    if method not in ("auto", *METHODS):
        raise InputError(f"method {method!r} is not one of auto, {', '.join(METHODS)}")
