"""Outputs on other stores: a command writes to a folder on this machine, which is copied when the command is done."""

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from miniclip.utils.errors import InputError
from miniclip.utils.files import delete, user_cache
from miniclip.utils.local_copy import localised
from miniclip.utils.remote import StoreError, is_remote, join, normal, store, upload

WRITTEN = ("output_dir", "output_file", "report", "save_features", "table")
MODELS = ("model", "pretrained", "teacher")
READ = ("train_file", "eval_file", "image_root")


@contextmanager
def local_outputs(argv: list[str]) -> Iterator[list[str]]:
    """Yields a command line in which models on a store are copies, and the addresses of outputs paths on this machine,
    from which they are copied to the addresses in the end. Raises InputError for an address in a place where only a
    path can be, so that no folder is made that is called "s3:"."""
    words, flag, copies = [], None, {}
    for number, word in enumerate(argv):
        start, value = "", word
        if word.startswith("--"):
            flag, equals, value = word[2:].partition("=")
            flag, start = flag.replace("-", "_"), f"--{flag}{equals}"
        if is_remote(value) and flag in WRITTEN:
            copies[value] = _place(value)
            value = str(copies[value])
        elif is_remote(value) and flag in MODELS:
            value = localised(value)
        elif is_remote(value) and flag not in READ and not value.startswith("http"):
            # Without a flag: what a conversion reads, before what it writes.
            if flag or number or len(argv) < 2 or argv[1].startswith("-"):
                place = f"--{flag}" if flag else "this command"
                raise InputError(f"{value} is an address, but {place} takes a path: copy it to, or from, this machine")
        words.append(start + value)
    yield words
    for url, place in copies.items():
        files = [path for path in place.rglob("*") if path.is_file()] if place.is_dir() else [place]
        try:
            for path in filter(Path.exists, files):
                upload(path, url if path == place else join(url, path.relative_to(place).as_posix()))
        except StoreError as error:
            raise InputError(f"{error}. It is in {place}; to copy it: miniclip sync {place} {url}") from None
        print(f"copied to {url}")


def _place(url: str) -> Path:
    """Returns an empty place on this machine for an output."""
    url = normal(url)
    if re.match("https?:|memory:", url):
        raise InputError(f"{url} cannot be written to: give a path, or an address such as s3://BUCKET/results")
    store(url)  # raises for a package that is missing
    place = user_cache() / "outputs" / hashlib.sha256(url.encode()).hexdigest()[:16] / url.rpartition("/")[2]
    delete(place)
    place.parent.mkdir(parents=True, exist_ok=True)
    return place
