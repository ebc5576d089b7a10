"""TODO docstring."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

from miniclip.classify.prompts import (
    OBJECTS,
)
from miniclip.utils.errors import InputError

if TYPE_CHECKING:  # all of it is imported when it is used: --help answers at once
    import numpy as np


def find_pictures(paths: Sequence[str]) -> list[tuple[str, str | None]]:
    """The pictures that paths stand for, each with the folder that may be its class, in order of their names.

    A path is a picture, or a folder with some at any depth. A folder with none of its own is one of classes: what lies
    below each of its folders belongs to that. Links are followed; names that begin with a dot are passed over. Raises
    InputError for a path that is not there, has no picture or cannot be read through; warns of folders without one.
    """
    found = []
    for path in paths:
        if os.path.isdir(path):
            found += _pictures_in(path)
        elif os.path.exists(path):
            found.append((str(path), None))
        else:
            raise InputError(f"{path}: there is no such file or folder")
    return found


def _pictures_in(path: str) -> list[tuple[str, str | None]]:
    from miniclip.datasets.records import ImageRoot
    from miniclip.utils.image_files import endings

    def fault(name: str, reason: str):
        raise InputError(f"{os.path.join(path, name)}: {reason}")

    known, names, counts = endings(), [], {}
    for here, files in ImageRoot(path, allow_outside=True).walk(fault):
        files = [name for name in files if os.path.splitext(name)[1].lower() in known]
        names += [os.path.normpath(os.path.join(here, name)) for name in files]
        folder = here.split(os.sep)[0]
        counts[folder] = counts.get(folder, 0) + len(files)
    if not names:
        raise InputError(f"{path}: there is no picture in it ({', '.join(sorted(known))})")
    flat = counts.pop(".") > 0
    if empty := [name for name, n in counts.items() if not n and not flat]:
        warnings.warn(f"{path}: there is no picture in {', '.join(sorted(empty))}", stacklevel=3)
    return [(os.path.join(path, name), None if flat else name.split(os.sep)[0]) for name in sorted(names)]


def choose_classes(given: dict[str, str] | None, folders: list[str | None], language: str) -> tuple[dict, list | None]:
    """The classes, {name: words}, and the number of each picture's class where folders say it.

    Without any given, the folders' names are the classes ("hot_dog" is asked for as "hot dog"), or there are the ten
    OBJECTS. With some given, a folder is a class by its name or by its words. Raises InputError where only some are.
    """
    there = list(dict.fromkeys(folders))
    if given is None:
        if None in there:
            return {name: name for name in OBJECTS[language]}, None
        given = {name: name.replace("_", " ") for name in there}
    row = {key: i for keys in (given.values(), given) for i, key in enumerate(keys)}  # names go before words
    unknown = [name for name in there if name not in row]
    if unknown and len(unknown) < len(there) and None not in there:
        raise InputError(f"the folder {unknown[0]!r} is none of the classes {', '.join(given)}: add it to --classes")
    return given, None if unknown else [row[name] for name in folders]


def embed_pictures(options, model, preprocess, pictures: list, bad_samples=None) -> tuple[list, np.ndarray]:
    """The pictures that can be read, of (path, ...) each, and their embeddings. Raises InputError naming the others,
    which `--on_bad_sample skip` leaves out and lists."""
    from miniclip.datasets.records import image_fault
    from miniclip.inference.embed import embed_images
    from miniclip.utils.bad_samples import raise_or_skip
    from miniclip.utils.parallel import read_ahead

    paths = [picture[0] for picture in pictures]
    faults = [name_fault(path) for path in paths]
    if options.on_bad_sample == "skip":
        faults = list(read_ahead(lambda path: name_fault(path) or image_fault(path), paths, options.num_workers, 1000))
    if any(faults):
        bad = [(path, fault) for path, fault in zip(paths, faults) if fault]
        pictures = [picture for picture, fault in zip(pictures, faults) if not fault]
        what, where = f"{len(bad)} of {len(paths)} pictures cannot be used", ", ".join(options.images)
        raise_or_skip(where, what, bad, len(pictures), "", options.on_bad_sample, bad_samples, "no images")
    paths = [picture[0] for picture in pictures]
    embeds = embed_images(model, preprocess, paths, options.batch_size, options.num_workers, progress=True)
    return pictures, embeds


def name_fault(path: str) -> str | None:
    """What is wrong with the name of a file, if anything is: what is written could not hold it."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return "the name is no valid Unicode: rename the file"
