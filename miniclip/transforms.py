"""How does a picture become the model's input? With Pillow alone, so that every machine gets the same numbers."""

import io
import os
import stat
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from miniclip.config import InputError, PreprocessConfig

INTERPOLATION = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
MAX_ASPECT = 100  # 4000 x 1 would be resized to 896000 x 224
# What pictures come in. Pillow has forty more: rare ones, less well tested, and EPS, for which it runs Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM", "JPEG2000", "ICO", "TGA")

# Pillow warns above 89 million pixels, which good cameras reach, and raises above 179 million: that is limit enough.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def endings() -> set[str]:
    """What names of pictures end in, ".jpg" and so on: those of FORMATS, and of HEIC, which cannot be read and is to be
    told of."""
    Image.init()
    return {end for end, kind in Image.registered_extensions().items() if kind in FORMATS} | {".heic", ".heif"}


class ImageError(InputError):
    """A picture that cannot be used. Says which file, why, and what to do."""


def open_image(path, scale: int | None = None) -> Image.Image:
    """Reads a picture as a person would see it: an RGB image, upright, transparency shown on white.

    The first frame of an animation; 16-bit and float greyscale brought to 8 bits instead of clipped. `scale` lets
    the JPEG decoder shrink a picture to no less than that many pixels a side, which is fast and lossy. `path` may be a
    handle whose `read` gives the bytes, for a picture that is no file of its own (`miniclip.sources`). Raises
    ImageError for what is no picture in one of FORMATS, is damaged, has more than 179 million pixels, or is a sliver
    of more than 100 to 1.
    """
    try:
        own = not hasattr(path, "read")
        if own and not stat.S_ISREG(mode := os.stat(path).st_mode) and not stat.S_ISDIR(mode):
            raise ImageError(f"{path}: a device or a pipe, no image file")  # which might never come to an end
        with Image.open(path if own else io.BytesIO(path.read()), formats=FORMATS) as image:
            check_aspect(image, path)
            size = image.size
            if scale:
                image.draft("RGB", (scale, scale))
            if image.size != size:
                image.info["drafted"] = True
            ImageOps.exif_transpose(image, in_place=True)  # decodes it; otherwise it would always copy
            check_aspect(image, path)  # once more: within an icon may be another size than its header says
            return to_rgb(image)
    except ImageError:
        raise
    except FileNotFoundError:
        raise ImageError(f"{path}: no such file") from None
    except Image.DecompressionBombError as error:
        raise ImageError(f"{path}: {error} Shrink it or leave its record out") from None
    except UnidentifiedImageError:
        with open(path, "rb") if own else io.BytesIO(path.read()) as file:
            head = file.read(16)
        formats = ", ".join(FORMATS)
        what = f"no picture in a format that is read ({formats}): it begins with {head!r}" if head else "an empty file"
        raise ImageError(f"{path}: {what}; replace it or leave its record out") from None
    except Exception as error:  # a damaged file can make a decoder raise nearly anything
        if isinstance(error, OSError) and error.errno:  # a folder, no permission: the picture may be all right
            raise ImageError(f"{path}: cannot be opened ({error.strerror})") from None
        raise ImageError(f"{path}: damaged ({error}); replace it or leave its record out") from None


def check_aspect(image: Image.Image, name: str | Path = "the picture"):
    """Raises ImageError for a sliver, which resizing by the shortest side would blow up to gigabytes."""
    if max(image.size) > MAX_ASPECT * min(image.size):
        raise ImageError(f"{name}: {image.width} x {image.height} is longer than {MAX_ASPECT} to 1; crop it")


def to_rgb(image: Image.Image) -> Image.Image:
    """Brings any mode to RGB without losing what a person would see."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I") or image.mode == "F":  # `convert` would clip what exceeds 8 bits to white
        levels = np.nan_to_num(np.array(image, dtype=np.float64), copy=False, posinf=0, neginf=0)
        brightest = levels.max(initial=0)
        # Floats come in the ranges 0 to 1, 255 or 65535: the narrowest that holds the picture is meant.
        white = 65535 if image.mode != "F" else next((w for w in (1, 255, 65535) if brightest <= w), brightest)
        levels *= 255 / white  # in place: of a hundred megapixels each copy is a gigabyte
        levels = levels.round(out=levels).clip(0, 255, out=levels).astype(np.uint8)
        return Image.fromarray(levels).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


class Preprocess:
    """The evaluation pipeline: a PIL image to a float32 tensor (3, size, size).

    Resize and crop, then (level / 255 - mean) / std for each channel. For resize_mode "shortest" bit-equal to
    transformers' CLIPImageProcessorPil. Raises ValueError for a config that asks for something unknown.

    `load` starts from a file. With `draft` it has large JPEGs decoded at a half, a quarter or an eighth of their size,
    but not below twice the size that is wanted: several times faster, and 0.2 of 255 levels off on average.
    """

    def __init__(self, cfg: PreprocessConfig, draft: bool = True):
        if cfg.interpolation not in INTERPOLATION:
            raise ValueError(f"interpolation {cfg.interpolation!r} is none of {', '.join(INTERPOLATION)}")
        if cfg.resize_mode not in ("shortest", "longest", "squash") or cfg.mode != "RGB":
            raise ValueError(f"resize_mode {cfg.resize_mode!r} with mode {cfg.mode!r} is not known")
        self.cfg, self.interpolation = cfg, INTERPOLATION[cfg.interpolation]
        self.mean, self.std = torch.tensor([cfg.mean, cfg.std], dtype=torch.float32).view(2, 3, 1, 1)
        self.moments = {}  # mean and std by device
        self.scale = 2 * cfg.size if draft else None  # what `open_image` is asked for

    def __call__(self, image: Image.Image) -> Tensor:
        return self.normalize(self.levels(image))

    def load(self, path: str | Path) -> Tensor:
        """From a file to a float32 tensor (3, size, size). Raises ImageError, naming the file."""
        return self.normalize(self.levels(open_image(path, self.scale)))

    def levels(self, image: Image.Image) -> Tensor:
        """All but the normalisation: a uint8 tensor (3, size, size), a quarter of the bytes to keep or to send."""
        return to_levels(self.resize(to_rgb(image)))

    def normalize(self, levels: Tensor) -> Tensor:
        """Levels (..., 3, size, size) to float32 of the same shape, on the device where they are."""
        if levels.device not in self.moments:  # sent once: each copy would have the host wait for the device
            self.moments[levels.device] = self.mean.to(levels.device), self.std.to(levels.device)
        mean, std = self.moments[levels.device]
        return levels.to(torch.float32).div_(255).sub_(mean).div_(std)

    def __getstate__(self) -> dict:
        return vars(self) | {"moments": {}}  # worker processes have no business on the device

    def resize(self, image: Image.Image) -> Image.Image:
        """To a square of the model's size."""
        size, (width, height) = self.cfg.size, image.size
        if self.cfg.resize_mode == "squash":
            return image.resize((size, size), self.interpolation)
        if self.cfg.resize_mode == "longest":
            ratio = max(width, height) / size
            image = image.resize((max(1, round(width / ratio)), max(1, round(height / ratio))), self.interpolation)
            square = Image.new("RGB", (size, size), (self.cfg.fill_color,) * 3)
            square.paste(image, ((size - image.width) // 2, (size - image.height) // 2))
            return square
        check_aspect(image)
        short, resized = min(width, height), int(size / self.cfg.crop_pct + 1e-6)
        across, down = int(resized * width / short), int(resized * height / short)
        left, top = (across - size) // 2, (down - size) // 2
        if "drafted" in image.info:  # not exact any more: then the part that is cropped off need not be computed
            x, y = width / across, height / down
            box = (left * x, top * y, (left + size) * x, (top + size) * y)
            return image.resize((size, size), self.interpolation, box)
        image = image.resize((across, down), self.interpolation)
        return image.crop((left, top, left + size, top + size))


def to_levels(image: Image.Image) -> Tensor:
    """The levels of an image as a uint8 tensor (3, height, width)."""
    return torch.from_numpy(np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1)))
