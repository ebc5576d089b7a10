"""Index shards: merging the parts that several machines indexed, and exporting vectors to other search engines."""

import os
import warnings
from collections.abc import Iterable
from itertools import chain
from pathlib import Path

import numpy as np

from miniclip.index.build import open_to_write, rows_of, write
from miniclip.index.image_index import ImageIndex, ImageIndexError
from miniclip.index.neighbours import check_method
from miniclip.utils.errors import InputError
from miniclip.utils.files import replacing, write_npy

FILE = 1_000_000  # rows of an exported file, as in clip-retrieval


def merge(parts: Iterable[str | Path], folder: str | Path, method: str = "auto", progress: bool = False) -> dict:
    """Merges indexes made by the same model into a new one. Returns the content of its `index.json`.

    Shards of one image folder become the index of that folder, which `index` can update; missing shards are named in a
    warning. Parts of different folders become the index of their common parent. Raises ImageIndexError for a part of
    another model, for a file with different contents in two parts, and if `folder` is an index of something else."""
    check_method(method)
    folder, indexes = Path(folder), [ImageIndex(part, check=True) for part in parts]
    if len({index.folder.resolve() for index in indexes} | {folder.resolve()}) < len(indexes) + 1:
        raise ImageIndexError(f"{folder}: the parts and the merged index must be different indexes, each named once")
    first = indexes[0].about
    same = first["model"]["fingerprint"], first["model"]["name"]
    shards = {}  # image folder -> its shards
    for index in indexes:
        index.check_same(*same)
        shards.setdefault(index.about["root"], []).append(index.about["shard"])
    try:
        root = os.path.commonpath(shards)
    except ValueError as error:  # on several drives
        raise ImageIndexError(f"{', '.join(sorted(shards))} have no common folder ({error})") from None
    _, held = open_to_write(folder, False, *same, root)
    files, broken, keys, vectors, patches = {}, {}, {}, [], []
    for index in indexes:
        inside = os.path.relpath(index.about["root"], root).replace(os.sep, "/")
        prefix = "" if inside == "." else f"{inside}/"
        for name, (key, stamp) in index.files().items():
            if files.setdefault(prefix + name, (key, stamp))[0] != key:
                raise ImageIndexError(f"{index.folder} and a part before it have {prefix + name} with different"
                                      " contents: update both with `search index`")  # fmt: skip
        broken |= {prefix + name: reason for name, reason in index.bad.items()}
        rows = [row for row in np.unique(index.rows).tolist() if index.keys[row] not in keys]
        keys |= {index.keys[row]: None for row in rows}
        vectors.append(rows_of(index.vectors, rows))
        if index.patches is not None:  # as in all others: the model is the same
            patches.append(rows_of(index.patches, rows))
    broken = {name: reason for name, reason in broken.items() if name not in files}
    # Of parts in several precisions the whole is in the lowest, in which updates go on: their vectors nearly agree.
    lowest = min(index.about["model"]["precision"] for index in indexes)  # bf16 before fp32
    about = {"model": first["model"] | {"precision": lowest}, "root": root, "shard": [1, 1]}
    about["allow_outside"] = any(index.about["allow_outside"] for index in indexes)
    texts = np.load(indexes[0].place / "texts.npy", allow_pickle=False)
    patches = ((len(keys), *indexes[0].patches.shape[1:]), chain(*patches)) if patches else None
    write(folder, about, chain(*vectors), list(keys), files, broken, texts, method, None, progress, patches)
    held.close()
    for root, there in sorted(shards.items()):
        for n in sorted({n for _, n in there}) if [1, 1] not in there else ():
            if missing := [f"{i}/{n}" for i in range(1, n + 1) if [i, n] not in there]:
                warnings.warn(f"{folder} is without the shards {', '.join(missing[:10])} of {root}. Unless they have no"
                              " images, index them and merge again, or update the merged index with `search index`",
                              stacklevel=2)  # fmt: skip
    return about


def export(index: ImageIndex, folder: str | Path) -> int:
    """Writes an index into a new folder as `clip-retrieval inference` would (github.com/rom1504/clip-retrieval): for
    each file the float32 vector in `img_emb/img_emb_0.npy` and the path in `metadata/metadata_0.parquet`, column
    `image_path`. Returns the number of rows. Raises InputError if the folder is not empty."""
    import pyarrow as pa
    import pyarrow.parquet

    folder, n = Path(folder), len(index.rows)
    if folder.is_dir() and any(folder.iterdir()):
        raise InputError(f"{folder} is not empty: export to a new folder")
    digits = len(str((n - 1) // FILE))  # zeros in front make the alphabetical order that of the rows
    with replacing(folder) as scratch:
        (scratch / "img_emb").mkdir(parents=True)
        (scratch / "metadata").mkdir()
        for part, start in enumerate(range(0, n, FILE)):
            rows, number = index.rows[start : start + FILE], f"{part:0{digits}d}"
            shape = (len(rows), index.vectors.shape[1])
            write_npy(scratch / "img_emb" / f"img_emb_{number}.npy", "<f4", shape, [index.vectors[rows]])
            names = index.table["path"][start : start + FILE].to_pylist()
            paths = [os.path.join(index.about["root"], name) for name in names]
            pa.parquet.write_table(pa.table({"image_path": paths}), scratch / "metadata" / f"metadata_{number}.parquet")
    return n
