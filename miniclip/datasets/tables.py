"""TODO docstring."""

import itertools
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from miniclip.datasets.records import ImageRoot, check_captions
from miniclip.datasets.shards import captions_in, expand
from miniclip.datasets.text_files import _columns
from miniclip.utils.bad_samples import leave_out, short
from miniclip.utils.errors import InputError
from miniclip.utils.image_files import ImageError

# --- Hugging Face datasets.


def _at_split(spec: str) -> tuple[str, str | None]:
    """A path and the split named after it, if one is."""
    if os.path.exists(spec) or ":" not in spec:
        return spec, None
    path, _, name = spec.rpartition(":")
    return (path, name) if os.path.exists(path) else (spec, None)


def _is_table(path: Path) -> bool:
    return any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json")) or any(
        itertools.chain(path.glob("*.parquet"), path.glob("*.arrow"))
    )


def load_table(spec: str, streaming: bool = False):
    """A Hugging Face Dataset, or with `streaming` an IterableDataset, from hf:NAME, a folder, .parquet or .arrow."""
    import datasets

    path, part = _at_split(spec)
    files = expand(path) if Path(path).suffix.lower() in (".parquet", ".arrow") else []
    if os.path.isdir(path) and not any((Path(path) / f"dataset_{n}.json").is_file() for n in ("info", "dict")):
        files = sorted(map(str, [*Path(path).glob("*.parquet"), *Path(path).glob("*.arrow")]))
    missing = [file for file in files if not os.path.isfile(file)]
    if missing:
        raise InputError(f"{missing[0]}: no such file ({len(missing)} of {len(files)} are not there)")
    try:
        if spec.startswith("hf:"):
            name, *rest = re.split(r":(?![^\[]*\])", spec[3:])  # train[:10] is one part
            if len(rest) > 2:
                raise InputError(f"{spec}: expected hf:NAME, hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT")
            config, part = rest if len(rest) == 2 else (None, *rest, None)[:2]
            found = datasets.load_dataset(name, config, split=part, streaming=streaming)
        elif files:
            kinds = {Path(file).suffix.lower()[1:] for file in files}
            if len(kinds) > 1:
                raise InputError(f"{spec}: parquet and arrow files together")
            if kinds == {"arrow"} and not streaming:
                return datasets.concatenate_datasets([datasets.Dataset.from_file(file) for file in files])
            found = datasets.load_dataset(*kinds, data_files=files, split="train", streaming=streaming)
        elif streaming:
            raise InputError(f"{spec}: only hf:NAME, .parquet and .arrow can be streamed")
        else:
            found = datasets.load_from_disk(path)
            if part and part not in (found if isinstance(found, dict) else ()):
                raise InputError(f"{spec}: there is no split {part!r} in it")
            found = found[part] if part else found
    except InputError:
        raise
    except Exception as error:  # the network, the hub, the file: the library names it
        raise InputError(f"{spec}: {type(error).__name__}: {str(error)[:500]}") from None
    if isinstance(found, dict):  # splits
        if len(found) > 1 and "train" not in found:
            raise InputError(f"{spec}: which split? Say one of {', '.join(f'{spec}:{name}' for name in found)}")
        found = found.get("train", next(iter(found.values())))
    return found


def table_root(spec: str) -> str | None:
    """The folder that image paths in a table start from: the table's own; that of a hub name is not known."""
    path = Path(_at_split(spec)[0])
    return None if spec.startswith("hf:") else str(path if path.is_dir() else path.parent)


def undecoded(dataset, image: str):
    """The dataset with its image column as it is stored, not decoded."""
    import datasets

    feature = (dataset.features or {}).get(image)
    return dataset.cast_column(image, datasets.Image(decode=False)) if isinstance(feature, datasets.Image) else dataset


def table_image_root(spec: str, root: str | None, allow_outside: bool) -> ImageRoot:
    """Where image paths in a table start. Those of the hub the library has put somewhere in its own cache."""
    return ImageRoot(root or table_root(spec) or "", allow_outside or root is None and spec.startswith("hf:"))


def cell_bytes(cell, root: ImageRoot, name: str) -> bytes:
    """The bytes of an image in a table: they themselves, {"bytes", "path"}, or a path. Raises ImageError."""
    if isinstance(cell, dict):  # as the library keeps images
        cell = cell.get("bytes") or cell.get("path")
    if isinstance(cell, (bytes, bytearray)):
        return bytes(cell)
    if not isinstance(cell, str) or not cell:
        raise ImageError(f"{name}: there is no image in it but {short(cell)}")
    try:
        return Path(root.file(cell)).read_bytes()
    except (InputError, OSError) as error:
        raise ImageError(f"{name}: {error}") from None


class Cell:
    """An image within a table. `read` gives its bytes, `str` its name."""

    __slots__ = ("table", "row")

    def __init__(self, table: "Table", row: int):
        self.table, self.row = table, row

    def read(self) -> bytes:
        """The image file as it was stored. Raises ImageError."""
        table = self.table
        return cell_bytes(table.images[self.row][table.columns[0]], table.root, str(self))

    def __str__(self) -> str:
        return f"{self.table.spec}: row {self.row}"


class Table(Sequence):
    """The rows of a Hugging Face Dataset as records. About rows whose caption is none see `leave_out`."""

    def __init__(self, dataset, spec: str, image_column=None, caption_column=None, root=None, on_bad="stop", **bad):
        self.spec, self.root = spec, root or ImageRoot("")
        self.columns = _columns(dataset.column_names, image_column, caption_column, spec)
        dataset = undecoded(dataset, self.columns[0])
        self.images, self.texts = (dataset.select_columns([column]) for column in self.columns)
        good, problems, row = [], [], 0
        for batch in self.texts.iter(1000):
            for value in batch[self.columns[1]]:
                try:
                    check_captions(captions_in(value), "text")
                    good.append(row)
                except InputError as error:
                    problems.append((f"row {row}", str(error)))
                row += 1
        self.rows = np.array(good, np.int64)
        what = f"{len(problems)} of {row} rows cannot be used"
        leave_out(spec, what, problems, len(good), f"{spec}: ", on_bad, **bad)
        if not good:
            raise InputError(f"{spec}: there is no row in it")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        row = self.rows[index].item()
        return {"image": Cell(self, row), "caption": captions_in(self.texts[row][self.columns[1]])}
