"""How does a folder of pictures become an index that never disagrees with itself?

An index is a folder. What can be searched is one generation in it, and one small file says which:

    products.mc/index.json          generation, model, folder of the pictures, counts, sha256 of each file below
    products.mc/generation-000007/  vectors.npy (N, E) float32 of unit length, a row for each picture that differs from
                                    the others in content; keys.npy, its sha256; files.parquet, which file has which
                                    row; search.faiss above 100,000; texts.npy; bad_samples.jsonl
    products.mc/under-way/          vectors of a run that has not come to its end

A run writes a generation of its own and, when all of it is on the disk, replaces index.json in one step: whenever it is
killed, the old index is there or the new one, whole. The vectors computed so far are kept, and the next run takes them.
A picture is known by its content: what was renamed, moved or copied is not encoded again. The model is known by the
sha256 of what the vectors depend on: the image tower's weights, its projection, the preprocessing.
"""

import hashlib
import json
import re
from pathlib import Path

import numpy as np

from miniclip.index.neighbours import Neighbours
from miniclip.inference import feature_cache
from miniclip.retrieval import search
from miniclip.utils.bad_samples import NAME as BAD
from miniclip.utils.bad_samples import short
from miniclip.utils.errors import InputError
from miniclip.utils.files import LOCK, sha256

INDEX, NEW, FORMAT = "index.json", "under-way", 2
GENERATION = re.compile(r"generation-(\d+)")
OURS = re.compile(rf"{GENERATION.pattern}|{NEW}|{re.escape(LOCK)}|(\.\d+\.)?{re.escape(INDEX)}")  # all in an index
PIECE = 512  # pictures after which vectors are written: what a killed run may have computed in vain
DEAD = 0.1  # share of rows without a file above which a graph or lists are built anew
SETTLED = 2e9  # nanoseconds after which a file's time tells whether it has changed
SMALL = 1 << 26  # bytes up to which a file's sha256 is checked whenever the index is opened
# What is asked to measure how much a graph or lists miss: pictures are not found by text as they are by pictures.
TEXTS = [f"a photo of {what} {where}" for what in ("a person", "two people", "a dog", "a red dress", "a car", "food",
         "shoes", "a building", "a child", "a drawing") for where in ("", "outdoors", "indoors", "on white", "at night",
         "in the snow", "by the sea", "in a street", "from above", "close up")]  # fmt: skip

SYSTEMS = ("lost+found", "Thumbs.db", "desktop.ini", "@eaDir")  # beside names that begin with a dot


class ImageIndexError(InputError):
    """An index that cannot be used, or not with this model or folder."""


class ImageIndex:
    """An index as `index.json` had it when it was opened; later runs do not touch what this one reads.

    `about` is what that file says, `vectors` (N, E) float32, `keys` N times 32 bytes. Raises ImageIndexError for a
    folder that is none, and for files that are not what was written; with `check` all are read for that, otherwise of
    those above 64 MB the size has to tell.
    """

    def __init__(self, folder: str | Path, check: bool = False):
        self.folder = Path(folder)
        for attempt in range(5):  # a run may replace it, and remove the old one, between two lines here
            self.about = read_about(self.folder)
            self.place = self.folder / self.about["generation"]
            try:
                self._open(check)
                return
            except FileNotFoundError as error:
                if attempt == 4 or read_about(self.folder)["generation"] == self.about["generation"]:
                    raise ImageIndexError(f"{error.filename} is missing: {REMEDY}") from None

    def _open(self, check: bool):
        import pyarrow.parquet

        for name, (size, digest) in self.about["files"].items():
            path = self.place / name
            if path.stat().st_size != size or (check or size <= SMALL) and sha256(path) != digest:
                raise ImageIndexError(f"{path} is not what was written: {REMEDY}")
        self.vectors = np.load(self.place / "vectors.npy", mmap_mode="r", allow_pickle=False)
        self.keys = np.load(self.place / "keys.npy", allow_pickle=False).tobytes()
        with pyarrow.parquet.ParquetFile(self.place / "files.parquet") as file:
            self.table = file.read()  # in the order of rows; `read_table` and `to_numpy` would import pandas
        self.rows = np.frombuffer(self.table["row"].combine_chunks().buffers()[1], np.int64)[: len(self.table)]
        used = np.zeros(len(self.vectors), bool)
        used[self.rows] = True
        self.alive = None if used.all() else used
        self.neighbours = None
        lines = (self.place / BAD).read_text(encoding="utf-8").splitlines() if BAD in self.about["files"] else []
        self.bad = {entry["sample"]: entry["reason"] for entry in map(json.loads, lines)}  # could not be read: why
        if (how := self.about["search"])["method"] != "exact":
            path = self.place / "search.faiss"
            try:
                self.neighbours = Neighbours.read(path, how["method"], how["effort"], how["built"])
            except RuntimeError as error:  # faiss's
                if not path.exists():
                    raise FileNotFoundError(2, "removed while it was opened", str(path)) from None
                raise ImageIndexError(f"{path} cannot be read ({short(error)}): {REMEDY}") from None

    def __len__(self) -> int:
        """How many different pictures there are."""
        return len(self.vectors) if self.alive is None else int(self.alive.sum())

    def paths(self, row: int) -> list[str]:
        """The files that have a row's content, relative to the folder of the pictures."""
        start, end = np.searchsorted(self.rows, [row, row + 1])
        return self.table["path"][start:end].to_pylist()

    def find(self, queries: np.ndarray, k: int) -> list[list[tuple[float, int]]]:
        """For each of `queries` (Q, E) the k nearest as (score, row), best first; fewer where there are no more."""
        if self.neighbours is None:  # then all rows are alive: those that are not are left out when it is written
            scores, rows = search(self.vectors, queries, k)
        else:
            scores, rows = self.neighbours.find(self.vectors, queries, k, self.alive)
        return [[(float(s), int(r)) for s, r in zip(*line)] for line in zip(scores, rows)]

    def files(self) -> dict[str, tuple[bytes, tuple]]:
        """All files: path -> (key, (size, times) by which it is known to be the same)."""
        columns = [self.table[name].to_pylist() for name in ("path", "row", "size", "mtime", "ctime")]
        return {path: (self.key(row), tuple(stamp)) for path, row, *stamp in zip(*columns)}

    def key(self, row: int) -> bytes:
        """The sha256 of a row's content."""
        return self.keys[32 * row : 32 * row + 32]


REMEDY = "copy the index again, or delete it and index anew"


def read_about(folder: Path) -> dict:
    """What `index.json` says. Raises ImageIndexError."""
    try:
        about = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        if about["format"] != FORMAT:
            raise ImageIndexError(f"{folder / INDEX} is of format {short(about['format'])}, not {FORMAT}: delete"
                                  " the folder and index anew")  # fmt: skip
        if not GENERATION.fullmatch(about["generation"]):
            raise ValueError("generation")
        how = about["search"]
        wanted = {"root": str, "allow_outside": bool, "pictures": int, "copies": int, "bad": int, "shard": list}
        for place, kinds in (
            (about, wanted),
            (about["model"], {"name": str, "pretrained": (str, type(None)), "fingerprint": str}),
            (about["files"], {"vectors.npy": list, "keys.npy": list, "files.parquet": list, "texts.npy": list}),
            (how, {"method": str, "asked": str, "why": str}),
            (how, {"effort": int, "built": int, "parameters": str, "recall@10": dict, "milliseconds": (int, float)}
             if how["method"] != "exact" else {}),
        ):  # fmt: skip
            for name, kind in kinds.items():
                if not isinstance(place[name], kind):
                    raise TypeError(name)
        return about
    except FileNotFoundError:
        raise ImageIndexError(f"{folder} is no index: there is no {INDEX} in it; make one by `index`") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise ImageIndexError(f"{folder / INDEX} cannot be read ({error}): {REMEDY}") from None


def fingerprint(model, preprocess) -> str:
    """sha256 of all that a picture's vector depends on: weights of the image tower, projection, preprocessing."""
    config = model.config
    about = {"preprocess": vars(preprocess.cfg), "scale": preprocess.scale, "quick_gelu": config.quick_gelu}
    about |= {"tower": vars(config.vision_cfg), "format": FORMAT}
    digest = hashlib.sha256(feature_cache.fingerprint(model, model.visual, about).encode())
    for name, tensor in sorted(model.visual.proj.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def check_same(index: ImageIndex, mine: str, name: str, root: str | None, shard=None):
    """Raises ImageIndexError where an index is of another model, folder or shard."""
    about, folder = index.about, index.folder
    if about["model"]["fingerprint"] != mine:
        raise ImageIndexError(
            f"{folder} was made by the model {about['model']['name']} ({about['model']['fingerprint'][:12]}), and this"
            f" is {name} ({mine[:12]}): their vectors cannot be compared. Name that model by --model, or make another"
            " index with this one"
        )
    if root is not None and about["root"] != root:
        raise ImageIndexError(
            f"{folder} is of the pictures in {about['root']}, not of {root}: name another --index, or say --moved if it"
            " is the same folder in another place"
        )
    if shard is not None and about["shard"] != list(shard):
        was, now = ("/".join(map(str, pair)) for pair in (about["shard"], shard))
        raise ImageIndexError(f"{folder} has the shard {was} of its pictures, not {now}: name another --index")
