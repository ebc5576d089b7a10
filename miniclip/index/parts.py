"""What if the pictures are too many for one machine?

Each indexes a share of them; the parts become one index, as long as that fits into one memory:

    python -m miniclip search index photos --model runs/mine --index part1.mc --shard 1/8      # on the first of eight
    python -m miniclip search merge part*.mc --index all.mc

Beyond that the vectors go to where billions are searched, in the form that `clip-retrieval inference` writes: float32
vectors of unit length in `img_emb/img_emb_0.npy`, the file of each in `metadata/metadata_0.parquet`, column
`image_path`, a million to a file (github.com/rom1504/clip-retrieval; autofaiss reads the same):

    python -m miniclip search export all.mc --to embeddings
    clip-retrieval index --embeddings_folder embeddings --index_folder indices
"""

import os
import shutil
import warnings
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from miniclip.index.build import check_ours, clean, rows_of, write
from miniclip.index.image_index import INDEX, ImageIndex, ImageIndexError, check_same
from miniclip.index.neighbours import check_method
from miniclip.utils.errors import InputError
from miniclip.utils.files import lock, replacing, write_npy

FILE = 1_000_000  # rows of an exported file, as in clip-retrieval


def merge(parts: Iterable[str | Path], folder: str | Path, method: str = "auto", progress: bool = False) -> dict:
    """Makes one index of several, of the same model. Gives what its `index.json` says.

    Parts of one folder of pictures, as shards are, become an index of that, which `index` brings up to date; a warning
    says which shards are not among them. Those of others get paths from the folder that all lie in. Raises
    ImageIndexError for a part of another model, for a file that two of them have with different contents, and where
    `folder` is an index of something else.
    """
    check_method(method)
    folder, indexes = Path(folder), [ImageIndex(part, check=True) for part in parts]
    if len({index.folder.resolve() for index in indexes} | {folder.resolve()}) < len(indexes) + 1:
        raise ImageIndexError(f"{folder}: the parts and the whole must be indexes of their own, each said once")
    first = indexes[0].about
    for index in indexes[1:]:
        check_same(index, first["model"]["fingerprint"], first["model"]["name"], None)
    roots = {index.about["root"] for index in indexes}
    try:
        root = os.path.commonpath(roots)
    except ValueError as error:  # of several drives
        raise ImageIndexError(f"{', '.join(sorted(roots))} lie in no common folder ({error})") from None
    check_ours(folder)
    held = lock(folder, "--index")
    old = ImageIndex(folder) if (folder / INDEX).is_file() else None
    if old:
        check_same(old, first["model"]["fingerprint"], first["model"]["name"], root)
    clean(folder, old)
    files, broken, place, sources = {}, {}, {}, []
    for index in indexes:
        inside = os.path.relpath(index.about["root"], root).replace(os.sep, "/")
        prefix = "" if inside == "." else f"{inside}/"
        for name, (key, stamp) in index.files().items():
            if files.setdefault(prefix + name, (key, stamp))[0] != key:
                raise ImageIndexError(
                    f"{index.folder} and a part before it have {prefix + name} with different contents: bring both up"
                    " to date by `index`"
                )
        broken |= {prefix + name: reason for name, reason in index.bad.items()}
        rows = [row for row in np.unique(index.rows).tolist() if index.key(row) not in place]
        place |= {index.key(row): None for row in rows}
        sources.append((index.vectors, rows))
    broken = {name: reason for name, reason in broken.items() if name not in files}
    about = {"model": first["model"], "root": root, "shard": [1, 1]}
    about["allow_outside"] = any(index.about["allow_outside"] for index in indexes)
    texts = np.load(indexes[0].place / "texts.npy", allow_pickle=False)
    write(folder, about, rows_of(*sources), b"".join(place), files, broken, texts, method, None, progress)
    held.close()
    for root in sorted(roots):
        shards = [index.about["shard"] for index in indexes if index.about["root"] == root]
        for n in sorted({n for _, n in shards} - {1} if [1, 1] not in shards else ()):
            if missing := [f"{i}/{n}" for i in range(1, n + 1) if [i, n] not in shards]:
                warnings.warn(
                    f"{folder} is without the shards {', '.join(missing[:10])} of {root}: unless none of its pictures"
                    " is in them, index those and merge again, or bring all up to date by `index`",
                    stacklevel=2,
                )
    return about


def export(index: ImageIndex, folder: str | Path) -> int:
    """Writes the vectors and paths of an index into a new folder, in clip-retrieval's form: a row for each file, copies
    too. Gives the number of rows. Raises InputError where there is something in the folder already."""
    import pyarrow as pa
    import pyarrow.parquet

    folder = Path(folder)
    if folder.is_dir() and any(folder.iterdir()):
        raise InputError(f"{folder} is not empty: export to a new folder")
    for name in ("img_emb", "metadata"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    n = len(index.rows)
    digits = len(str((n - 1) // FILE))  # in the order of their numbers the files are in that of their names too
    try:
        for part, start in enumerate(range(0, n, FILE)):
            rows, number = index.rows[start : start + FILE], f"{part:0{digits}d}"
            with replacing(folder / "img_emb" / f"img_emb_{number}.npy") as scratch:
                write_npy(scratch, "<f4", (len(rows), index.vectors.shape[1]), [index.vectors[rows]])
            names = index.table["path"][start : start + FILE].to_pylist()
            paths = [os.path.join(index.about["root"], name) for name in names]
            with replacing(folder / "metadata" / f"metadata_{number}.parquet") as scratch:
                pa.parquet.write_table(pa.table({"image_path": paths}), scratch)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return n
