"""Untrusted configs: JSON whose form, kinds and sizes are checked before anything is built from it."""

import dataclasses
import json
import pkgutil
import types
import typing
from collections.abc import Callable, Iterable
from itertools import chain
from pathlib import Path

from miniclip.utils.errors import InputError

LENGTH, DEPTH = 4 << 20, 40  # characters of a file, lists within lists: no model's config has more
LARGEST = 1 << 24  # nothing in a model is larger; transformers makes lists as long as some numbers say


def parse_json(path: Path):
    """The values in a JSON file. Raises ValueError for one that is too long, nested too deep or not JSON, as NaN is."""

    def refuse(name: str):
        raise ValueError(f"{name} is not a number in JSON")

    with path.open(encoding="utf-8-sig") as file:
        text = file.read(LENGTH + 1)
    if len(text) > LENGTH:
        raise ValueError(f"it is longer than {LENGTH} characters, as no config is")
    nested = f"its lists or objects are nested more than {DEPTH} deep"
    try:
        values = json.loads(text, parse_constant=refuse)
    except RecursionError:
        raise ValueError(nested) from None
    level = [values]
    for _ in range(DEPTH + 1):
        holding = [value for value in level if isinstance(value, dict | list)]
        level = [inner for value in holding for inner in (value.values() if isinstance(value, dict) else value)]
    if level:
        raise ValueError(nested)
    return values


def check(*problems: Iterable[tuple[bool, str]]):
    """Raises InputError for the first condition that does not hold; each is (whether it does, what to say if not)."""
    for holds, problem in chain(*problems):
        if not holds:
            raise InputError(problem)


def in_range(prefix: str, section, largest: dict[str, float]):
    """For `check`: the fields of a section, named behind a prefix, have their types, those in `largest` in range."""
    for field in dataclasses.fields(section):
        value, limit = getattr(section, field.name), largest.get(field.name)
        yield dataclasses.is_dataclass(value) or fits(value, field.type), wrong(prefix + field.name, value, field.type)
        fine = value is None or limit is None or 0 < value <= limit
        yield fine, f"{prefix}{field.name} is {value!r:.100}, not above 0 and at most {limit}"


def fill(cls, values: dict, where: str, sections: Iterable[tuple[type, Callable[[dict], bool], type | str]] = ()):
    """Makes a dataclass from a dict, section by section, or the class that `sections` has for these values: (base, what
    tells it from the values, the class or "module:name"). Raises InputError, which begins with `where`, for an unknown
    field, a value of another type and what the class itself refuses."""
    if dataclasses.is_dataclass(values):
        return values  # made already
    for base, tells, section in sections:
        if base is cls and isinstance(values, dict) and tells(values):
            cls = pkgutil.resolve_name(section) if isinstance(section, str) else section
    fields = {f.name: f.type for f in dataclasses.fields(cls)}
    if not isinstance(values, dict):
        raise InputError(f"{where}: expected an object with the fields {', '.join(fields)}, found {values!r:.100}")
    made = {}
    for name, value in values.items():
        if name not in fields:
            raise InputError(f"{where}: unknown field {name!r:.100}; the fields are {', '.join(fields)}")
        kind = fields[name]
        if dataclasses.is_dataclass(kind):
            value = fill(kind, value, f"{where}, {name}", sections)
        elif not fits(value, kind):
            raise InputError(f"{where}: {wrong(name, value, kind)}")
        made[name] = tuple(value) if isinstance(value, list) else value
    try:
        return cls(**made)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def fits(value, kind) -> bool:
    """Whether a value, as JSON has it, is of a field's type."""
    inner = typing.get_args(kind)
    if typing.get_origin(kind) is typing.Literal:
        return type(value) is str and value in inner
    if isinstance(kind, types.UnionType):
        return any(fits(value, one) for one in inner)
    if kind in (int, float):
        return type(value) in (int, kind) and abs(value) <= LARGEST
    if typing.get_origin(kind) is tuple:
        return isinstance(value, list | tuple) and len(value) == len(inner) and all(map(fits, value, inner))
    return type(value) is kind if isinstance(kind, type) else True


def wrong(name: str, value, kind) -> str:
    """What to say about a value that does not fit."""
    if typing.get_origin(kind) is typing.Literal:
        return f"{name} is {value!r:.100}, not {' or '.join(map(repr, typing.get_args(kind)))}"
    expected = kind.__name__ if type(kind) is type else kind
    size = f", up to {LARGEST}" if type(value) in (int, float) else ""
    return f"{name} is {value!r:.100}, not of type {expected}{size}"
