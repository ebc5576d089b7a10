"""Local copies of files and folders on other stores, one for each version of the content."""

import hashlib
import json
import logging
import posixpath
import re
from collections.abc import Callable
from pathlib import Path

from miniclip.utils.files import lock, replacing, user_cache
from miniclip.utils.remote import StoreError, download, info, is_remote, join, list_files, normal, version

ADDRESSES = {}  # path of a copy -> its address, which tables name
logger = logging.getLogger(__name__)


def local_copy(url: str, wanted: Callable[[str], bool] = lambda name: True) -> Path:
    """Returns a copy of a file, or of the files of a folder whose relative names are `wanted`, in the user's cache. It
    is made once for each version of the content, and is complete or absent. Raises StoreError."""
    url = normal(url)
    about = info(url)
    files = {"": about} if about["type"] == "file" else {n: a for n, a in list_files(url).items() if wanted(n)}
    if not files:
        raise StoreError(f"{url}: there is no file in it that could be used")
    state = json.dumps([url, sorted((name, version(about)) for name, about in files.items())])
    place = user_cache() / "stores" / hashlib.sha256(state.encode()).hexdigest()[:16] / posixpath.basename(url)
    ADDRESSES[str(place)] = url
    if not place.exists():
        with lock(place.parent, wait=True):  # the processes of one run make one copy
            if place.exists():
                return place
            if (size := sum(about["size"] for about in files.values()) / 1e6) > 10:
                logger.warning("copying %s (%.0f MB) to %s", url, size, place)
            with replacing(place, first_wins=True) as scratch:
                for name, about in files.items():
                    download(join(url, name), scratch / name if name else scratch, about["size"])
    return place


def localised(value):
    """Returns an option, or several, with local copies for addresses: weight files, models without checkpoints."""
    if isinstance(value, list):
        return [localised(one) for one in value]
    if not is_remote(value) or value.startswith("http"):
        return value
    return str(local_copy(value, lambda name: not re.match(r"checkpoint-\d+/|optimizer\.|\.", name)))
