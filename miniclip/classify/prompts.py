"""Class names, prompt templates, and tokenizer coverage: can the text tower read the words?

A class is described by several sentences, which are averaged, in the language that the text tower was trained on.
CLIP's tokenizer accepts any text, but was made for English: it splits a Chinese character into two or three pieces of
bytes, which mean nothing to a tower that never learned them, and the scores are near chance. So coverage is measured,
and poor coverage is reported.
"""

import os
import string
import warnings
from collections.abc import Sequence
from pathlib import Path

from miniclip.datasets.records import parse_json, read_text
from miniclip.utils.errors import InputError

TEMPLATES = {  # by language; {} is replaced by a class name
    "en": ["a photo of a {}.", "a picture of a {}.", "a close-up photo of a {}.", "a photo of the {}.",
           "a photo with a {} in it.", "a photo of a small {}.", "a photo of a large {}."],
    "zh": ["一张{}的照片。", "一张{}的图片。", "{}的特写照片。", "一张有{}的照片。", "{}。"],
    "fr": ["une photo de {}.", "une image de {}.", "un gros plan de {}.", "une photo avec {}.", "{}."],
    "es": ["una foto de {}.", "una imagen de {}.", "un primer plano de {}.", "una foto con {}.", "{}."],
}  # fmt: skip
OBJECTS = {  # the default classes, the same in each language
    "en": ["cat", "dog", "car", "tree", "house", "book", "computer", "phone", "person", "bicycle"],
    "zh": ["猫", "狗", "汽车", "树", "房子", "书", "电脑", "手机", "人", "自行车"],
    "fr": ["chat", "chien", "voiture", "arbre", "maison", "livre", "ordinateur", "téléphone", "personne", "vélo"],
    "es": ["gato", "perro", "coche", "árbol", "casa", "libro", "ordenador", "teléfono", "persona", "bicicleta"],
}


def read_templates(path: str | Path) -> list[str]:
    """Reads templates from a file, one per line or a JSON list. Raises InputError, which names the file."""
    found = _json(path)
    templates = found if found is not None else _lines(path)
    if not isinstance(templates, list) or not templates or not all(isinstance(t, str) for t in templates):
        raise InputError(f"{path}: expected templates such as: a photo of a {{}}, one per line or as a JSON list")
    for template in templates:
        fill(template, "x", path)
    return templates


def fill(template, name: str, where="templates") -> str:
    """Returns the sentence of a template, a string with {} or a function, for a class name. Raises InputError for a
    string without {}, which would make all classes identical."""
    if not isinstance(template, str):
        return template(name)
    try:
        fields = [field[1:] for field in string.Formatter().parse(template) if field[1] is not None]
    except ValueError:  # an unmatched brace
        fields = None
    if fields == []:
        raise InputError(f"{where}: {template!r} has no {{}} for the class name: add it")
    if fields not in ([("", "", None)], [("0", "", None)]):  # {:>9999999999} would ask for gigabytes
        raise InputError(f"{where}: {template!r} must have exactly one {{}}, for the class name, and no other braces")
    return template.format(name)


def read_classes(text: str, language: str = "en") -> dict[str, str]:
    """Parses the classes of a command line: {name: words in the prompts}.

    `text` is "dog,cat" or "chien=dog,chat=cat", where classes have other names than their words, or a file: one class
    per line in either form; a JSON list of names; or a JSON object of name: words, where the words may be an object by
    language, {"en": "dog", "zh": "狗"}. Raises InputError for anything else and for a repeated name.
    """
    found = items = [part.strip() for part in text.split(",")]
    if Path(text).suffix not in ("", ".json", ".txt") and os.path.isfile(text):
        raise InputError(f"{text}: classes are read from .txt and .json")
    if Path(text).suffix in (".json", ".txt"):
        items, found = _lines(text) if Path(text).suffix == ".txt" else [], _json(text)
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
            raise InputError(f"{text}: a class without a name or without words: {name!r}: {words!r}")
        if name in classes:
            raise InputError(f"{text}: the class {name!r} is named twice: remove one")
        if words in classes.values():
            raise InputError(f"{text}: two classes have the words {words!r}, and would be identical")
        classes[name] = words
    return classes


def _json(path: str | Path):
    """Returns the content of a .json file, None for another one."""
    return parse_json(read_text(Path(path)), path) if Path(path).suffix == ".json" else None


def _lines(path: str | Path) -> list[str]:
    return [line.strip() for line in read_text(Path(path)).splitlines() if line.strip()]


def tokenizer_coverage(tokenizer, names: Sequence[str]) -> dict:
    """Measures how well a tokenizer covers class names.

    Returns `tokens_per_character`, without white space (English words: 0.2 to 0.3); `unknown` and `fragments`, the
    shares of tokens that are [UNK] and that are a piece of a character; `unreadable`, the names with at least half such
    tokens; and `identical`, the names with the same tokens as another.
    """
    rows = [tokenizer.encode(name) for name in names]
    kinds = {i: "unknown" if i == tokenizer.unk_token_id else "fragment" if "\ufffd" in tokenizer.decode([i]) else ""
             for row in rows for i in row}  # fmt: skip
    tokens = [kinds[i] for row in rows for i in row]
    first, identical = {}, []
    for name, row in zip(names, rows):
        if first.setdefault(tuple(row), name) != name:
            identical += [n for n in (first[tuple(row)], name) if n not in identical]
    return {
        "tokens_per_character": len(tokens) / max(1, sum(len("".join(name.split())) for name in names)),
        "unknown": tokens.count("unknown") / max(1, len(tokens)),
        "fragments": tokens.count("fragment") / max(1, len(tokens)),
        "unreadable": [name for name, row in zip(names, rows) if 2 * sum(kinds[i] != "" for i in row) >= len(row)],
        "identical": identical,
    }


def describe_coverage(coverage: dict) -> str:
    """Returns the numbers as a sentence."""
    return (
        f"{coverage['tokens_per_character']:.2f} tokens per character (English words: 0.2 to 0.3),"
        f" {coverage['unknown']:.0%} of the tokens unknown, {coverage['fragments']:.0%} pieces of a character"
    )


def warn_of_poor_coverage(tokenizer, names: Sequence[str]):
    """Warns, with the numbers, of class names that the text tower cannot read."""
    coverage = tokenizer_coverage(tokenizer, names)
    if bad := list(dict.fromkeys([*coverage["unreadable"], *coverage["identical"]])):
        same = f"; {', '.join(coverage['identical'][:6])} are identical to it" if coverage["identical"] else ""
        warnings.warn(
            f"the text tower cannot read {len(bad)} of {len(names)} class names ({', '.join(bad[:6])}):"
            f" {describe_coverage(coverage)}{same}. Unless it was trained on captions in this language, scores will be"
            " near chance: use a multilingual tower (docs/towers.md), or describe the classes in English under any"
            " name: 猫=cat",
            stacklevel=3,
        )
