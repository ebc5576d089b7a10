"""The image index: its files, how it is opened and checked, and the fingerprint of the model that made it.

An index is a folder. What is searched is one generation in it, and a small file says which:

    products.mc/index.json          generation, model, image folder, counts, sha256 of each file of the generation
    products.mc/generation-000007/  vectors.npy (N, E) float32 of unit length, a row for each distinct image; keys.npy,
                                    the sha256 of its content; files.parquet, the row of each file; search.faiss above
                                    100,000 images; texts.npy; bad_samples.jsonl
    products.mc/under-way/          vectors of a run that has not finished

A run writes a new generation and, when all of it is on the disk, replaces index.json in one step: whenever it is
killed, the old index or the new one is there, complete. The vectors computed so far are kept for the next run. An image
is identified by its content, so that a renamed, moved or copied one is not encoded again. The model is identified by
the sha256 of all that the vectors depend on: the image tower's weights, its projection, the preprocessing.
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
from miniclip.utils.files import sha256

INDEX, NEW, FORMAT = "index.json", "under-way", 2
GENERATION = re.compile(r"generation-(\d+)")
OURS = re.compile(rf"{GENERATION.pattern}|{NEW}|{re.escape(INDEX)}|lost\+found|Thumbs\.db|desktop\.ini|@eaDir|\..*")
SMALL = 1 << 26  # bytes up to which a file's sha256 is checked whenever the index is opened


class ImageIndexError(InputError):
    """An index that cannot be used, or not with this model or image folder."""


class ImageIndex:
    """An index in the generation that was current when it was opened. Later runs do not touch its files.

    `about` is the content of `index.json`, `vectors` are (N, E) float32, `keys` N times 32 bytes. Raises
    ImageIndexError for a folder without an index and for changed files; those above 64 MB are read only with `check`,
    otherwise just their size is compared.
    """

    def __init__(self, folder: str | Path, check: bool = False):
        self.folder = Path(folder)
        for attempt in range(5):  # a run may replace the generation between two lines here
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
        self.bad = {entry["sample"]: entry["reason"] for entry in map(json.loads, lines)}  # unreadable files
        if (how := self.about["search"])["method"] != "exact":
            path = self.place / "search.faiss"
            try:
                self.neighbours = Neighbours.read(path, how["method"], how["effort"], how["built"])
            except RuntimeError as error:  # faiss's
                if not path.exists():
                    raise FileNotFoundError(2, "removed while it was opened", str(path)) from None
                raise ImageIndexError(f"{path} cannot be read ({short(error)}): {REMEDY}") from None

    def __len__(self) -> int:
        """Returns the number of distinct images."""
        return len(self.vectors) if self.alive is None else int(self.alive.sum())

    def paths(self, row: int) -> list[str]:
        """Returns the files with a row's content, relative to the image folder."""
        start, end = np.searchsorted(self.rows, [row, row + 1])
        return self.table["path"][start:end].to_pylist()

    def find(self, queries: np.ndarray, k: int) -> list[list[tuple[float, int]]]:
        """Returns the k nearest rows for each of `queries` (Q, E) as (score, row), best first; fewer if there are no
        more."""
        if self.neighbours is None:  # then all rows are alive: an exact index is written without dead ones
            scores, rows = search(self.vectors, queries, k)
        else:
            scores, rows = self.neighbours.find(self.vectors, queries, k, self.alive)
        return [[(float(s), int(r)) for s, r in zip(*line)] for line in zip(scores, rows)]

    def files(self) -> dict[str, tuple[bytes, tuple]]:
        """Returns all files: path -> (key, (size, mtime, ctime)). Unchanged size and times mean unchanged content."""
        columns = [self.table[name].to_pylist() for name in ("path", "row", "size", "mtime", "ctime")]
        return {path: (self.key(row), tuple(stamp)) for path, row, *stamp in zip(*columns)}

    def key(self, row: int) -> bytes:
        """Returns the sha256 of a row's content."""
        return self.keys[32 * row : 32 * row + 32]


REMEDY = "copy the index again, or delete it and rebuild it"


def read_about(folder: Path) -> dict:
    """Reads and checks `index.json`. Raises ImageIndexError."""
    try:
        about = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        if about["format"] != FORMAT:
            raise ImageIndexError(f"{folder / INDEX} has format {short(about['format'])}, not {FORMAT}: delete the"
                                  " folder and rebuild the index")  # fmt: skip
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
        raise ImageIndexError(f"{folder} is not an index, it has no {INDEX}: make one with `search index`") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise ImageIndexError(f"{folder / INDEX} cannot be read ({error}): {REMEDY}") from None


def check_only_index(folder: Path):
    """Raises ImageIndexError for a folder that contains anything but an index, which might be the image folder. Files
    that operating systems create anywhere are ignored."""
    if (folder / INDEX).is_file():
        read_about(folder)  # an old format is reported first
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    if strange := [name for name in names if not OURS.fullmatch(name)]:
        more = f" and {len(strange) - 1} more" if len(strange) > 1 else ""
        remedy = "move that away, or choose another --index" if INDEX in names else "choose another --index"
        raise ImageIndexError(f"{folder} must contain nothing but the index, and has {min(strange)!r}{more}: {remedy}")


def fingerprint(model, preprocess) -> str:
    """Returns the sha256 of all that an image's vector depends on: the image tower's weights, its projection, the
    preprocessing."""
    config = model.config
    about = {"preprocess": vars(preprocess.cfg), "scale": preprocess.scale, "quick_gelu": config.quick_gelu}
    about |= {"tower": vars(config.vision_cfg), "format": FORMAT}
    digest = hashlib.sha256(feature_cache.fingerprint(model, model.visual, about).encode())
    for name, tensor in sorted(model.visual.proj.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def check_same(index: ImageIndex, mine: str, name: str, root: str | None, shard=None):
    """Raises ImageIndexError if an index is of another model, image folder or shard (unless those are None)."""
    about, folder = index.about, index.folder
    if about["model"]["fingerprint"] != mine:
        raise ImageIndexError(
            f"{folder} was made by the model {about['model']['name']} ({about['model']['fingerprint'][:12]}), and this"
            f" is {name} ({mine[:12]}): their vectors cannot be compared. Pass that model as --model, or make another"
            " index with this one"
        )
    if root is not None and about["root"] != root:
        raise ImageIndexError(
            f"{folder} is the index of {about['root']}, not of {root}: choose another --index, or pass --moved if the"
            " folder was moved"
        )
    if shard is not None and about["shard"] != list(shard):
        was, now = ("/".join(map(str, pair)) for pair in (about["shard"], shard))
        raise ImageIndexError(f"{folder} is shard {was} of its images, not {now}: choose another --index")
