"""Caption files with a record or a caption a line (.jsonl, .csv, .tsv), JSON with other keys, and folders of images."""

import csv
import io
import logging
import os
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

from miniclip.datasets.records import ImageRoot, Raw, ReadOptions, check_captions, parse_json, read_list, read_text
from miniclip.datasets.shards import CAPTION_KEYS, CAPTIONS, caption_kind, captions_in, parse_caption
from miniclip.utils.bad_samples import CaptionFileError, short
from miniclip.utils.errors import InputError
from miniclip.utils.image_files import EXTENSIONS, HEIC

logger = logging.getLogger(__name__)
# Names of columns, compared without case; the first that is there is used.
IMAGE_KEYS = ("image", "filepath", "image_path", "img", "img_path", "file_name", "filename", "path", "file",
              "image_file", "jpg", "jpeg", "png", "webp")  # fmt: skip
TEXT_KEYS = (*CAPTION_KEYS, "txt", "sentences_raw", "alt_text", "alt")


class ColumnError(CaptionFileError):
    """A named column that does not exist."""


def find_columns(there: Iterable[str], options: ReadOptions, where: str) -> list[str]:
    """Returns the columns of the image and of the caption among those that are there: as named, or else the first with
    a known name. Raises InputError, `where` in front."""
    columns = []
    wanted = ("image", options.image_column, IMAGE_KEYS), ("caption", options.caption_column, TEXT_KEYS)
    for what, name, known in wanted:
        there = [column for column in there if column not in columns]
        listed = ", ".join(map(repr, there))
        if name is not None and name not in there:
            raise ColumnError(f"{where}: there is no column {name!r}, only {listed}")
        folded = {str(column).strip().lower(): column for column in reversed(there)}
        found = [folded[key] for key in known if key in folded] if name is None else [name]
        if not found:
            raise InputError(f"{where}: which column has the {what}? Name both with --columns. There are {listed}")
        if len(found) > 1:
            logger.warning("%s: using column %r for the %s, not %r", where, found[0], what, found[1])
        columns.append(found[0])
    return columns


def _renamed(path: Path, rows: Iterable[tuple], options: ReadOptions) -> Iterator[tuple]:
    """Yields (name, record) with the keys `image` and `caption`, or with an InputError in the place of a record."""
    columns = None
    for name, record in rows:
        if isinstance(record, dict):
            columns = columns or find_columns(record, options, f"{path}, {name}")
            if missing := [column for column in columns if column not in record]:
                record = InputError(f"there is no {missing[0]!r} in it: {short(record)}")
            else:
                record = {"image": record[columns[0]], "caption": captions_in(record[columns[1]])}
        elif not isinstance(record, InputError):
            record = InputError(f"expected an object, found {short(record)}")
        yield name, record


def _grouped(path: Path, rows: Iterable[tuple]) -> Raw:
    """Groups (name, record or InputError): lines with the same image become one record."""
    groups = {}
    for name, record in rows:
        try:
            if isinstance(record, InputError):
                raise record
            image, captions = record["image"], check_captions(record["caption"], record["image"])
            key = image if isinstance(image, str) else (name,)
            groups.setdefault(key, (name, {"image": image, "caption": []}))[1]["caption"] += captions
        except InputError as error:
            groups[(name,)] = name, error
    if not groups:
        raise CaptionFileError(f"{path}: there is no record in it")
    return list(groups.values())


def _read_jsonl(path: Path, options: ReadOptions) -> Raw:
    rows = []
    for number, line in enumerate(read_text(path).split("\n"), 1):  # splitlines breaks at other characters too
        if line.strip():
            try:
                rows.append((f"line {number}", parse_json(line)))
            except InputError as error:
                rows.append((f"line {number}", error))
    return _grouped(path, _renamed(path, rows, options))


def _read_json(path: Path, options: ReadOptions) -> Raw:
    raw = read_list(path)
    return list(_renamed(path, raw, options)) if options.image_column or options.caption_column else raw


def _read_table_text(path: Path, options: ReadOptions) -> Raw:
    header, *lines = io.StringIO(read_text(path), newline="").readlines() or [""]
    csv.field_size_limit(1 << 24)
    faults = []
    for delimiter in sorted("\t,;", key=header.count, reverse=True):
        # Strictly: otherwise a lone quote at the start of a cell would swallow all up to the next one.
        cells = partial(csv.reader, delimiter=delimiter, strict=True)
        try:  # OpenCLIP's .csv files have tabs: the separator is the one that gives both columns
            head = next(cells([header.strip("\r\n")]))
            places = [head.index(column) for column in find_columns(head, options, str(path))]
            break
        except (InputError, csv.Error) as error:
            faults.append(error if isinstance(error, InputError) else f"{path}: {error}")
    else:
        raise CaptionFileError(f"{faults[0]} (the first line names the columns, separated by tab, comma or semicolon)")

    def record(row: list[str]) -> dict | InputError:
        if len(row) == len(head):
            return {"image": row[places[0]], "caption": [row[places[1]]]}
        fault = f"{len(row)} cells for {len(head)} columns (a {delimiter!r} within a cell needs quotes)"
        return InputError(f"{fault}: {delimiter.join(row)[:60]}")

    rows, reader, done = [], cells(lines), 0
    try:
        for row in reader:
            if row:  # not an empty line
                rows.append((f"line {done + 2}", record(row)))
            done = reader.line_num
    except csv.Error:  # from the faulty row on, each line is parsed by itself
        for number, line in enumerate(lines[done:], done + 2):
            try:
                rows += [(f"line {number}", record(row)) for row in cells([line] if line.strip() else [])]
            except csv.Error as error:
                fault = f'an unmatched quote ({error}): write "..." around the cell, "" for each quote within'
                rows.append((f"line {number}", InputError(f"{fault}: {line.strip()[:60]}")))
    return _grouped(path, rows)


def read_folder(path: Path, options: ReadOptions) -> Raw:
    """Reads images with a caption file beside each, in folders at any depth, in order of their names."""
    root = ImageRoot(path, options.allow_outside_image_root)
    raw, beside = [], {}  # beside: path without its extension -> {extension: path}
    for here, files in root.walk(lambda name, reason: raw.append((name, InputError(reason)))):
        for name in files:
            stem, extension = os.path.splitext(os.path.normpath(os.path.join(here, name)))
            file, kind = stem + extension, extension.lower()[1:]
            if kind in (*EXTENSIONS, *CAPTIONS):
                first = beside.setdefault(stem, {}).setdefault(kind, file)
                if first != file:
                    raw.append((file, InputError(f"it differs from {first} only in letter case: rename one")))
    for _, files in sorted(beside.items()):
        text = caption_kind(files, options.caption_column)
        kinds = [kind for kind in EXTENSIONS if kind in files]
        # A phone's HEIC beside the JPEG that was made of it is not a second image.
        images = [files[kind] for kind in [kind for kind in kinds if kind not in HEIC] or kinds[:1]]
        if not images:
            raw.append((next(iter(files.values())), InputError("there is no image beside it")))
        for image in images:
            try:
                if text is None:
                    raise InputError("there is no caption file (.txt, .caption or .json) beside it")
                data = Path(root.file(files[text])).read_bytes()
                captions = parse_caption(data, text == "json", files[text], options.caption_column)
                raw.append((image, {"image": image, "caption": captions}))
            except (InputError, OSError) as error:
                raw.append((image, InputError(str(error))))
    if all(isinstance(record, InputError) for _, record in raw):
        listed = "".join(f"\n  {name}: {error}" for name, error in raw[:10])
        what = "no image in it has a caption file beside it, and it has no tar shards or tables"
        raise CaptionFileError(f"{root.folder}: {what}{listed}")
    return raw


READERS = {".json": _read_json, ".jsonl": _read_jsonl, ".ndjson": _read_jsonl,
           ".csv": _read_table_text, ".tsv": _read_table_text}  # fmt: skip
