"""Hugging Face datasets: from the hub, from `save_to_disk`, and .parquet and .arrow files."""

import glob
import itertools
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from miniclip.datasets.captions import captions_of
from miniclip.datasets.records import NO_FILE, ImageRoot, ReadOptions, check_captions, image_root
from miniclip.datasets.shards import expand
from miniclip.datasets.splits import choose_split, is_hub, split_column, split_of
from miniclip.datasets.text_files import find_columns
from miniclip.utils.bad_samples import short
from miniclip.utils.errors import InputError
from miniclip.utils.image_files import ImageError, ImageFile
from miniclip.utils.remote import is_remote

FILES = (".parquet", ".arrow")


def is_saved(path: Path) -> bool:
    """Returns whether a folder was written by `save_to_disk`."""
    return any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json"))


def _files(path: Path) -> list[str]:
    if path.is_dir():
        return sorted(str(file) for suffix in FILES for file in path.glob(f"*{suffix}"))
    return expand(str(path)) if path.suffix.lower() in FILES else []


def is_table(source: str) -> bool:
    """Returns whether a source is read by Hugging Face datasets."""
    path = Path(source)
    return is_hub(source) or path.suffix.lower() in FILES or is_saved(path) or bool(_files(path))


def load_table(source: str, part: str | None = None, streaming: bool = False) -> tuple:
    """Loads a split of hf:NAME, a folder, .parquet or .arrow as a Hugging Face Dataset, or with `streaming` as an
    IterableDataset. Returns it, the split that was asked for, and whether only its column `split` can have that."""
    import datasets  # slow to import

    path, hub, strict = Path(source), is_hub(source), False
    saved = not hub and is_saved(path)
    files = [] if hub or saved else _files(path) if not is_remote(source) else expand(source)  # those are streamed
    if missing := [file for file in files if not (is_remote(file) or os.path.isfile(file))]:
        raise InputError(f"{missing[0]}: {NO_FILE} ({len(missing)} of {len(files)} are missing)")
    if len(kinds := {Path(file).suffix.lower()[1:] for file in files}) > 1:
        raise InputError(f"{source}: parquet and arrow files together")
    if streaming and not hub and not files:
        raise InputError(f"{source}: only hf:NAME, .parquet and .arrow can be streamed")
    name, *rest = re.split(r":(?![^\[]*\])", source.removeprefix("hf:"))  # train[:10] is one part
    if hub and len(rest) > 2:
        raise InputError(f"{source}: expected hf:NAME, hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT")
    try:
        if hub:
            config, named = [None, None, *rest][-2:]
            part = named or part
            try:
                found = datasets.load_dataset(name, config, split=part, streaming=streaming)
            except ValueError as error:
                found = {} if "Unknown split" not in str(error) and "Bad split" not in str(error) else (
                    datasets.load_dataset(name, config, streaming=streaming))  # fmt: skip
                if len(found) != 1:
                    raise
                strict = True
        elif kinds == {"arrow"} and not streaming:
            found = datasets.concatenate_datasets([datasets.Dataset.from_file(file) for file in files])
        elif files:
            names = [file if is_remote(file) else glob.escape(file) for file in files]  # a folder may be called x[1]
            found = datasets.load_dataset(*kinds, data_files=names, split="train", streaming=streaming)
        else:
            found = datasets.load_from_disk(str(path))
    except Exception as error:  # the network, the hub, the file: the library names it
        reason = error.__cause__ or error
        if twice := re.search(r'(?:matches for FieldRef.Name\(|Field ")(.*?)(?:\) in|" exists \d)', str(reason)):
            raise InputError(f"{source}: two columns are named {twice[1]!r}: rename or remove one") from None
        raise InputError(f"{source}: {type(reason).__name__}: {str(reason)[:500]}") from None
    splits = found if isinstance(found, dict) else {}
    if saved and part and part not in splits and len(splits) > 1:
        raise InputError(f"{source}: there is no split {part!r} in it, only {', '.join(splits)}")
    if len(splits) > 1 and "train" not in splits and not part:
        raise InputError(f"{source}: which split? Name one: {', '.join(f'{source}:{name}' for name in splits)}")
    if not splits:
        return found, part, strict or not hub
    name = part if part in splits else "train" if "train" in splits else next(iter(splits))
    return splits[name], part, name != part


def table_root(source: str, options: ReadOptions) -> ImageRoot:
    """Returns where image paths in a table start. Those in a table of the hub lead into the library's cache."""
    path, hub = Path(source), is_hub(source)
    here = source.rpartition("/")[0] if is_remote(source) else path if path.is_dir() else path.parent
    folder = options.image_root or ("" if hub else here)
    return image_root(folder, options.allow_outside_image_root or hub and not options.image_root)


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
            file = self.root.file(value)
            return file.read() if isinstance(file, ImageFile) else Path(file).read_bytes()
        except (InputError, OSError) as error:
            raise ImageError(f"{self}: {error}") from None

    def __str__(self) -> str:
        return self.name


class Table(Sequence):
    """The rows of a Hugging Face Dataset as records, those of one image path as one. Rows without a caption raise
    InputError or are skipped. With `strict` the split that the options name must be in the column `split`."""

    def __init__(self, dataset, source: str, options: ReadOptions = ReadOptions(), strict: bool = True):
        import datasets

        self.source, self.root = source, table_root(source, options)
        self.columns = find_columns(dataset.column_names, options, source)
        image, *texts = self.columns
        if isinstance(dataset.features[image], datasets.Image):
            dataset = dataset.cast_column(image, datasets.Image(decode=False))
        self.images, self.texts = (dataset.select_columns(columns) for columns in ([image], texts))
        problems, groups = [], {}
        chosen = choose_split(_splits(dataset), options.split, source, strict)
        is_path = getattr(dataset.features[image], "dtype", None) in ("string", "large_string")
        paths = _column(dataset, image) if is_path else itertools.repeat(None)
        cells = zip(*(_column(dataset, text) for text in texts))
        for row, (values, path) in enumerate(zip(cells, paths)):
            if not chosen[row]:
                continue
            try:
                check_captions(captions_of(dict(zip(texts, values)), texts), path or "text")
                groups.setdefault(path or row, []).append(row)
            except InputError as error:
                problems.append((f"row {row}", str(error)))
        self.rows = np.array([rows[0] for rows in groups.values()], np.int64)
        self.groups = {rows[0]: rows for rows in groups.values() if len(rows) > 1}
        options.report(source, f"{len(problems)} of {sum(chosen)} rows cannot be used", problems, len(groups))
        if not groups:
            raise InputError(f"{source}: it has no rows")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        row = self.rows[index].item()
        image = Cell(self.images, row, self.columns[0], f"{self.source}: row {row}", self.root)
        texts = (captions_of(self.texts[same], self.columns[1:]) for same in self.groups.get(row, [row]))
        return {"image": image, "caption": list(itertools.chain.from_iterable(texts))}


def _column(dataset, column: str) -> Iterator:
    """Yields the values of a column without keeping them all."""
    return itertools.chain.from_iterable(batch[column] for batch in dataset.select_columns([column]).iter(1000))


def _splits(dataset) -> list[str]:
    """Returns the split that each row names; a ClassLabel numbers them."""
    if (column := split_column(dataset.column_names)) is None:
        return [""] * len(dataset)
    names = getattr(dataset.features[column], "names", None)
    return [split_of({"split": names[value] if names and value is not None else value})
            for value in _column(dataset, column)]  # fmt: skip
