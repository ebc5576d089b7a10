"""Caption files with a record or a caption a line (.jsonl, .csv, .tsv, .txt), JSON, and folders of images."""

import csv
import io
import logging
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from functools import partial
from pathlib import Path

from miniclip.datasets.captions import CAPTION_KEYS, CAPTIONS, IMAGE_KEYS, caption_kind, captions_of, parse_caption
from miniclip.datasets.published import published_records
from miniclip.datasets.records import ImageRoot, Raw, ReadOptions, as_stored, check_captions, parse_json, read_text
from miniclip.datasets.splits import choose_split, split_column, split_of
from miniclip.utils.bad_samples import CaptionFileError, short
from miniclip.utils.errors import InputError
from miniclip.utils.image_files import EXTENSIONS, HEIC

logger = logging.getLogger(__name__)
TEXT_KEYS = (*CAPTION_KEYS, "txt", "sentences_raw", "alt_text", "alt", "comment")
TOKEN = re.compile(r"([^\t]+)#\d+\t(.*)")  # a line of Flickr's .token files: image.jpg#0, a tab, a caption
METADATA = ("metadata.csv", "metadata.jsonl")  # of a Hugging Face imagefolder


class ColumnError(CaptionFileError):
    """A named column that does not exist."""


def find_columns(there: Iterable[str], options: ReadOptions, where: str) -> list[str]:
    """Returns the columns of the image and of the caption among those there: as named, or else the first with a known
    name, or for captions all that have it with a number: caption_0, caption_1. Raises InputError, `where` in front."""
    columns, there = [], list(there)
    if twice := [name for name, count in Counter(there).items() if count > 1 and str(name).strip()]:
        raise InputError(f"{where}: two columns are named {twice[0]!r}: rename or remove one")
    wanted = ("image", options.image_column, IMAGE_KEYS), ("caption", options.caption_column, TEXT_KEYS)
    for what, name, known in wanted:
        there = [column for column in there if column not in columns]
        listed = ", ".join(map(repr, there))
        if name is not None and name not in there:
            raise ColumnError(f"{where}: there is no column {name!r}, only {listed}")
        found = [column for key in known for column in there if str(column).strip().lower() == key]
        found = found if name is None else [name]
        numbered = _numbered(there) if what == "caption" and name is None else []
        if numbered and not found:
            if len(numbered) > 1:
                said = len(numbered), numbered[0], numbered[-1]
                logger.warning("%s: captions are in %d columns, %r to %r", where, *said)
            return columns + numbered
        if not found:
            raise InputError(f"{where}: which column has the {what}? Name both with --columns. There are {listed}")
        if len(found := found + numbered) > 1:
            logger.warning("%s: using column %r for the %s, not %r", where, found[0], what, found[1])
        columns.append(found[0])
    return columns


def _numbered(columns: list[str]) -> list[str]:
    """The columns of a known caption name and a number each, in the order of these, if there is one such name."""
    found = {}
    for column in columns:
        name, number = re.fullmatch(r"(.*?)[ _.-]?(\d*)", str(column).strip().lower()).groups()
        if number and name in TEXT_KEYS:
            found.setdefault(name, []).append((int(number), column))
    return [column for _, column in sorted(*found.values())] if len(found) == 1 else []


def _records(path: Path, rows: Iterable[tuple], options: ReadOptions, columns: list[str] | None = None) -> Raw:
    """Returns, of (name, object or InputError) each, the split as records, by image; the first has the columns."""
    found, splits, first = [], [], None
    for name, row in rows:
        split = None
        if isinstance(row, dict):
            try:
                columns = columns or find_columns(row, options, f"{path}, {name}")
                split, row = split_of(row), _record(row, columns)
            except InputError as error:
                first = first or error
                row = InputError(f"expected an object with image and caption, found {short(row)}")
        elif not isinstance(row, InputError):
            row = InputError(f"expected an object, found {short(row)}")
        found.append((name, row))
        splits.append(split)
    if first and not columns:
        raise first
    return _grouped(path, (row for row, wanted in zip(found, choose_split(splits, options.split, path)) if wanted))


def _record(row: dict, columns: list[str]) -> dict | InputError:
    if missing := [names[0] for names in (columns[:1], columns[1:]) if not row.keys() & set(names)]:
        return InputError(f"there is no {missing[0]!r} in it: expected an object with both, found {short(row)}")
    try:
        return {"image": row[columns[0]], "caption": captions_of(row, columns[1:])}
    except InputError as error:
        return InputError(f"{row[columns[0]]}: caption is {error}")


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
    return _records(path, rows, options)


def _read_json(path: Path, options: ReadOptions) -> Raw:
    text = read_text(path)
    try:
        raw = parse_json(text, path)
    except CaptionFileError as error:
        if "Extra data" in str(error) and text.lstrip().startswith("{"):  # JSON Lines, which Hugging Face calls .json
            return _read_jsonl(path, options)
        raise
    return _records(path, published_records(raw, path, options.caption_column), options)


def _read_table_text(path: Path, options: ReadOptions) -> Raw:
    header, *lines = io.StringIO(read_text(path), newline="").readlines() or [""]
    if TOKEN.match(header):
        return _records(path, map(_token, range(1, len(lines) + 2), [header, *lines]), options)
    csv.field_size_limit(1 << 24)
    faults = []
    for delimiter in sorted("\t,;|", key=header.count, reverse=True):
        # Strictly: otherwise a lone quote at the start of a cell would swallow all up to the next one.
        cells = partial(csv.reader, delimiter=delimiter, strict=True)
        try:  # OpenCLIP's .csv files have tabs: the separator is the one that gives both columns
            head, padded = next(cells([header.strip("\r\n")])), delimiter == "|"
            if not padded and any(name != name.strip() for name in head):  # image, caption
                cells, padded = partial(cells, skipinitialspace=True), True
                head = [name.strip() for name in next(cells([header.strip("\r\n")]))]
            columns = find_columns(head, options, str(path))
            break
        except (InputError, csv.Error) as error:
            faults.append(error if isinstance(error, InputError) else f"{path}: {error}")
    else:
        raise CaptionFileError(f"{faults[0]} (the first line names the columns, separated by tab, comma, ; or |)")
    used = {column: head.index(column) for column in (*columns, split_column(head)) if column is not None}

    def record(row: list[str]) -> dict | InputError:
        if delimiter == "|":  # Flickr30k's results.csv: blanks around the cells, and a line without its second |
            if len(row) == 2 and len(head) == 3 and (number := re.fullmatch(r"\s*(\d+)\s+(.+)", row[1], re.DOTALL)):
                row = [row[0], *number.groups()]
        row = [cell.strip() for cell in row] if padded else row
        last = max(used.values())
        more = row[len(head) if len(row) >= len(head) else last + 1 :]  # programs leave out empty cells, or add some
        if last < len(row) and not any(cell.strip() for cell in more):
            return {column: row[place] for column, place in used.items()}
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
    return _records(path, rows, options, columns)


def _token(number: int, line: str) -> tuple:
    found = TOKEN.fullmatch(line.strip("\r\n"))
    fault = InputError(f"expected image.jpg#0, a tab and a caption, found {short(line)}")
    return f"line {number}", {"image": found[1], "caption": found[2].strip()} if found else fault


def read_folder(path: Path, options: ReadOptions) -> Raw:
    """Reads images with a caption file beside each, in folders at any depth, in order of their names, or with lines in
    a metadata.csv or .jsonl of their folder, as in Hugging Face's imagefolder."""
    root = ImageRoot(path, options.allow_outside_image_root)
    raw, beside, tables = [], {}, []  # beside: path in NFC, no extension -> {extension: path}
    for here, files in root.walk(lambda name, reason: raw.append((name, InputError(reason)))):
        for name in files:
            stem, extension = os.path.splitext(os.path.normpath(os.path.join(here, name)))
            file, kind = stem + extension, extension.lower()[1:]
            if name in METADATA:
                tables.append(file)
            elif kind in (*EXTENSIONS, *CAPTIONS):
                first = beside.setdefault(unicodedata.normalize("NFC", stem), {}).setdefault(kind, file)
                if first != file:
                    raw.append((file, InputError(f"{first} differs only in letter case or Unicode form: rename one")))
    found = []
    for file in tables:
        try:
            found += [(file, *row) for row in _read_metadata(root, file, options)]
        except InputError as error:  # a table of something else
            if options.split or not any(caption_kind(files, options.caption_column) for files in beside.values()):
                raise
            logger.warning("%s: not used, because %s", path, error)
    raw += [row[1:] for row in found]
    if options.split and not tables:
        raise InputError(f"{path}: it has no folder {options.split!r}, and no metadata.csv with a column 'split'")
    choose_split([file.split(os.sep)[0] for file, *_ in found if os.sep in file], None, path)  # says if it has several
    named = set()  # the images that a table has, with sound captions or not
    for file, _, record in found:
        bad = isinstance(record, InputError)
        image = os.path.join(os.path.dirname(file), str(record).partition(": caption ")[0]) if bad else record["image"]
        named.add(os.path.normpath(str(image)))
    if options.split:  # the other images belong to other splits
        beside = {}
    twice = 0
    for _, files in sorted(beside.items()):
        text = caption_kind(files, options.caption_column)
        kinds = [kind for kind in EXTENSIONS if kind in files]
        # A phone's HEIC beside the JPEG that was made of it is not a second image.
        if not (images := [files[kind] for kind in [kind for kind in kinds if kind not in HEIC] or kinds[:1]]):
            raw.append((next(iter(files.values())), InputError("there is no image beside it")))
        for image in images:
            if image in named:
                twice += text is not None
                continue
            try:
                if text is None:
                    line = f" and no line of {tables[0]} names it" if tables else ""
                    raise InputError(f"there is no caption file (.txt, .caption or .json) beside it{line}")
                data = Path(root.file(files[text])).read_bytes()
                captions = parse_caption(data, text == "json", files[text], options.caption_column)
                raw.append((image, {"image": image, "caption": captions}))
            except (InputError, OSError) as error:
                raw.append((image, InputError(str(error))))
    if twice:
        logger.warning("%s: %d images have a caption file beside them too, which is not used", tables[0], twice)
    if all(isinstance(record, InputError) for _, record in raw):
        what = "no image in it has a caption file beside it, and it has no tar shards or tables"
        raise CaptionFileError(f"{root.folder}: {what}" + "".join(f"\n  {name}: {error}" for name, error in raw[:10]))
    return raw


def _read_metadata(root: ImageRoot, file: str, options: ReadOptions) -> Raw:
    """Reads a table of a folder whose image paths start at its own place."""
    place, rows = Path(root.file(file)), []
    for name, record in READERS[place.suffix](place, options):
        if not isinstance(record, InputError) and isinstance(record["image"], str) and record["image"]:
            record = record | {"image": os.path.join(os.path.dirname(file), as_stored(record["image"], place.parent))}
        rows.append((f"{file}, {name}", record))
    return rows


READERS = {".json": _read_json, ".jsonl": _read_jsonl, ".ndjson": _read_jsonl, ".csv": _read_table_text,
           ".tsv": _read_table_text, ".txt": _read_table_text, ".token": _read_table_text}  # fmt: skip
