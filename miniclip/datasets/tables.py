"""Hugging Face datasets: from the hub, from `save_to_disk`, and .parquet and .arrow files."""

import itertools
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from miniclip.datasets.records import NO_FILE, ImageRoot, ReadOptions, check_captions
from miniclip.datasets.shards import captions_in, expand
from miniclip.datasets.text_files import find_columns
from miniclip.utils.bad_samples import short
from miniclip.utils.errors import InputError
from miniclip.utils.image_files import ImageError, ImageFile

FILES = (".parquet", ".arrow")


def _at_split(source: str) -> tuple[Path, str | None]:
    path, _, name = source.rpartition(":")
    has_split = path and os.path.exists(path) and not os.path.exists(source)
    return (Path(path), name) if has_split else (Path(source), None)


def _is_saved(path: Path) -> bool:
    return any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json"))  # by `save_to_disk`


def _files(path: Path) -> list[str]:
    if path.is_dir():
        return sorted(str(file) for suffix in FILES for file in path.glob(f"*{suffix}"))
    return expand(str(path)) if path.suffix.lower() in FILES else []


def is_table(source: str) -> bool:
    """Returns whether a source is read by Hugging Face datasets."""
    path, _ = _at_split(source)
    return source.startswith("hf:") or path.suffix.lower() in FILES or _is_saved(path) or bool(_files(path))


def load_table(source: str, streaming: bool = False):
    """Loads hf:NAME, a folder, .parquet or .arrow as a Hugging Face Dataset, or with `streaming` an IterableDataset."""
    import datasets  # slow to import

    (path, part), hub = _at_split(source), source.startswith("hf:")
    saved = not hub and _is_saved(path)
    files = [] if hub or saved else _files(path)
    if missing := [file for file in files if not os.path.isfile(file)]:
        raise InputError(f"{missing[0]}: {NO_FILE} ({len(missing)} of {len(files)} are missing)")
    kinds = {Path(file).suffix.lower()[1:] for file in files}
    if len(kinds) > 1:
        raise InputError(f"{source}: parquet and arrow files together")
    if streaming and not hub and not files:
        raise InputError(f"{source}: only hf:NAME, .parquet and .arrow can be streamed")
    name, *rest = re.split(r":(?![^\[]*\])", source.removeprefix("hf:"))  # train[:10] is one part
    if hub and len(rest) > 2:
        raise InputError(f"{source}: expected hf:NAME, hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT")
    try:
        if hub:
            config, split = [None, None, *rest][-2:]
            found = datasets.load_dataset(name, config, split=split, streaming=streaming)
        elif kinds == {"arrow"} and not streaming:
            found = datasets.concatenate_datasets([datasets.Dataset.from_file(file) for file in files])
        elif files:
            found = datasets.load_dataset(*kinds, data_files=files, split="train", streaming=streaming)
        else:
            found = datasets.load_from_disk(str(path))
    except Exception as error:  # the network, the hub, the file: the library names it
        raise InputError(f"{source}: {type(error).__name__}: {str(error)[:500]}") from None
    splits = found if isinstance(found, dict) else {}
    if saved and part and part not in splits:
        raise InputError(f"{source}: there is no split {part!r} in it")
    if len(splits) > 1 and "train" not in splits and not part:
        raise InputError(f"{source}: which split? Name one: {', '.join(f'{source}:{name}' for name in splits)}")
    return splits[part or ("train" if "train" in splits else next(iter(splits)))] if splits else found


def table_root(source: str, options: ReadOptions) -> ImageRoot:
    """Returns where image paths in a table start. Those in a table of the hub lead into the library's cache."""
    (path, _), hub = _at_split(source), source.startswith("hf:")
    folder = options.image_root or ("" if hub else path if path.is_dir() else path.parent)
    return ImageRoot(folder, options.allow_outside_image_root or hub and not options.image_root)


@dataclass(eq=False)
class Cell(ImageFile):
    """An image in a table, looked up when it is read: bytes, {"bytes", "path"}, or a path below `root`."""

    rows: Sequence[dict]
    row: int
    column: str
    name: str
    root: ImageRoot

    def read(self) -> bytes:
        value = self.rows[self.row][self.column]
        if isinstance(value, dict):  # as the library keeps images
            value = value.get("bytes") or value.get("path")
        if isinstance(value, (bytes, bytearray)):
            return bytes(value)
        if not isinstance(value, str) or not value:
            raise ImageError(f"{self}: expected an image, found {short(value)}")
        try:
            return Path(self.root.file(value)).read_bytes()
        except (InputError, OSError) as error:
            raise ImageError(f"{self}: {error}") from None

    def __str__(self) -> str:
        return self.name


class Table(Sequence):
    """The rows of a Hugging Face Dataset as records. Rows without a caption raise InputError or are skipped."""

    def __init__(self, dataset, source: str, options: ReadOptions = ReadOptions()):
        import datasets

        self.source, self.root = source, table_root(source, options)
        self.columns = find_columns(dataset.column_names, options, source)
        if isinstance(dataset.features[self.columns[0]], datasets.Image):
            dataset = dataset.cast_column(self.columns[0], datasets.Image(decode=False))
        self.images, self.texts = (dataset.select_columns([column]) for column in self.columns)
        good, problems = [], []
        texts = (batch[self.columns[1]] for batch in self.texts.iter(1000))
        for row, value in enumerate(itertools.chain.from_iterable(texts)):
            try:
                check_captions(captions_in(value), "text")
                good.append(row)
            except InputError as error:
                problems.append((f"row {row}", str(error)))
        self.rows = np.array(good, np.int64)
        options.report(source, f"{len(problems)} of {len(self.texts)} rows cannot be used", problems, len(good))
        if not good:
            raise InputError(f"{source}: it has no rows")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        row = self.rows[index].item()
        image = Cell(self.images, row, self.columns[0], f"{self.source}: row {row}", self.root)
        return {"image": image, "caption": captions_in(self.texts[row][self.columns[1]])}
