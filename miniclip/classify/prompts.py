"""Class names, prompt templates, and tokenizer coverage: can the text tower read the words?

CLIP's tokenizer splits a Chinese character into two or three pieces of bytes, which mean nothing to a tower that never
learned them, and the scores are near chance."""

import json
import os
import string
import unicodedata
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from miniclip.classify.names import read_list, spell_out, warn_of_ids
from miniclip.utils.errors import InputError
from miniclip.utils.imagenet import IMAGENET

TEXTS = json.loads(Path(__file__).with_name("texts.json").read_text(encoding="utf-8"))
TEMPLATES = TEXTS["templates"]  # by language; {} is replaced by a class name
OBJECTS = TEXTS["objects"]  # the default classes, the same in each language


def read_templates(path: str | Path) -> list[str]:
    """Reads templates, one a line or a JSON list; "imagenet": OpenAI's 80. Raises InputError for one without {}."""
    templates = IMAGENET["templates"] if path == "imagenet" else read_list(path)
    if not isinstance(templates, list) or not templates or not all(isinstance(t, str) for t in templates):
        raise InputError(f"{path}: expected templates such as: a photo of a {{}}, one per line or as a JSON list")
    for template in templates:
        fill(template, "x", path)
    return templates


def fill(template, name: str, where="templates") -> str:
    """Returns the sentence of a template, a string with {} or a function. Raises InputError for another string."""
    if not isinstance(template, str):
        return template(name)
    try:
        fields = [field[1:] for field in string.Formatter().parse(template) if field[1] is not None]
    except ValueError:  # an unmatched brace
        fields = None
    if fields not in ([("", "", None)], [("0", "", None)]):  # {:>9999999999} would ask for gigabytes
        fault = "must have exactly one {}, for the class name, and no other braces"
        raise InputError(f"{where}: {template!r} {'has no {} for the class name: add it' if fields == [] else fault}")
    return template.format(name)


def read_classes(text: str, language: str = "en") -> dict[str, str]:
    """Parses the classes of a command line: {name: words in the prompts}.

    `text` is "dog,cat" or "chien=dog,chat=cat", or a file: one class per line in either form; a JSON list of names; or
    a JSON object of name: words, where the words may be an object by language, {"en": "dog", "zh": "狗"}. A name
    alone is spelled out: hot_dog. "imagenet": its 1,000 classes, by WordNet ids. Raises InputError for anything else, a
    name that occurs twice, and two names with the same words."""
    if text == "imagenet":
        return dict(IMAGENET["classes"])
    suffix, classes = Path(text).suffix.lower(), {}
    if suffix not in ("", ".json", ".txt") and os.path.isfile(text):
        raise InputError(f"{text}: classes are read from .txt and .json")
    found = read_list(text) if suffix in (".json", ".txt") else [part.strip() for part in text.split(",")]
    if isinstance(found, list) and all(isinstance(item, str) for item in found):
        names = spell_out(item.strip() for item in found if "=" not in item)
        found = [(item.split("=")[0].strip(), item.split("=", 1)[-1].strip()) for item in found]
        found = [(name, names.get(words, words) if name == words else words) for name, words in found]
    elif not isinstance(found, dict):
        found = []
    if not found:
        raise InputError(f"{text}: expected a list of class names, or an object of name: words")
    for name, words in found.items() if isinstance(found, dict) else found:
        if isinstance(words, dict) and language not in words:
            raise InputError(f"{text}: {name} has no words in {language!r}, only in {', '.join(words)}")
        words = words[language] if isinstance(words, dict) else words
        if not name or not isinstance(words, str) or not words.strip():
            raise InputError(f"{text}: a class without a name or without words: {name!r}: {words!r}")
        name, words = (unicodedata.normalize("NFC", part) for part in (name, words))  # é is one character or two
        if name in classes:
            raise InputError(f"{text}: the class {name!r} is named twice: remove one")
        if words in classes.values():
            raise InputError(f"{text}: two classes have the words {words!r}, and would be identical")
        classes[name] = words
    return classes


def tokenizer_coverage(tokenizer, names: Sequence[str]) -> dict:
    """Measures how well a tokenizer covers class names: `tokens_per_character`, without white space (English words: 0.2
    to 0.3); the shares of tokens that are `unknown`, or `fragments` of a character; the `unreadable` names, of which at
    least half the tokens are such; and the `identical` ones, with the same tokens as another."""
    rows = [tokenizer.encode(name) for name in names]
    kinds = {i: "fragment" if "\ufffd" in tokenizer.decode([i]) else "" for row in rows for i in row}
    kinds |= {i: "unknown" for i in kinds if i == tokenizer.unk_token_id}
    tokens = [kinds[i] for row in rows for i in row]
    count, row_of = max(1, len(tokens)), {name: tuple(row) for name, row in zip(names, rows)}
    times = Counter(row_of.values())
    return {
        "tokens_per_character": len(tokens) / max(1, sum(len("".join(name.split())) for name in names)),
        "unknown": tokens.count("unknown") / count, "fragments": tokens.count("fragment") / count,
        "unreadable": [name for name, row in zip(names, rows) if 2 * sum(kinds[i] != "" for i in row) >= len(row)],
        "identical": [name for name, row in row_of.items() if times[row] > 1],
    }  # fmt: skip


def describe_coverage(coverage: dict) -> str:
    return ("{tokens_per_character:.2f} tokens per character (English words: 0.2 to 0.3), {unknown:.0%} of the tokens"
            " unknown, {fragments:.0%} pieces of a character").format(**coverage)  # fmt: skip


def warn_of_poor_coverage(tokenizer, names: Sequence[str]):
    """Warns, with the numbers, of class names that the text tower cannot read, and of ids."""
    warn_of_ids(names)
    coverage = tokenizer_coverage(tokenizer, names)
    if bad := list(dict.fromkeys([*coverage["unreadable"], *coverage["identical"]])):
        same = f"; {', '.join(coverage['identical'][:6])} are identical to it" if coverage["identical"] else ""
        what = f"the text tower cannot read {len(bad)} of {len(names)} class names ({', '.join(bad[:6])})"
        unless = "Unless it was trained on captions in this language, scores will be near chance"
        advice = "use a multilingual tower (docs/towers.md), or describe the classes in English under any name: 猫=cat"
        warnings.warn(f"{what}: {describe_coverage(coverage)}{same}. {unless}: {advice}", stacklevel=3)
