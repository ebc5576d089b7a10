"""Captions in a file or a cell: a caption a line, lists in JSON or Python's notation, objects that hold them."""

import ast
import json
import re
from contextlib import suppress

from miniclip.datasets.records import MISSING, check_captions, parse_json
from miniclip.utils.errors import InputError

CAPTIONS = ("txt", "caption", "json")  # extensions; the first that a sample has is used
# Names of columns, compared without case; the first that is there is used.
IMAGE_KEYS = ("image", "filepath", "image_path", "img", "img_path", "file_name", "filename", "path", "file",
              "image_file", "jpg", "jpeg", "png", "webp", "image_name")  # fmt: skip
CAPTION_KEYS = ("caption", "captions", "text", "texts", "title", "sentences", "sentence", "raw", "description")
# A string or a missing value, as Python and NumPy print them. NumPy prints no commas between its strings.
_ITEM = r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|None|nan"""
_PRINTED = re.compile(rf"[\[(]\s*(?:(?:{_ITEM})[\s,]*)+[\])]", re.DOTALL)
_LIST = re.compile(r"\[\s*(?:[\"'{\[\]]|[Nn](?:one|ull|an|aN)\b)|\(\s*[\"']")


def captions_in(value, key: str | None = None, depth: int = 0) -> list:
    """Returns the captions in a caption file or column, for `check_captions`: a string, a list, a string that is a list
    (`parse_list`), an object that has them under `key`, by default the first of CAPTION_KEYS, or a list of those."""
    if isinstance(value, dict):
        value = next((value[known] for known in ([key] if key else CAPTION_KEYS) if known in value), value)
    if isinstance(value, str) and not depth:  # within a list it is a caption
        value = parse_list(value)
    if not isinstance(value, list) or depth > 20:  # none lies so deep, and at 300 the stack is full
        return [value]
    return [caption for part in value for caption in captions_in(part, key, depth + 1)]


def captions_of(row: dict, columns: list[str]) -> list:
    """Returns the captions in a column of a row (`captions_in`), or in several, of which some may be empty."""
    cells = [row.get(column) for column in columns]
    if len(cells) > 1:
        cells = [cell for cell in cells if str(cell or "").strip().lower() not in ("", *MISSING)] or cells[:1]
    return [caption for cell in cells for caption in captions_in(cell)]


def parse_list(text: str) -> str | list:
    """Returns the list of captions that a cell holds in JSON (`["a", "b"]`), or as Python or NumPy print it
    (`['a', 'b']`, `('a', 'b')`, `['a' 'b']`). Returns any other text as it is. Raises InputError for a broken list."""
    cell = text.strip()
    if not _LIST.match(cell) or cell[-1] != {"[": "]", "(": ")"}[cell[0]]:
        return text
    try:
        found = json.loads(cell)
    except (ValueError, RecursionError):
        try:
            if _PRINTED.fullmatch(cell):
                items = re.findall(_ITEM, cell, re.DOTALL)
                found = [ast.literal_eval(item) if item[0] in "'\"" else None for item in items]
            else:  # a list of objects; only literals are read, and nothing is run
                found = ast.literal_eval(cell)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            if cell[0] == "[" and cell[1:].lstrip()[0] in "\"'{":
                raise InputError(f"a list of captions that cannot be read: {cell[:60]}") from None
            return text  # "[none of them]"
    return text if isinstance(found, str) else list(found)


def as_cell(caption: str) -> str:
    """Returns a caption as a cell that is read as it is: one that looks like a list becomes a list of one."""
    with suppress(InputError):
        if parse_list(caption) == caption:
            return caption
    return json.dumps([caption], ensure_ascii=False)


def parse_caption(data: bytes, is_json: bool, name: str, key: str | None = None) -> list[str]:
    """The captions beside an image: each line of a text, `captions_in` JSON. Raises InputError if none can be read."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{name}: the caption is not UTF-8 ({error})") from None
    if is_json:
        return check_captions(captions_in(parse_json(text, name), key), name)
    lines = [line.strip() for line in re.split(r"\r\n|\r|\n", text) if line.strip()]
    return check_captions([caption for line in lines for caption in captions_in(line)] or [""], name)


def caption_kind(kinds, key: str | None) -> str | None:
    """Returns which extension of a sample holds its caption: with a `key`, only JSON."""
    return next((kind for kind in (["json"] if key else CAPTIONS) if kind in kinds), None)
