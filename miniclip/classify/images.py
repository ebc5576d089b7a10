"""Folders of images, one folder per class or all in one, and the classes they stand for."""

import os
import unicodedata
import warnings
from collections import Counter
from collections.abc import Sequence

from miniclip.classify.names import ID, find_words, spell, spell_out
from miniclip.classify.prompts import OBJECTS
from miniclip.datasets.records import ImageRoot, image_faults
from miniclip.utils.bad_samples import raise_or_skip
from miniclip.utils.errors import InputError
from miniclip.utils.image_files import ENDINGS


def find_images(paths: Sequence[str]) -> list[tuple[str, str | None]]:
    """Returns the images in paths, sorted within each, with the folder that may be their class.

    A path is an image, or a folder with images at any depth. In a folder with none of its own, each folder is a class.
    Links are followed, hidden files ignored. Raises InputError for a path that is missing, cannot be read or has no
    images; warns of empty classes."""
    found = []
    for path in paths:
        if not os.path.exists(path):
            raise InputError(f"{path}: no such file or folder")
        found += _images_in(path) if os.path.isdir(path) else [(str(path), None)]
    return found


def _images_in(path: str) -> list[tuple[str, str | None]]:
    def fault(name: str, reason: str):
        raise InputError(f"{os.path.join(path, name)}: {reason}")

    names, counts = [], Counter()
    for here, files in ImageRoot(path, allow_outside=True).walk(fault):
        files = [name for name in files if os.path.splitext(name)[1].lower() in ENDINGS]
        names += [os.path.normpath(os.path.join(here, name)) for name in files]
        counts[here.split(os.sep)[0]] += len(files)
    if not names:
        raise InputError(f"{path}: contains no image ({', '.join(sorted(ENDINGS))})")
    flat = counts.pop(".") > 0
    if empty := [name for name, n in counts.items() if not n and not flat]:
        warnings.warn(f"{path}: no image in {', '.join(sorted(empty))}", stacklevel=3)
    return [(os.path.join(path, name), None if flat else name.split(os.sep)[0]) for name in sorted(names)]


def usable(images: list[tuple], name: str, on_bad_sample: str, bad_samples, num_workers=None, decode=True) -> list:
    """Returns the readable ones of `images`, tuples that begin with a path. Raises InputError for the others, or with
    `on_bad_sample` "skip" lists them in `bad_samples`. Without `decode` only names are checked."""
    paths = [image[0] for image in images]
    unnamable = "the name is no valid Unicode: rename the file"  # the output could not contain it
    found = image_faults([{"image": path} for path in paths], name, num_workers) if decode else [None] * len(paths)
    faults = [bad if path.encode(errors="ignore").decode() == path else unnamable for path, bad in zip(paths, found)]
    bad = [(path, fault) for path, fault in zip(paths, faults) if fault]
    images = [image for image, fault in zip(images, faults) if not fault]
    what = f"{len(bad)} of {len(paths)} images cannot be used"
    raise_or_skip(name, what, bad, len(images), "", on_bad_sample, bad_samples, "no images")
    return images


def choose_classes(
    given: dict[str, str] | None, folders: list[str | None], language: str, paths: Sequence[str] = ()
) -> tuple[dict, list | None]:  # fmt: skip
    """Returns the classes, {name: words}, and the number of each image's class if its folder determines it.

    Default classes: the folders (the words of "hot_dog" are "hot dog"; those of ids may lie beside `paths`) or else the
    ten OBJECTS. A folder is named after a given class, or else after its words. Raises InputError if only some are."""
    folders = [name and unicodedata.normalize("NFC", name) for name in folders]  # Macs may write é as two characters
    there = list(dict.fromkeys(folders))
    if given is None:
        if None in there:
            return {name: name for name in OBJECTS[language]}, None
        given = spell_out(there)
        if all(map(ID.fullmatch, there)) and (found := find_words(there, paths)):
            given = {name: spell(words) for name, words in found.items()}
    row = {unicodedata.normalize("NFC", key): i for keys in (given.values(), given) for i, key in enumerate(keys)}
    unknown = [name for name in there if name not in row]
    if unknown and len(unknown) < len(there) and None not in there:
        raise InputError(f"the folder {unknown[0]!r} is not one of the classes {', '.join(given)}: add or remove it")
    return given, None if unknown else [row[name] for name in folders]
