"""Files on other stores (s3://, gs://, hf://, ...) through fsspec: ranged reads, uploads, local copies, retries.

Credentials and addresses of servers are those that the store's own package finds, for example AWS_ACCESS_KEY_ID and
AWS_ENDPOINT_URL; fsspec's FSSPEC_S3_ENDPOINT_URL and its like work too."""

import os
import posixpath
import re
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from miniclip.utils.errors import InputError, first_line

WAITS = (0.5, 2, 8)  # seconds between attempts, after those that a store's own package makes
CHUNK = 16 << 20  # bytes of one request: what is lost when a connection breaks
PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "hf": "huggingface_hub", "az": "adlfs",
            "abfs": "adlfs", "http": "aiohttp", "https": "aiohttp"}  # fmt: skip
VERSIONS = ("ETag", "etag", "md5Hash", "blob_id", "LastModified", "mtime", "created")  # what tells that a file changed
# Another attempt would end the same way.
FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, NotImplementedError, InputError)
_opened = {}  # (process, scheme) -> its filesystem


class StoreError(InputError):
    """A file on a store that cannot be reached, or is not there."""


def is_remote(path) -> bool:
    """Returns whether a path is an address such as s3://bucket/file. Raises StoreError for s3:/bucket/file."""
    found = re.match(r"([A-Za-z][\w+.-]+):/(/?)", str(path))
    if found and not found[2] and found[1] in PACKAGES and found[1] != "hf":  # hf:/folder is a data set saved there
        raise StoreError(f"{path}: an address begins with two slashes: {found[1]}://")
    return found is not None and bool(found[2])


def store(url: str) -> tuple:
    """Returns the fsspec filesystem of an address, and the path on it. Raises StoreError for an unknown scheme, or a
    package that is missing. No filesystem may be used in a forked process: each process opens its own."""
    import fsspec  # slow to import

    scheme = str(url).partition("://")[0].lower()
    try:
        if (found := _opened.get((os.getpid(), scheme))) is None:
            how = {"use_listings_cache": False, "skip_instance_cache": True}
            how |= {"auto_mkdir": True} if scheme in ("file", "local") else {}
            found = _opened[os.getpid(), scheme] = fsspec.filesystem(scheme, **how)
        return found, found._strip_protocol(str(url))
    except ImportError:
        package = PACKAGES.get(scheme, f"the fsspec package for {scheme}://")
        raise StoreError(f"{url}: {scheme}:// needs a package that is not installed: pip install {package}") from None
    except ValueError as error:
        raise StoreError(f"{url}: cannot be opened ({error}). Known are s3://, gs://, hf:// and file://") from None


def retrying(url: str, action: Callable, waits: tuple = WAITS):
    """Returns `action(filesystem, path)`, tried again after `waits` seconds where that may help. Raises StoreError."""
    for wait in (*waits, None):
        try:
            return action(*store(url))
        except StoreError:
            raise
        except FileNotFoundError:
            raise StoreError(f"{url}: no such file or folder on the store, or no such bucket") from None
        except Exception as error:  # every package has its own
            final = isinstance(error, FINAL) or "redentials" in type(error).__name__
            if wait is None or final:
                fix = "check the credentials and the address" if final else "check the network and try again"
                raise StoreError(f"{url}: cannot be reached ({first_line(error)}): {fix}") from error
        time.sleep(wait)


def join(url: str, name: str) -> str:
    return f"{url.rstrip('/')}/{name}" if name else url


def normal(url: str) -> str:
    """Returns an address without . and .. in its path."""
    scheme, _, path = url.partition("://")
    return f"{scheme}://{posixpath.normpath(path) if path else ''}"


def info(url: str) -> dict:
    """Returns what fsspec knows about a file or folder: type, size and the like. Raises StoreError if there is none."""
    return retrying(url, lambda fs, path: fs.info(path))


def version(about: dict) -> str:
    """Returns what identifies the content of a file, from its `info`."""
    return " ".join([str(about.get("size")), *(str(about[key]) for key in VERSIONS if about.get(key))])


def list_files(url: str, waits: tuple = WAITS) -> dict[str, dict]:
    """Returns the `info` of all files below a folder by their names in it. Raises StoreError for one that leads out."""

    def find(fs, path):
        found = fs.find(path, detail=True)
        return {name[len(path.rstrip("/")) + 1 :]: about for name, about in found.items() if about["type"] == "file"}

    found = {name: about for name, about in retrying(url, find, waits).items() if name and not name.endswith("/")}
    for name in found:
        if posixpath.isabs(name) or ".." in re.split(r"[\\/]", name) or re.match(r"\w:", name):
            raise StoreError(f"{url}: the name {name!r} in it leads out of the folder: remove it")
    return found


def read_range(url: str, start: int = 0, end: int | None = None) -> bytes:
    """Returns the bytes of a file from `start`, up to `end` or its end."""

    def read(fs, path):
        data = fs.cat_file(path, start=start or None, end=end)  # an empty file has no ranges
        if end is not None and len(data) > end - start:
            raise OSError(f"got {len(data)} bytes of {end - start}")  # a server without ranges
        return data

    return retrying(url, read)


def open_remote(url: str, size: int, ahead: int = 4 << 20):
    """Opens a file of a known size to read, `ahead` bytes early. Each request is tried again if it fails."""
    from fsspec.spec import AbstractBufferedFile  # slow to import

    class Remote(AbstractBufferedFile):
        def _fetch_range(self, start: int, end: int) -> bytes:
            return read_range(url, start, end)

    return Remote(None, url, block_size=ahead, size=size)


def download(url: str, target: Path, size: int):
    """Writes a file of a known size to a path, request by request."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target, "wb") as file:
        while (place := file.tell()) < size:
            if not (data := read_range(url, place, min(size, place + CHUNK))):
                raise StoreError(f"{url}: it ends after {place} of {size} bytes: it was changed meanwhile. Try again")
            file.write(data)


def upload(path: Path, url: str, moved: Callable[[], None] = lambda: None, waits: tuple = WAITS):
    """Copies a file to a store. `moved` is called when a part of it is there."""
    from fsspec.callbacks import Callback

    callback = Callback(hooks={"moved": lambda *_, **__: moved()})
    retrying(url, lambda fs, place: fs.put_file(str(path), place, callback=callback), waits)


def remove(url: str, waits: tuple = WAITS, folder: bool = False):
    """Deletes a file or folder on a store, if it is there."""

    def delete(fs, path):
        with suppress(FileNotFoundError):
            fs.rm(path, recursive=True) if folder else fs.rm_file(path)

    retrying(url, delete, waits)
