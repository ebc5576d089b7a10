"""In which forms can pairs come, and how does each become the same records?

    captions.json                     [{"image": "a.jpg", "caption": ["a dog", "my dog"]}, ...]
    captions.jsonl                    one such object a line
    captions.csv, captions.tsv        a line of column names, then one caption a line
    folder/                           images, each with a.txt, a.caption or a.json beside it
    shards/{000..123}.tar, shards/    WebDataset shards (`miniclip.shards`)
    hf:NAME, hf:NAME:SPLIT            a data set of the Hugging Face hub; also hf:NAME:CONFIG:SPLIT
    folder/, folder:SPLIT             what `save_to_disk` of Hugging Face datasets wrote
    *.parquet, *.arrow                its tables
    A::B                              several of them

Whatever the form, `read_source` gives a sequence of {"image": where, "caption": [strings]}, where `where` is a path, or
for an image that is no file of its own a handle: `read` gives its bytes, `str` its name. `python -m miniclip.sources
convert FROM TO` turns one form into another.
"""

import csv
import io
import itertools
import logging
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from miniclip.bad_samples import BadSamples
from miniclip.captions import (
    CaptionFileError,
    ImageRoot,
    check_captions,
    check_records,
    image_fault,
    leave_out,
    parse_json,
    read_captions,
    read_text,
    short,
)
from miniclip.config import InputError
from miniclip.data import as_table
from miniclip.inference import read_ahead
from miniclip.shards import CAPTION_KEYS, CAPTIONS, IMAGES, Shards, captions_in, expand, parse_caption
from miniclip.transforms import ImageError

logger = logging.getLogger(__name__)

# Names of columns, compared without case; the first that is there is taken.
IMAGE_KEYS = ("image", "filepath", "image_path", "img", "img_path", "file_name", "filename", "path", "file",
              "image_file", "jpg", "jpeg", "png", "webp")  # fmt: skip
TEXT_KEYS = (*CAPTION_KEYS, "txt", "sentences_raw", "alt_text", "alt")


class ColumnError(CaptionFileError):
    """A column that was named is not there."""


def read_source(
    spec: str,
    image_root: str | None = None,
    check_images: bool = True,
    on_bad: str = "stop",
    *,
    allow_outside: bool = False,
    bad_samples: BadSamples | None = None,
    check_handles: bool = False,
    image_column: str | None = None,
    caption_column: str | None = None,
    factors: str | None = None,
    num_samples: int | None = None,
) -> Sequence[dict]:
    """The records of a source in any of the forms above.

    `image_root`, `check_images`, `on_bad`, `allow_outside` and `bad_samples` are those of `read_captions`; of several
    sources each may have its root (`A::B`). `check_images` is for images in files of their own; `check_handles` decodes
    the others once too, which otherwise training finds to be damaged. `image_column` and `caption_column` name columns
    where they are not to be guessed. `factors` ("1::2.5") and `num_samples` make an epoch as `Mixture` says. Raises
    InputError for what cannot be read, for all sources together.
    """
    specs, sources, problems = split(spec), [], []
    roots = split(image_root) if image_root else [None]
    if len(roots) not in (1, len(specs)):
        raise InputError(f"{spec}: {len(roots)} image roots for {len(specs)} sources: give one, or one for each")
    for part, root in zip(specs, itertools.cycle(roots)):
        try:
            bad = {"on_bad": on_bad, "bad_samples": bad_samples}
            how = (bad, allow_outside, check_images, check_handles)
            sources.append(_read_one(part, root, *how, image_column, caption_column))
        except InputError as error:
            problems.append(error)
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise CaptionFileError("\n".join(map(str, problems)))
    if factors is None and num_samples is None:
        if all(isinstance(source, list) for source in sources):
            return list(itertools.chain(*sources))
        if len(sources) == 1:
            return sources[0]
    return Mixture(sources, parse_factors(factors, len(sources)), num_samples)


def split(spec: str) -> list[str]:
    """The sources in a specification, which `::` separates."""
    parts = [part.strip() for part in str(spec).split("::")]
    if not all(parts):
        raise InputError(f"{spec!r}: there is nothing at one side of a ::")
    return parts


def parse_factors(text: str | None, n: int) -> list[float] | None:
    """The upsampling factors of n sources, in OpenCLIP's form: "1::2.5"."""
    if text is None:
        return None
    try:
        factors = [float(part) for part in str(text).split("::")]
    except ValueError:
        factors = []
    if len(factors) != n or not all(0 <= factor < float("inf") for factor in factors) or not any(factors):
        raise InputError(f"train_data_upsampling_factors {text!r}: expected {n} numbers from 0, with :: between them")
    return factors


def _read_one(
    spec, root, bad: dict, allow_outside, check_images, check_handles, image_column, caption_column
) -> Sequence[dict]:
    suffix, path = Path(spec).suffix.lower(), Path(spec)
    columns = (image_column, caption_column)
    if suffix in READERS or path.is_dir() and not _is_table(path) and not any(path.glob("*.tar")):
        if suffix == ".json" and columns == (None, None):
            return read_captions(path, root, check_images, allow_outside=allow_outside, **bad)
        folder = ImageRoot(path if path.is_dir() else root or path.parent, allow_outside)
        raw, names = READERS[suffix](path, *columns) if suffix in READERS else _read_folder(folder, caption_column)
        return check_records(path, raw, folder, check_images, names=names, **bad)
    if suffix in (".tar", ".tgz") or re.search(r"\.tar\.\w+$", spec) or path.is_dir() and any(path.glob("*.tar")):
        paths = sorted(map(str, path.glob("*.tar"))) if path.is_dir() else expand(spec)
        missing = [p for p in paths if not os.path.isfile(p)]
        if bad["on_bad"] == "skip" and 0 < len(missing) < len(paths):
            what = f"{len(missing)} of {len(paths)} shards are not there"
            leave_out(spec, what, [(path, "no such file") for path in missing], len(paths) - len(missing), "", **bad)
            paths = [p for p in paths if p not in set(missing)]
        source = Shards(paths, caption_column, **bad)
    elif spec.startswith("hf:") or suffix in (".parquet", ".arrow") or _is_table(Path(_at_split(spec)[0])):
        root = table_image_root(spec, root, allow_outside)
        source = Table(load_table(spec), spec, *columns, root, **bad)
    elif not path.exists():
        raise InputError(f"{spec}: no such file or folder (a data set of the Hugging Face hub is hf:{spec})")
    else:
        known = ", ".join((*READERS, ".tar", ".parquet", ".arrow", "a folder", "hf:NAME"))
        raise InputError(f"{spec}: of no form that is known: {known}")
    return without_damaged(source, spec, **bad) if check_handles else source


# --- Files with a record or a caption a line, and folders: images in files of their own.


def _column(given: str | None, known: Iterable[str], there: Sequence[str], where: str, what: str) -> str:
    """The column that is named, or else the first of the known names that is there."""
    if given is not None:
        if given not in there:
            raise ColumnError(f"{where}: there is no column {given!r}, only {', '.join(map(repr, there))}")
        return given
    folded = {str(name).strip().lower(): name for name in reversed(list(there))}
    found = [folded[name] for name in known if name in folded]
    if not found:
        listed = ", ".join(map(repr, there))
        raise InputError(f"{where}: which column has the {what}? Name it by --{what}_column: {listed}")
    if len(found) > 1:
        logger.warning("%s: taking column %r for the %s; there is %r too", where, found[0], what, found[1])
    return found[0]


def _grouped(rows: Iterable[tuple]) -> tuple[list, list[str]]:
    """Raw records and their names from (line number, image, captions or a fault): lines with the same image are one."""
    records, names = {}, []
    for line, image, captions in rows:
        key = image if isinstance(image, str) else ("line", line)
        if not isinstance(captions, InputError):
            try:
                check_captions(captions, image)
            except InputError as error:
                captions = error
        if isinstance(captions, InputError):
            records["line", line] = captions
        elif key in records:
            records[key]["caption"] += captions
            continue
        else:
            records[key] = {"image": image, "caption": captions}
        names.append(f"line {line}")
    return list(records.values()), names


def _read_jsonl(path: Path, image_column, caption_column):
    def rows():
        columns = None
        # Not splitlines, which breaks at other characters too.
        for number, line in enumerate(read_text(path).split("\n"), 1):
            if not line.strip():
                continue
            try:
                record = parse_json(line)
            except InputError as error:
                record = error
            if not isinstance(record, dict):
                fault = InputError(f"expected an object, found {short(record)}")
                yield number, None, record if isinstance(record, InputError) else fault
                continue
            if columns is None:
                columns = _columns(record, image_column, caption_column, f"{path}, line {number}")
            missing = [column for column in columns if column not in record]
            if missing:
                yield number, None, InputError(f"there is no {missing[0]!r} in it: {line[:60]}")
            else:
                yield number, record[columns[0]], captions_in(record[columns[1]])

    return _some(path, *_grouped(rows()))


def _read_json(path: Path, image_column, caption_column):
    raw = parse_json(read_text(path), path)
    first = next((record for record in raw if isinstance(record, dict)), None) if isinstance(raw, list) else None
    if first is None:
        raise CaptionFileError(f"{path}: expected a list of records, found {short(raw)}")
    image, caption = _columns(first, image_column, caption_column, str(path))
    renamed = [
        {"image": record[image], "caption": captions_in(record[caption])}
        if isinstance(record, dict) and {image, caption} <= record.keys()
        else record
        if isinstance(record, InputError)
        else InputError(f"expected an object with {image} and {caption}, found {short(record)}")
        for record in raw
    ]
    return renamed, None


def _read_table_text(path: Path, image_column, caption_column):
    text = read_text(path)
    text = text if "\n" in text else text.replace("\r", "\n")  # an old Mac's
    header = text.partition("\n")[0].rstrip("\r")
    csv.field_size_limit(1 << 24)
    fault, columns = None, None
    for delimiter in sorted("\t,;", key=header.count, reverse=True):
        try:  # OpenCLIP's .csv files have tabs: the separator is the one that gives both columns
            head = next(csv.reader([header], delimiter=delimiter, strict=True), [])
            columns = _columns(head, image_column, caption_column, str(path))
            break
        except (InputError, csv.Error) as error:
            fault = fault or (error if isinstance(error, InputError) else f"{path}: {error}")
    if columns is None:
        raise CaptionFileError(f"{fault} (the first line names the columns, with tab, comma or semicolon between)")
    places = [head.index(column) for column in columns]

    def rows():
        # Strictly: otherwise a lone quote at the start of a cell would swallow all up to the next one.
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        next(reader)
        line = reader.line_num + 1
        try:
            for row in reader:
                if row:  # an empty line is none
                    yield line, *checked(row)
                line = reader.line_num + 1
        except csv.Error:  # from the row on that is at fault, each line is taken by itself
            for number, row in enumerate(io.StringIO(text, newline=""), 1):
                if number >= line and row.strip():
                    try:
                        yield number, *checked(next(csv.reader([row], delimiter=delimiter, strict=True)))
                    except csv.Error as error:
                        fault = f'a quote that does not fit ({error}): write "..." around the cell, "" for each within'
                        yield number, None, InputError(f"{fault}: {row.strip()[:60]}")

    def checked(row: list[str]) -> tuple:
        """Image and captions of a row, or None and the fault."""
        if len(row) != len(head):
            fault = f"{len(row)} cells for {len(head)} columns (a {delimiter!r} in a cell wants quotes)"
            return None, InputError(f"{fault}: {delimiter.join(row)[:60]}")
        return row[places[0]], [row[places[1]]]

    return _some(path, *_grouped(rows()))


def _columns(there, image_column, caption_column, where: str) -> tuple[str, str]:
    there = list(there)
    image = _column(image_column, IMAGE_KEYS, there, where, "image")
    return image, _column(caption_column, TEXT_KEYS, [name for name in there if name != image], where, "caption")


def _some(path: Path, raw: list, names: list[str]):
    if not raw:
        raise CaptionFileError(f"{path}: there is no record in it")
    return raw, names


def _read_folder(root: ImageRoot, caption_key: str | None):
    """Images with a caption file beside each, in folders at any depth; in order of their names."""
    raw, names, beside = [], [], {}  # beside: path without its extension -> {extension: path}

    def fault(name: str, reason: str):
        names.append(name)
        raw.append(InputError(reason))

    for here, files in root.walk(fault):
        for name in files:
            stem, extension = os.path.splitext(name)
            if extension.lower()[1:] in (*IMAGES, *CAPTIONS):
                place = os.path.normpath(os.path.join(here, stem))
                kinds, kind = beside.setdefault(place, {}), extension.lower()[1:]
                if kind in kinds:
                    fault(place + extension, f"it differs from {kinds[kind]} in letter case alone: rename one")
                kinds.setdefault(kind, place + extension)
    for _, files in sorted(beside.items()):
        images = [files[kind] for kind in IMAGES if kind in files]
        text = next((kind for kind in (["json"] if caption_key else CAPTIONS) if kind in files), None)
        for image in images or [None]:
            if image is None or text is None:
                lacking = "image" if image is None else "caption file (.txt, .caption or .json)"
                fault(image or next(iter(files.values())), f"there is no {lacking} beside it")
                continue
            try:
                data = Path(root.file(files[text])).read_bytes()
                raw.append({"image": image, "caption": parse_caption(data, text == "json", files[text], caption_key)})
                names.append(image)
            except (InputError, OSError) as error:
                fault(image, str(error))
    if not any(isinstance(record, dict) for record in raw):
        listed = "".join(f"\n  {name}: {error}" for name, error in zip(names[:10], raw))
        no_other = "no tar shards, no tables either"
        raise CaptionFileError(f"{root.folder}: no image in it has a caption file beside it; {no_other}{listed}")
    return raw, names


READERS = {".json": _read_json, ".jsonl": _read_jsonl, ".ndjson": _read_jsonl,
           ".csv": _read_table_text, ".tsv": _read_table_text}  # fmt: skip


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


# --- Several sources, and what an epoch is.


class Mixture(Sequence):
    """Several sources one behind the other, and what an epoch of them is.

    - Without `factors` and `num_samples`: every sample once, shuffled.
    - `factors` f, one for each source: every sample floor(f) times, and a share f - floor(f) of the source's samples,
      drawn anew each epoch, once more; all shuffled together. 0 leaves a source out, 0.25 takes a quarter of it.
    - `num_samples` N: N draws with replacement. A draw takes a source with a probability in proportion to its factor
      times its size (its size without factors), then any of its samples. This is what OpenCLIP's factors do.

    All draws come from (seed, epoch). A sample that comes several times in an epoch has another caption and crop drawn
    each time.
    """

    def __init__(
        self, sources: list[Sequence[dict]], factors: list[float] | None = None, num_samples: int | None = None
    ):
        self.sources, self.factors, self.num_samples = [as_table(source) for source in sources], factors, num_samples
        self.sizes = [len(source) for source in sources]
        self.ends = np.cumsum(self.sizes)
        if num_samples is not None and num_samples < 1:
            raise InputError(f"train_num_samples {num_samples}: expected at least 1")

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, index: int) -> dict:
        index = range(len(self))[index]  # IndexError beyond the end, where iteration stops
        source = int(np.searchsorted(self.ends, index, side="right"))
        return self.sources[source][int(index - self.ends[source] + self.sizes[source])]

    def sampler(self, seed: int, epoch):
        """A torch Sampler of an epoch, or None where the Trainer's shuffle does. `epoch` is a tensor that changes."""
        if self.factors is None and self.num_samples is None:
            return None
        from torch.utils.data import Sampler

        mixture = self

        class MixtureSampler(Sampler):
            def __len__(self) -> int:
                return mixture.num_samples or sum(whole * size + extra for whole, extra, size in mixture.copies())

            def __iter__(self):
                return iter(mixture.order(seed, int(epoch)).tolist())

        return MixtureSampler()

    def copies(self) -> list[tuple[int, int, int]]:
        """For each source how often all of it comes in an epoch, how many of it once more, and its size."""
        factors = self.factors or [1.0] * len(self.sizes)
        return [(int(f), round((f - int(f)) * size), size) for f, size in zip(factors, self.sizes)]

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """The indices of an epoch, in order. What comes again has len(self) added, which draws it anew."""
        rng, n = np.random.default_rng([seed, epoch]), len(self)
        starts = self.ends - self.sizes
        if self.num_samples is not None:
            weights = np.array(self.factors or [1.0] * len(self.sizes)) * self.sizes
            source = rng.choice(len(weights), self.num_samples, p=weights / weights.sum())
            index = starts[source] + (rng.random(self.num_samples) * np.array(self.sizes)[source]).astype(np.int64)
            return index + n * np.arange(self.num_samples)
        parts = []
        for start, (whole, extra, size) in zip(starts, self.copies()):
            parts += [start + np.arange(size) + n * copy for copy in range(whole)]
            parts.append(start + rng.permutation(size)[:extra] + n * whole)
        return rng.permutation(np.concatenate(parts))


class Part(Sequence):
    """Some records of a source."""

    def __init__(self, source: Sequence[dict], rows: np.ndarray):
        self.source, self.rows = source, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        return self.source[self.rows[index].item()]


def without_damaged(source: Sequence[dict], spec: str, on_bad: str = "stop", **bad) -> Sequence[dict]:
    """The records whose pictures can be decoded. About the others see `leave_out`."""

    def fault(index: int) -> str | None:
        try:
            return image_fault(source[index]["image"])
        except ImageError as error:
            return str(error)

    work = read_ahead(fault, range(len(source)), None, 1000)
    faults = list(tqdm(work, f"checking the images of {Path(spec).name}", len(source), disable=len(source) < 1000))
    good = [row for row, problem in enumerate(faults) if not problem]
    if len(good) == len(source):
        return source
    problems = [(f"sample {row}", problem) for row, problem in enumerate(faults) if problem]
    what = f"{len(problems)} of {len(source)} images are damaged"
    leave_out(spec, what, problems, len(good), f"{spec}: ", on_bad, **bad)
    return Part(source, np.array(good))


def describe(records: Sequence[dict], tokenizer, most: int = 100_000) -> str:
    """One line on what a model is going to learn from. Of more than `most` images, the captions of the first only are
    counted, which takes a minute."""
    captions = [record["caption"] for record, _ in zip(records, range(most))]
    texts = [text for texts in captions for text in texts]
    cut = sum(len(tokenizer.encode(text)) > tokenizer.context_length - 2 for text in texts)
    files = Counter(record["image"] for record in records) if isinstance(records, list) else {}
    again = sum(n - 1 for n in files.values())
    twins = f"; {again} records have the image of another one: twins (--twins)" if again else ""
    of = f" (of the first {most:,} images)" if len(records) > most else ""
    at = f"{tokenizer.context_length} tokens"
    return f"{len(records)} images, {len(texts)} captions{of}, {cut} of them cut off at {at}{twins}"


if __name__ == "__main__":
    from miniclip.repack import main

    try:
        main(sys.argv[1:])
    except InputError as error:
        sys.exit(f"miniclip.sources: {error}")
