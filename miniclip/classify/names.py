"""Class names as data sets write them: words run together, numbers in front, ids whose words are in another file."""

import logging
import os
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from miniclip.datasets.records import parse_json, read_text
from miniclip.utils.errors import InputError
from miniclip.utils.imagenet import IMAGENET

# Files beside a folder of classes, with lines `id words` or words alone, or JSON: ImageNet's, and common names.
FILES = ("LOC_synset_mapping.txt", "synset_words.txt", "words.txt", "map_clsloc.txt", "imagenet_class_index.json",
         "class_index.json", "class_to_idx.json", "classes.txt", "class_names.txt", "names.txt", "labels.txt",
         "classes.json", "class_names.json", "labels.json")  # fmt: skip
ID = re.compile(r"n?\d+|(c|cls|class|category|id|label)[ _-]?\d+", re.IGNORECASE)  # n: WordNet's, as n01440764
NUMBERED = re.compile(r"(n\d{8}|\d+)[-_.]+(?=[^\W\d])")  # 001.Black_footed_Albatross, n02085620-Chihuahua
logger = logging.getLogger(__name__)


def spell_out(names: Iterable[str]) -> dict[str, str]:
    """Returns {name: words to ask for}: hot_dog is a hot dog, AnnualCrop an annual crop; numbers go that all names have
    in front. McDonald and iPhone stay, and so do names that would become equal."""
    names = list(names)
    numbered = len(names) > 1 and all(map(NUMBERED.match, names))
    words = [spell(NUMBERED.sub("", name, count=1) if numbered else name) for name in names]
    times = Counter(words)
    return {name: text if text and times[text] == 1 else name for name, text in zip(names, words)}


def spell(name: str) -> str:
    """Returns the words of a name alone."""
    words = " ".join(name.replace("_", " ").split())
    apart = re.sub(r"(?<=[a-z]{2})(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z]{2})", " ", words)
    if apart == words:
        return words
    return " ".join(part if part.isupper() and len(part) > 1 else part.lower() for part in apart.split())


def warn_of_ids(names: Sequence[str]):
    """Warns if most names are ids, which mean nothing to a text tower."""
    ids = [name for name in names if ID.fullmatch(name)]
    if 2 * len(ids) > len(names):
        what = f"{len(ids)} of {len(names)} class names are ids, not words ({', '.join(ids[:6])})"
        advice = f"give the words with --classes {ids[0]}=words,... or in a file of such lines"
        warnings.warn(f"{what}, and scores will be near chance: {advice}", stacklevel=4)


def find_words(ids: Sequence[str], folders: Iterable[str]) -> dict[str, str] | None:
    """Returns {id: words} from the first of FILES, in or around the folders, with words for all ids, or ImageNet's."""
    places = [place for folder in folders if os.path.isdir(folder) for place in (Path(folder), Path(folder, ".."))]
    for path in (place / name for place in places for name in FILES):
        with suppress(InputError, OSError):  # any file may have such a name
            found = _read(path, ids) if path.is_file() else {}
            if found.keys() >= set(ids):
                logger.warning("%s: it has the words for the classes", os.path.normpath(path))
                return {name: found[name] for name in ids}
    shipped = IMAGENET["classes"]
    return {name: shipped[name] for name in ids} if shipped.keys() >= set(ids) else None


def read_list(path: str | Path):
    """Returns the content of a .json file, or the lines of another one that are not empty."""
    text, is_json = read_text(Path(path)), Path(path).suffix.lower() == ".json"
    return parse_json(text, path) if is_json else [line.strip() for line in text.splitlines() if line.strip()]


def _read(path: Path, ids: Sequence[str]) -> dict[str, str]:
    """Returns the words in a file by id; of synonyms the first."""
    content, pairs = read_list(path), []
    if isinstance(content, dict):
        for key, value in content.items():  # Keras: {"0": ["n01440764", "tench"]}; torchvision: {"cat": 0}
            values = [str(part) for part in value] if isinstance(value, list) else [str(value)]
            pairs += [(key, values[-1]), (values[0], values[-1] if len(values) > 1 else key)] if values else []
    else:
        lines = [str(line) for line in content if str(line)]
        numbers = sorted(int(name) for name in ids if name.isdecimal())
        pairs = [(*re.split(r"[\s,:=]+", line, maxsplit=1), "")[:2] for line in lines]
        if not {key for key, _ in pairs} >= set(ids) and len(numbers) == len(ids) == len(lines):
            start = numbers[0]
            pairs = [(name, lines[int(name) - start]) for name in ids if numbers == [*range(start, start + len(ids))]]
    found = {key: re.sub(r"^\d+\s+", "", words).split(",")[0].strip() for key, words in pairs}
    return {key: words for key, words in found.items() if key in set(ids) and words and not ID.fullmatch(words)}
