"""How does an image become the model's input? With Pillow alone, so that every machine gets the same numbers."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from miniclip.config import PreprocessConfig
from miniclip.utils.image_files import check_aspect, open_image, to_rgb


class Preprocess:
    """The evaluation pipeline: a PIL image to a float32 tensor (3, size, size).

    Resize and crop, then (level / 255 - mean) / std for each channel: bit-equal to OpenCLIP's transform, and with
    center_crop "transformers" to CLIPImageProcessorPil. `load` starts from a file. `decode`: "full"; "fast" decodes
    large JPEGs at a half, a quarter or an eighth of their size, but at no less than twice the target size, which is 0.2
    of 255 levels off on average; "openclip" reads files as OpenCLIP and OpenAI do: not turned by EXIF, transparent
    pixels in their hidden colour, converted to RGB only when resized. Raises ValueError for another `decode`."""

    def __init__(self, cfg: PreprocessConfig, decode: str = "fast"):
        if decode not in ("fast", "full", "openclip"):
            raise ValueError(f"decode {decode!r} is not one of fast, full, openclip")
        self.cfg = cfg
        self.interpolation = Image.Resampling[cfg.interpolation.upper()]
        self.stored = decode == "openclip"
        self.mean, self.std = torch.tensor([cfg.mean, cfg.std], dtype=torch.float32).view(2, 3, 1, 1)
        self.moments = {}  # mean and std by device
        self.scale = 2 * cfg.size if decode == "fast" else None  # the size that `open_image` may shrink to

    def __call__(self, image: Image.Image) -> Tensor:
        return self.normalize(self.levels(image))

    def load(self, path: str | Path) -> Tensor:
        """From a file to a float32 tensor (3, size, size). Raises ImageError that names the file."""
        return self.normalize(self.levels(open_image(path, self.scale, self.stored)))

    def levels(self, image: Image.Image) -> Tensor:
        """Without the normalisation: a uint8 tensor (3, size, size), a quarter of the bytes to keep or send."""
        return to_levels(self.resize(image).convert("RGB") if self.stored else self.resize(to_rgb(image)))

    def normalize(self, levels: Tensor) -> Tensor:
        """Levels (..., 3, size, size) to float32 of the same shape, on their device."""
        if levels.device not in self.moments:  # sent once: each copy makes the host wait for the device
            self.moments[levels.device] = self.mean.to(levels.device), self.std.to(levels.device)
        mean, std = self.moments[levels.device]
        return levels.to(torch.float32).div_(255).sub_(mean).div_(std)

    def __getstate__(self) -> dict:
        return vars(self) | {"moments": {}}  # worker processes must not touch the device

    def resize(self, image: Image.Image) -> Image.Image:
        """Resizes and crops or pads to a square of the model's size."""
        size = self.cfg.size
        width, height = image.size
        if self.cfg.resize_mode == "squash":
            return image.resize((size, size), self.interpolation)
        if self.cfg.resize_mode == "longest":
            ratio = max(width, height) / size
            image = image.resize((max(1, round(width / ratio)), max(1, round(height / ratio))), self.interpolation)
            left, top = (size - image.width) // 2, (size - image.height) // 2
            border = left, top, size - image.width - left, size - image.height - top
            return ImageOps.expand(image, border, (self.cfg.fill_color,) * len(image.getbands()))
        check_aspect(image)
        short = min(width, height)
        resized = int(size / self.cfg.crop_pct + 1e-6)  # the shorter side before it is cropped
        across, down = int(resized * width / short), int(resized * height / short)
        half = round if self.cfg.center_crop == "torchvision" else int
        left, top = half((across - size) / 2), half((down - size) / 2)
        if "drafted" in image.info:  # no longer exact anyway: do not compute what is cropped off
            x, y = width / across, height / down
            box = (left * x, top * y, (left + size) * x, (top + size) * y)
            return image.resize((size, size), self.interpolation, box)
        image = image.resize((across, down), self.interpolation)
        return image.crop((left, top, left + size, top + size))


def to_levels(image: Image.Image) -> Tensor:
    """The levels of an image as a uint8 tensor (3, height, width)."""
    return torch.from_numpy(np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1)))
