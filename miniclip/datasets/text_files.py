"""TODO docstring."""

import csv
import io
import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from miniclip.datasets.records import (
    ImageRoot,
    check_captions,
    parse_json,
    read_text,
)
from miniclip.datasets.shards import CAPTION_KEYS, CAPTIONS, IMAGES, captions_in, parse_caption
from miniclip.utils.bad_samples import CaptionFileError, short
from miniclip.utils.errors import InputError

logger = logging.getLogger(__name__)
# Names of columns, compared without case; the first that is there is taken.
IMAGE_KEYS = ("image", "filepath", "image_path", "img", "img_path", "file_name", "filename", "path", "file",
              "image_file", "jpg", "jpeg", "png", "webp")  # fmt: skip
TEXT_KEYS = (*CAPTION_KEYS, "txt", "sentences_raw", "alt_text", "alt")


class ColumnError(CaptionFileError):
    """A column that was named is not there."""


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
        raise InputError(f"{where}: which column has the {what}? Name both with --columns. There are {listed}")
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
