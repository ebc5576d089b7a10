"""The image index: its files, how it is opened and checked, and the fingerprint of the model that made it.

An index is a folder. What is searched is one generation in it, and a small file says which (docs/index.md):

    products.mc/index.json          generation, model, image folder, counts, sha256 of each file of the generation
    products.mc/generation-000007/  vectors.npy (N, E) float32 of unit length, a row for each distinct image; keys.npy,
                                    the sha256 of its content; files.parquet, the row of each file; search.faiss above
                                    100,000 images; texts.npy; bad_samples.jsonl; of a model with late
                                    interaction patches.npy (N, P, D) float16
    products.mc/under-way/          vectors of a run that has not finished"""

import hashlib
import json
import re
from pathlib import Path

import numpy as np

from miniclip.index.neighbours import Neighbours, exact
from miniclip.inference import feature_cache
from miniclip.utils.bad_samples import NAME, short
from miniclip.utils.errors import InputError
from miniclip.utils.files import sha256

INDEX, FORMAT = "index.json", 2
GENERATION = re.compile(r"generation-(\d+)")
REMEDY = "copy the index again, or delete it and rebuild it"
SMALL = 1 << 26  # bytes up to which a file's sha256 is checked whenever the index is opened


class ImageIndexError(InputError):
    """An index that cannot be used, or not with this model or image folder."""


class ImageIndex:
    """An index in the generation that was current when it was opened. Later runs do not touch its files.

    `about` is the content of `index.json`, `vectors` are (N, E) float32, `keys` the sha256 of each row's content;
    `patches` (N, P, D) float16, or None, are those of late interaction. Raises ImageIndexError for a folder without an
    index and for changed files; of those above 64 MB only the size is compared, unless `check`."""

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
        import pyarrow.parquet  # slow, like faiss

        for name, (size, digest) in self.about["files"].items():
            path = self.place / name
            if path.stat().st_size != size or (check or size <= SMALL) and sha256(path) != digest:
                raise ImageIndexError(f"{path} is not what was written: {REMEDY}")
        self.vectors = np.load(self.place / "vectors.npy", mmap_mode="r", allow_pickle=False)
        patches = self.place / "patches.npy" if "patches.npy" in self.about["files"] else None
        self.patches = patches and np.load(patches, mmap_mode="r", allow_pickle=False)
        self.keys = np.load(self.place / "keys.npy", allow_pickle=False).tolist()
        with pyarrow.parquet.ParquetFile(self.place / "files.parquet") as file:
            self.table = file.read()  # in the order of rows; `read_table` and `to_numpy` would import pandas
        self.rows = np.frombuffer(self.table["row"].combine_chunks().buffers()[1], np.int64)[: len(self.table)]
        used = np.bincount(self.rows, minlength=len(self.vectors)) > 0
        self.alive = None if used.all() else used
        self.neighbours = None
        lines = (self.place / NAME).read_text(encoding="utf-8").splitlines() if NAME in self.about["files"] else []
        self.bad = {entry["sample"]: entry["reason"] for entry in map(json.loads, lines)}  # unreadable files
        if (how := self.about["search"])["method"] != "exact":
            import faiss

            path = self.place / "search.faiss"
            try:
                self.neighbours = Neighbours(faiss.read_index(str(path)), how["method"], how["built"], how["effort"])
            except RuntimeError as error:  # faiss's
                path.stat()  # FileNotFoundError if it was removed while it was opened
                raise ImageIndexError(f"{path} cannot be read ({short(error)}): {REMEDY}") from None

    def __len__(self) -> int:
        """Returns the number of distinct images."""
        return len(self.vectors) if self.alive is None else int(self.alive.sum())

    def __contains__(self, path: str) -> bool:
        """Returns whether a file, by its path relative to the image folder, is in the index."""
        return self.table["path"].index(path).as_py() >= 0

    def paths(self, row: int) -> list[str]:
        """Returns the files with a row's content, relative to the image folder."""
        start, end = np.searchsorted(self.rows, [row, row + 1])
        return self.table["path"][start:end].to_pylist()

    def find(self, vector: np.ndarray, k: int) -> list[tuple[float, int]]:
        """Returns the k rows nearest to a vector (E,), or all if there are fewer: (score, row), best first."""
        find = self.neighbours.find if self.neighbours else exact
        scores, rows = find(self.vectors, vector[None].astype(np.float32), k, self.alive)
        return list(zip(scores[0].tolist(), rows[0].tolist()))

    def files(self) -> dict[str, tuple[bytes, tuple]]:
        """Returns all files: path -> (key, (size, mtime, ctime)). Unchanged size and times mean unchanged content."""
        columns = [self.table[name].to_pylist() for name in ("path", "row", "size", "mtime", "ctime")]
        return {path: (self.keys[row], tuple(stamp)) for path, row, *stamp in zip(*columns)}

    def check_same(self, fingerprint: str, name: str, root: str | None = None, shard: tuple | None = None):
        """Raises ImageIndexError if the index is of another model, image folder or shard (unless those are None)."""
        model, folder = self.about["model"], self.folder
        if (made := model["fingerprint"]) != fingerprint:
            by = f"the model {model['name']} ({made[:12]}), and this is {name} ({fingerprint[:12]})"
            remedy = "Pass that model as --model, or make another index with this one"
            raise ImageIndexError(f"{folder} was made by {by}: their vectors cannot be compared. {remedy}")
        if root is not None and (was := self.about["root"]) != root:
            remedy = "choose another --index, or pass --moved if the folder was moved"
            raise ImageIndexError(f"{folder} is the index of {was}, not of {root}: {remedy}")
        if shard is not None and self.about["shard"] != list(shard):
            was, now = ("/".join(map(str, pair)) for pair in (self.about["shard"], shard))
            raise ImageIndexError(f"{folder} is shard {was} of its images, not {now}: choose another --index")


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
        about["model"] = {"precision": "fp32"} | about["model"]  # of indexes from before there was another
        tuned = {"effort": int, "built": int, "parameters": str, "recall@10": dict, "milliseconds": (int, float)}
        for place, kinds in (
            (about, {"root": str, "allow_outside": bool, "pictures": int, "copies": int, "bad": int, "shard": list}),
            (about["model"], {"name": str, "pretrained": (str, type(None)), "fingerprint": str, "precision": str}),
            (about["files"], dict.fromkeys(("vectors.npy", "keys.npy", "files.parquet", "texts.npy"), list)),
            (how, {"method": str, "asked": str, "why": str, **(tuned if how["method"] != "exact" else {})}),
        ):
            if wrong := [name for name, kind in kinds.items() if not isinstance(place[name], kind)]:
                raise TypeError(wrong[0])
        return about
    except FileNotFoundError:
        raise ImageIndexError(f"{folder} is not an index, it has no {INDEX}: run `search index --model`") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise ImageIndexError(f"{folder / INDEX} cannot be read ({error}): {REMEDY}") from None


def fingerprint(model, preprocess) -> str:
    """Returns the sha256 of all that an image's vector depends on."""
    config = model.config
    about = {"preprocess": vars(preprocess.cfg), "scale": preprocess.scale, "quick_gelu": config.quick_gelu}
    about |= {"tower": vars(config.vision_cfg), "format": FORMAT}
    digest = hashlib.sha256(feature_cache.fingerprint(model, model.visual, about).encode())
    for head in feature_cache.projections(model):
        for name, tensor in sorted(head.state_dict().items()):
            digest.update(name.encode() + tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()
