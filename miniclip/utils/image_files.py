"""Image files: reading any supported format to RGB, and the base class of images that are not files of their own."""

import hashlib
import io
import os
import stat
import warnings
from abc import ABC, abstractmethod
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from miniclip.utils.errors import InputError

MAX_ASPECT = 100  # 4000 x 1 would be resized to 896000 x 224
# Pillow reads forty more: rare ones, less well tested, and EPS, for which it runs Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM", "JPEG2000", "ICO", "TGA")
HEIC = ("heic", "heif")  # extensions of a format that is reported, since phones write it, but cannot be read
# Pillow warns above 89 million pixels, which good cameras reach, and raises above 179 million: that is limit enough.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class ImageError(InputError):
    """An image that cannot be used."""


class ImageFile(ABC):
    """An image that is not a plain path: in an archive, a table, memory or a remote store. Wherever the package takes
    an image path it takes an ImageFile too. Subclasses can be pickled, for data-loader workers."""

    __slots__ = ()

    @abstractmethod
    def read(self) -> bytes:
        """Returns the encoded image (JPEG, PNG, ...). Raises ImageError."""

    @abstractmethod
    def __str__(self) -> str:
        """Returns the name used in messages."""

    def key(self) -> bytes:
        """Returns 32 bytes that identify the content: its sha256, or what a subclass has cheaper. Raises ImageError."""
        return hashlib.sha256(self.read()).digest()


class BufferedImage(ImageFile):
    """An ImageFile that was read once; its bytes are kept."""

    def __init__(self, image: ImageFile):
        self.image, self.data = image, image.read()

    def read(self) -> bytes:
        return self.data

    def __str__(self) -> str:
        return str(self.image)

    def key(self) -> bytes:
        hashes_content = type(self.image).key is ImageFile.key  # then the bytes need not be read again
        return super().key() if hashes_content else self.image.key()


def endings() -> set[str]:
    """Returns the endings of image names (".jpg", ...): those of FORMATS, and of HEIC, which is reported as bad."""
    Image.init()
    known = {end for end, kind in Image.registered_extensions().items() if kind in FORMATS}
    return known | {f".{end}" for end in HEIC}


def open_image(path: str | Path | ImageFile, scale: int | None = None, as_stored: bool = False) -> Image.Image:
    """Reads an image as a person would see it: RGB, upright, transparency shown on white, 16-bit and float greyscale
    scaled to 8 bits; the first frame of an animation. With `scale` the JPEG decoder may shrink an image to no less than
    that many pixels a side, which is fast and lossy; `as_stored` leaves mode and orientation alone. Raises ImageError
    for a file that is not in one of FORMATS, is damaged, has more than 179 million pixels, or an aspect ratio above
    100:1.
    """
    in_file = not isinstance(path, ImageFile)
    try:
        if in_file and not stat.S_ISREG(mode := os.stat(path).st_mode) and not stat.S_ISDIR(mode):
            raise ImageError(f"{path}: a device or a pipe, not an image file")  # reading it might never end
        with Image.open(path if in_file else io.BytesIO(path.read()), formats=FORMATS) as image:
            check_aspect(image, path)
            size = image.size
            if scale:
                image.draft("RGB", (scale, scale))
            if image.size != size:
                image.info["drafted"] = True
            if as_stored:
                image.load()
                return image
            ImageOps.exif_transpose(image, in_place=True)  # decodes it; otherwise it would always copy
            check_aspect(image, path)  # again: the image within an icon may have another size than its header says
            return to_rgb(image)
    except ImageError:
        raise
    except FileNotFoundError:
        raise ImageError(f"{path}: no such file") from None
    except Image.DecompressionBombError as error:
        raise ImageError(f"{path}: {error} Shrink it or remove its record") from None
    except UnidentifiedImageError:
        with open(path, "rb") if in_file else io.BytesIO(path.read()) as file:
            head = file.read(16)
        unknown = f"not an image in a supported format ({', '.join(FORMATS)}): it begins with {head!r}"
        raise ImageError(f"{path}: {unknown if head else 'an empty file'}; replace it or remove its record") from None
    except Exception as error:  # a damaged file can make a decoder raise nearly anything
        if isinstance(error, OSError) and error.errno:  # a folder, no permission: the image itself may be fine
            raise ImageError(f"{path}: cannot be opened ({error.strerror})") from None
        raise ImageError(f"{path}: damaged ({error}); replace it or remove its record") from None


def check_aspect(image: Image.Image, name: str | Path | ImageFile = "the image"):
    """Raises ImageError for a sliver, which resizing by the shortest side would blow up to gigabytes."""
    if max(image.size) > MAX_ASPECT * min(image.size):
        raise ImageError(f"{name}: {image.width} x {image.height} has an aspect ratio above {MAX_ASPECT}:1; crop it")


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts an image of any mode to RGB without losing what a person would see."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I") or image.mode == "F":  # `convert` would clip what exceeds 8 bits to white
        levels = np.nan_to_num(np.array(image, dtype=np.float64), copy=False, posinf=0, neginf=0)
        brightest = levels.max(initial=0)
        # Floats come in the ranges 0 to 1, 255 or 65535: the narrowest that holds the image is meant.
        white = 65535 if image.mode != "F" else next((w for w in (1, 255, 65535) if brightest <= w), brightest)
        levels *= 255 / white  # in place: of a hundred megapixels each copy is a gigabyte
        levels = levels.round(out=levels).clip(0, 255, out=levels).astype(np.uint8)
        return Image.fromarray(levels).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
