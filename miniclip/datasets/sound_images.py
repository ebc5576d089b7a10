"""Which image files were found sound before: those of the same size and time need not be decoded again."""

import hashlib
import os
import time
from collections.abc import Sequence
from contextlib import suppress

import numpy as np
import PIL

from miniclip.utils.files import replacing, user_cache

VERSION = f"1, Pillow {PIL.__version__}"  # what finds an image sound: raise the number when more is checked
SETTLED = 2e9  # nanoseconds after which an unchanged time means an unchanged file


class SoundImages:
    """The images that an earlier run could decode, by path, size and times, in a file of the user's cache for each
    folder of images: 8 bytes an image. Only files are known, no ImageFile, and none that changed just now."""

    def __init__(self, images: Sequence):
        self.keys = np.array([_key(image) for image in images], np.uint64)
        folder = os.path.dirname(next((image for image in images if isinstance(image, str)), ""))
        self.path = user_cache() / f"sound-{hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]}.npy"
        self.known = np.zeros(0, np.uint64)
        with suppress(OSError, ValueError, EOFError):  # there is none, or half of one
            self.known = np.load(self.path, allow_pickle=False).astype(np.uint64)

    def unknown(self) -> list[int]:
        """Returns the numbers of the images to decode."""
        return np.flatnonzero((self.keys == 0) | ~np.isin(self.keys, self.known)).tolist()

    def add(self, rows: list[int]):
        """Remembers images that were found sound."""
        keys = self.keys[rows]
        with suppress(OSError):  # the cache may be read-only, and is not needed
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self.path) as scratch, open(scratch, "wb") as file:
                np.save(file, np.union1d(self.known, keys[keys != 0]))


def _key(image) -> int:
    """A number that stands for an image's path and state; 0 if that is not enough to know its content."""
    about = None
    with suppress(OSError):
        about = os.stat(image) if isinstance(image, str) else None
    if about is None or time.time_ns() - max(about.st_mtime_ns, about.st_ctime_ns) < SETTLED:
        return 0
    state = f"{VERSION} {image} {about.st_size} {about.st_mtime_ns} {about.st_ctime_ns}"
    return int.from_bytes(hashlib.blake2b(state.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "big")
