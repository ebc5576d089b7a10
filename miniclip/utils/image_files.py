"""Image files: reading any supported format to RGB, and the base class of images that are not files of their own."""

import hashlib
import io
import os
import stat
import struct
import sys
import warnings
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from miniclip.utils.errors import InputError

MAX_ASPECT = 100  # 4000 x 1 would be resized to 896000 x 224
# Pillow reads forty more: rare ones, less well tested, and EPS, for which it runs Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM", "JPEG2000", "ICO", "TGA")
# Extensions of image names: of FORMATS, and HEIC, by pillow-heif. Of several images in a sample the first counts.
HEIC = ("heic", "heif", "hif")
EXTENSIONS = ("jpg", "jpeg", "png", "webp", "avif", "bmp", "gif", "tif", "tiff", "jp2", "ppm", "ico", "tga",
              "jfif", "jpe", "jif", "jfi", "mpo", "apng", "avifs", "dib", "j2k", "j2c", "jpc", "jpf", "jpx",
              "pbm", "pgm", "pnm", "pfm", "icb", "vda", "vst", *HEIC)  # fmt: skip
ENDINGS = frozenset(f".{extension}" for extension in EXTENSIONS)
HEIC_BRANDS = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"hevm", b"hevs", b"mif1", b"mif2", b"msf1")
NO_HEIC = "HEIC, which only pillow-heif reads: pip install -r requirements-heic.txt, or convert it to JPEG"
PHOTOMETRIC, ORIENTATION = 262, 274  # tags of TIFF and EXIF
TURNS = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
         5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
         8: Image.Transpose.ROTATE_90}  # by orientation  # fmt: skip
WHITE = (255, 1023, 4095, 16383, 65535)  # of 8, 10, 12, 14 and 16 bits, stored in 16, 32 or as floats
# Of 16 bits a colour Pillow keeps the upper 8. In the other byte order, from each of these, it keeps the lower 8.
OTHER_BYTE = {";16B": ";16L", ";16L": ";16B", ";16N": ";16B" if sys.byteorder == "little" else ";16L"}
PNG, JPEG, END = b"\x89PNG\r\n\x1a\n", b"\xff\xd8", b"\xff\xd9"
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


def open_image(path: str | Path | ImageFile, scale: int | None = None, as_stored: bool = False) -> Image.Image:
    """Reads an image as a person would see it: RGB, upright, transparency shown on white, 16 bits and floats scaled
    to 8 bits; the first frame of an animation. Metadata that Pillow cannot read is ignored. With `scale` the
    JPEG decoder may shrink an image to no less than that many pixels a side, which is fast and lossy; `as_stored`
    leaves mode and orientation alone. Raises ImageError for a file that is not in one of FORMATS or HEIC, is damaged,
    has more than 179 million pixels, or an aspect ratio above 100:1."""
    in_file = not isinstance(path, ImageFile)

    def decode(file) -> Image.Image:
        with _identify(file, path) as image:
            check_aspect(image, path)
            size = image.size
            if scale and image.format in ("JPEG", "MPO"):  # HEIC would give its thumbnail, which may be sound alone
                image.draft("RGB", (scale, scale))
            if image.size != size:
                image.info["drafted"] = True
            deep = image.tile and all(_layout(tile)[0][-4:] in OTHER_BYTE for tile in image.tile)
            image.load()
            if as_stored:
                return image
            deep = deep and image.mode in ("RGB", "RGBA")
            if deep and max(high for _, high in image.getextrema()[:3]) <= WHITE[-2] >> 8:
                image = _scaled(image, _identify(file, path))
            image = upright(image)
            check_aspect(image, path)  # again: the image within an icon may have another size than its header says
            return to_rgb(image)

    file = path
    try:
        if in_file and not stat.S_ISREG(mode := os.stat(path).st_mode) and not stat.S_ISDIR(mode):
            raise ImageError(f"{path}: a device or a pipe, not an image file")  # reading it might never end
        file = path if in_file else io.BytesIO(path.read())
        return _tolerant(decode, file)
    except ImageError:
        raise
    except FileNotFoundError:
        raise ImageError(f"{path}: no such file") from None
    except Image.DecompressionBombError as error:
        raise ImageError(f"{path}: {error} Shrink it or remove its record") from None
    except UnidentifiedImageError:
        head = _bytes(file, 16)
        unknown = f"not an image in a supported format ({', '.join(FORMATS)}): it begins with {head!r}"
        raise ImageError(f"{path}: {unknown if head else 'an empty file'}; replace it or remove its record") from None
    except Exception as error:  # a damaged file can make a decoder raise nearly anything
        if isinstance(error, OSError) and error.errno:  # a folder, no permission: the image itself may be fine
            raise ImageError(f"{path}: cannot be opened ({error.strerror})") from None
        raise ImageError(f"{path}: damaged ({error}); replace it or remove its record") from None


def identify(file: str | Path | io.BytesIO, name="the image") -> Image.Image:
    """Reads format and size of an image, which is not decoded yet. Raises ImageError or Pillow's errors."""
    return _tolerant(lambda file: _identify(file, name), file)


def _identify(file, name) -> Image.Image:
    try:
        return Image.open(file, formats=FORMATS)
    except UnidentifiedImageError:
        head = _bytes(file, 64)
        if head[4:8] != b"ftyp" or head[8:12] not in HEIC_BRANDS or b"avif" in head:
            raise
    try:
        import pillow_heif
    except ImportError:
        raise ImageError(f"{name}: {NO_HEIC}") from None
    pillow_heif.register_heif_opener()
    try:
        return Image.open(file, formats=("HEIF",))
    except UnidentifiedImageError:
        raise ImageError(f"{name}: damaged HEIC; replace it or remove its record") from None


def _tolerant(use: Callable, file):
    """Returns `use(file)`. Where that fails, the same of the image without what viewers do without."""
    try:
        return use(file)
    except Exception as error:  # one with a number: the file cannot be read
        if isinstance(error, ImageError | Image.DecompressionBombError) or getattr(error, "errno", None):
            raise
        with suppress(Exception):
            for data in _repairs(_bytes(file)):
                with suppress(Exception):
                    return use(io.BytesIO(data))
        raise


def _bytes(file, most: int = -1) -> bytes:
    if isinstance(file, io.BytesIO):
        return file.getvalue()[: most if most >= 0 else None]
    with open(file, "rb") as opened:
        return opened.read(most)


def _repairs(data: bytes) -> Iterator[bytes]:
    """Yields a PNG or JPEG without metadata, and a JPEG of which only the end mark is missing with one."""
    if data.startswith(PNG):
        yield _bare_png(data, (b"tRNS", b"eXIf"))
        yield _bare_png(data, ())
    elif data.startswith(JPEG):
        header, scans = _bare_jpeg(data)
        yield header + scans
        ended = header + scans.rstrip(b"\xff") + END
        if scans.count(b"\xff\xda") == 1:  # of several, one may be missing
            # Pillow fills what is missing with grey. If nothing is, more data after the scan change no pixel.
            longer = (ended[:-2] + bits * 64 + END for bits in (b"", b"\x5a", b"\xa5", b"\x33", b"\xc7"))
            if len({Image.open(io.BytesIO(data), formats=("JPEG",)).tobytes() for data in longer}) == 1:
                yield ended


def _bare_png(data: bytes, others: tuple[bytes, ...]) -> bytes:
    """Returns a PNG's critical chunks and `others`: texts and profiles may be large, or have wrong checksums, and
    libpng ignores any other chunk with one (PNG specification, section 13)."""
    kept, at = PNG, len(PNG)
    while at < len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        chunk, kind, checksum = data[at:end], data[at + 4 : at + 8], data[end - 4 : end]
        sound = zlib.crc32(chunk[4:-4]) == int.from_bytes(checksum, "big")
        if kind[:1].isupper() or kind in others and sound:
            kept += chunk
        at = end
    return kept


def _bare_jpeg(data: bytes) -> tuple[bytes, bytes]:
    """Returns a JPEG's segments up to the first scan, without metadata but for EXIF and Adobe's colours; the rest."""
    kept, at = data[:2], 2
    while data[at : at + 1] == b"\xff" and (marker := data[at + 1 : at + 2]) not in (b"\xda", b""):
        size = 1 if marker == b"\xff" else 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        segment = data[at : at + size]
        metadata = b"\xe0" <= marker <= b"\xef" or marker == b"\xfe"
        exif, adobe = segment[4:10] == b"Exif\0\0", segment[4:9] == b"Adobe" and size >= 16
        if not metadata or exif or adobe:
            kept += segment
        at += size
    return kept, data[at:]


def upright(image: Image.Image) -> Image.Image:
    """Turns an image as its EXIF says, whatever else is in there."""
    orientation = None
    with suppress(Exception):  # EXIF that cannot be read says nothing
        orientation = image.getexif().get(ORIENTATION) or _first_orientation(image.info["exif"])
    turn = TURNS.get(orientation)
    return image if turn is None else image.transpose(turn)


def _first_orientation(exif: bytes) -> int | None:
    """The orientation in the first directory of EXIF: Pillow 12 reads no tag after a broken one."""
    data = exif.removeprefix(b"Exif\0\0")
    order = {b"II": "<", b"MM": ">"}[data[:2]]
    (start,) = struct.unpack_from(f"{order}I", data, 4)
    (count,) = struct.unpack_from(f"{order}H", data, start)
    entries = (struct.unpack_from(f"{order}HHIH", data, start + 2 + 12 * i) for i in range(count))
    return next((value for tag, kind, _, value in entries if (tag, kind) == (ORIENTATION, 3)), None)


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
        levels *= 255 / white_level(image, levels)  # in place: of a hundred megapixels each copy is a gigabyte
        levels = levels.round(out=levels).clip(0, 255, out=levels).astype(np.uint8)
        if dict(getattr(image, "tag_v2", {})).get(PHOTOMETRIC) == 0:  # white is zero; Pillow inverts only 8 bits
            levels = 255 - levels
        return Image.fromarray(levels).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _layout(tile) -> tuple:
    """How the pixels lie in a file, and what else Pillow's decoder is told."""
    layout, *more = tile.args if isinstance(tile.args, tuple) and tile.args else [tile.args]
    return str(layout), *more


def _scaled(image: Image.Image, again: Image.Image) -> Image.Image:
    """Scales colours of 16 bits, of which `image` has the upper halves, to 8 bits. `again` is the image unread."""
    with again:
        grey, tiles = False, []
        for tile in again.tile:
            layout, *more = _layout(tile)
            grey = layout.startswith("LA")  # four bytes a pixel, which pass for four channels
            layout = "RGBA" if grey else layout[:-4] + OTHER_BYTE[layout[-4:]]
            tiles.append(tile._replace(args=(layout, *more)))
        again.tile = tiles
        lower = np.asarray(again)
    levels = np.asarray(image) * 256.0 + (lower[..., [1, 1, 1, 3]] if grey else lower)
    for channels in (levels[..., :3], levels[..., 3:]):  # colours, alpha
        channels *= 255 / white_level(image, channels)
    return Image.fromarray(levels.round().clip(0, 255).astype(np.uint8))


def white_level(image: Image.Image, levels: np.ndarray) -> float:
    """The level of white in an image of more than 8 bits: files do not say it, and the narrowest usual range that
    holds the image is meant. Floats may exceed theirs by a tenth, as after sharpening."""
    brightest, is_float = levels.max(initial=0), image.mode == "F"
    reach = brightest / 1.1 if is_float else brightest
    white = next((white for white in (1,) * is_float + WHITE if reach <= white), brightest)
    if white < WHITE[-1] and not is_float:
        # Scaled to 16 bits for certain: PNM by Pillow, and multiples of 257, which come from 8 bits.
        white = WHITE[-1] if image.format == "PPM" or not (levels % 257).any() else white
    return white
