"""Which words stand for a class, and can the text tower read them?

A class is asked for in sentences, a few to be averaged, in the language that the text tower was trained on. CLIP's
own tokenizer takes any text, but was made for English: of a Chinese character it sees two or three bytes, which mean
nothing to a tower that never learned them. It goes on all the same, and scores as chance does. So that is counted, and
said.
"""

from __future__ import annotations

import os
import string
import warnings
from collections.abc import Sequence
from pathlib import Path

from miniclip.utils.errors import InputError

TEMPLATES = {  # by language; what stands for "{}" is a class name
    "en": ["a photo of a {}.", "a picture of a {}.", "a close-up photo of a {}.", "a photo of the {}.",
           "a photo with a {} in it.", "a photo of a small {}.", "a photo of a large {}."],
    "zh": ["一张{}的照片。", "一张{}的图片。", "{}的特写照片。", "一张有{}的照片。", "{}。"],
    "fr": ["une photo de {}.", "une image de {}.", "un gros plan de {}.", "une photo avec {}.", "{}."],
    "es": ["una foto de {}.", "una imagen de {}.", "un primer plano de {}.", "una foto con {}.", "{}."],
}  # fmt: skip
OBJECTS = {  # ten things to begin with, the same ones in each language: what is asked for where nothing is named
    "en": ["cat", "dog", "car", "tree", "house", "book", "computer", "phone", "person", "bicycle"],
    "zh": ["猫", "狗", "汽车", "树", "房子", "书", "电脑", "手机", "人", "自行车"],
    "fr": ["chat", "chien", "voiture", "arbre", "maison", "livre", "ordinateur", "téléphone", "personne", "vélo"],
    "es": ["gato", "perro", "coche", "árbol", "casa", "libro", "ordenador", "teléfono", "persona", "bicicleta"],
}


def read_templates(path: str | Path) -> list[str]:
    """The templates in a file, one a line or a JSON list. Raises InputError, which names the file."""
    found = _read(path)
    templates = found if found is not None else _lines(path)
    if not isinstance(templates, list) or not templates or not all(isinstance(t, str) for t in templates):
        raise InputError(f"{path}: expected templates, such as a photo of a {{}}: one a line, or a JSON list")
    for template in templates:
        fill(template, "x", path)
    return templates


def fill(template, name: str, where="templates") -> str:
    """The sentence that a template makes of a class name: a string with {} for it, or a function of it. Raises
    InputError for a string that makes no use of the name, with which all classes would look alike."""
    if not isinstance(template, str):
        return template(name)
    try:
        fields = [field[1:] for field in string.Formatter().parse(template) if field[1] is not None]
    except ValueError:  # half a pair of braces
        fields = None
    if fields == []:
        raise InputError(f"{where}: {template!r} has no {{}} for the class name: put it in")
    if fields not in ([("", "", None)], [("0", "", None)]):  # {:>9999999999} would ask for gigabytes
        raise InputError(f"{where}: {template!r} has other braces than one {{}} for the class name")
    return template.format(name)


def read_classes(text: str, language: str = "en") -> dict[str, str]:
    """Classes from the command line: {name: the words that are asked for}.

    `text` is "dog,cat" or "chien=dog,chat=cat", by which a class has another name than its words, or a file: one class
    a line in either form; a JSON list of names; or a JSON object of name: words, where the words may be an object too,
    {"en": "dog", "zh": "狗"}. Raises InputError for what is none of these, and for a name that comes twice.
    """
    found = items = [part.strip() for part in text.split(",")]
    if Path(text).suffix not in ("", ".json", ".txt") and os.path.isfile(text):
        raise InputError(f"{text}: classes are read from .txt and .json")
    if Path(text).suffix in (".json", ".txt"):
        items, found = _lines(text) if Path(text).suffix == ".txt" else [], _read(text)
    if isinstance(found, dict):
        pairs = list(found.items())
    else:
        items = items or found
        if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
            raise InputError(f"{text}: expected a list of class names, or an object of name: words")
        pairs = [(name.strip(), (words if equals else name).strip()) for name, equals, words in
                 (item.partition("=") for item in items)]  # fmt: skip
    classes = {}
    for name, words in pairs:
        if isinstance(words, dict):
            if language not in words:
                raise InputError(f"{text}: {name} has no words in {language!r}, only in {', '.join(words)}")
            words = words[language]
        if not name or not isinstance(words, str) or not words.strip():
            raise InputError(f"{text}: a class without a name, or without words: {name!r}: {words!r}")
        if name in classes:
            raise InputError(f"{text}: the class {name!r} is named twice: leave one out")
        if words in classes.values():
            raise InputError(f"{text}: two classes have the words {words!r}: they could not be told apart")
        classes[name] = words
    return classes


def _read(path: str | Path):
    """What is in a JSON file; None for another one."""
    from miniclip.datasets.records import parse_json, read_text

    return parse_json(read_text(Path(path)), path) if Path(path).suffix == ".json" else None


def _lines(path: str | Path) -> list[str]:
    from miniclip.datasets.records import read_text

    return [line.strip() for line in read_text(Path(path)).splitlines() if line.strip()]


def legibility(tokenizer, names: Sequence[str]) -> dict:
    """What a tokenizer makes of class names, in numbers.

    `tokens_per_character`, white space aside (English words have 0.2 to 0.3); `unknown`, the share of tokens that stand
    for anything unknown ([UNK]), and `fragments`, of those that are a part of a character; `illegible`, the names of
    which these are half of the tokens or more; `alike`, those that cannot be told from another one.
    """
    rows = [tokenizer.encode(name) for name in names]
    kinds = {i: "unknown" if i == tokenizer.unk_token_id else "fragment" if "\ufffd" in tokenizer.decode([i]) else ""
             for row in rows for i in row}  # fmt: skip
    every = [kinds[i] for row in rows for i in row]
    first, alike = {}, []
    for name, row in zip(names, rows):
        if first.setdefault(tuple(row), name) != name:
            alike += [n for n in (first[tuple(row)], name) if n not in alike]
    return {
        "tokens_per_character": len(every) / max(1, sum(len("".join(name.split())) for name in names)),
        "unknown": every.count("unknown") / max(1, len(every)),
        "fragments": every.count("fragment") / max(1, len(every)),
        "illegible": [name for name, row in zip(names, rows) if 2 * sum(kinds[i] != "" for i in row) >= len(row)],
        "alike": alike,
    }


def describe_legibility(found: dict) -> str:
    """The numbers in words."""
    return (
        f"{found['tokens_per_character']:.2f} tokens a character (English words: 0.2 to 0.3), {found['unknown']:.0%} of"
        f" the tokens unknown, {found['fragments']:.0%} pieces of a character"
    )


def warn_if_illegible(tokenizer, names: Sequence[str]) -> dict:
    """Warns, with the numbers, of class names that the text tower cannot read. Gives what `legibility` does."""
    found = legibility(tokenizer, names)
    if bad := list(dict.fromkeys([*found["illegible"], *found["alike"]])):
        same = f"; {', '.join(found['alike'][:6])} look the same to it" if found["alike"] else ""
        warnings.warn(
            f"{len(bad)} of {len(names)} class names are no words to this text tower ({', '.join(bad[:6])}):"
            f" {describe_legibility(found)}{same}. Unless it was trained on captions in this language, scores will be"
            " near chance: take a multilingual tower (docs/towers.md), or ask in English and name the classes as you"
            " like: 猫=cat",
            stacklevel=3,
        )
    return found
