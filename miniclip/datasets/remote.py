"""Images and sources on other stores: s3://bucket/images, s3://bucket/shards/{000..012}.tar."""

import posixpath
import re
from dataclasses import dataclass

from miniclip.utils.errors import InputError
from miniclip.utils.image_files import ImageError, ImageFile
from miniclip.utils.remote import StoreError, is_remote, join, normal, read_range, retrying


@dataclass(frozen=True, slots=True)
class RemoteImage(ImageFile):
    """An image on a store, read when it is used. Equal for equal addresses."""

    url: str

    def read(self) -> bytes:
        try:
            return read_range(self.url)
        except StoreError as error:
            raise ImageError(str(error)) from None

    def __str__(self) -> str:
        return self.url


class RemoteRoot:
    """A folder on a store where image paths start: as `ImageRoot`, without looking whether the images are there. A
    record may also name an image by its address, if that lies in this folder; s3:// stands for the whole store."""

    def __init__(self, folder: str, allow_outside: bool = False):
        self.folder, self.allow_outside = normal(folder), allow_outside
        self.leads_out = f"leads out of the image folder {self.folder} (--allow_outside_image_root allows it)"

    def file(self, image: str) -> RemoteImage:
        """Returns an image. Raises InputError if its path leads out of the folder."""
        if "\0" in image:
            raise InputError(f"{image[:60]!r}: a path cannot contain a NUL character")
        try:
            image.encode()
        except UnicodeEncodeError:
            raise InputError(f"{image!a}: the name is not valid Unicode: rename the file") from None
        image = image if is_remote(image) else image.replace("\\", "/")
        url = normal(image if is_remote(image) else join(self.folder, image))
        inside = self.folder if self.folder.endswith("://") else f"{self.folder}/"
        if posixpath.isabs(image) or not (self.allow_outside or url.startswith(inside)):
            raise InputError(f"{image}: {self.leads_out}")
        return RemoteImage(url)

    path = file


def expand_remote(pattern: str) -> list[str]:
    """Returns the addresses that a glob of one stands for, in order. Raises InputError if there is none."""
    if not re.search(r"[*?\[]", pattern):
        return [pattern]
    scheme = pattern.partition("://")[0]
    if not (paths := retrying(pattern, lambda fs, path: fs.glob(path))):
        raise InputError(f"{pattern}: no file matches this pattern")
    return sorted(f"{scheme}://{path if scheme == 'file' else path.lstrip('/')}" for path in paths)


def list_folder(url: str) -> list[str]:
    """Returns the addresses of the files and folders directly in a folder on a store; nothing if there is none."""
    found = retrying(url, lambda fs, path: fs.ls(path, detail=False) if fs.isdir(path) else [])
    return sorted(join(url, name) for path in found if (name := posixpath.basename(path.rstrip("/"))))
