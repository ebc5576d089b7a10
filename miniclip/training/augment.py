"""Augmentation of training images: random crops, mirroring and colour jitter."""

import math
import random

from PIL import Image, ImageEnhance
from torch import Tensor

from miniclip.config import PreprocessConfig
from miniclip.transforms import Preprocess, to_levels
from miniclip.utils.image_files import to_rgb

RATIO = 3 / 4, 4 / 3  # a crop's width over height, from lowest to highest (RandomResizedCrop: arXiv 1409.4842)


class TrainTransform(Preprocess):
    """Preprocessing for training, called with (image, rng): the same rng state gives the same tensor.

    `scale` bounds the crop's fraction of the image area; (1, 1) resizes as in evaluation. `hflip` is a probability,
    `color_jitter` the strengths of random brightness, contrast, saturation (factors 1 - x to 1 + x), hue (x turns)."""

    def __init__(self, cfg: PreprocessConfig, scale=(0.9, 1), hflip=0.0, color_jitter: tuple | None = None):
        super().__init__(cfg)
        if not 0 < scale[0] <= scale[1] <= 1 or not 0 <= hflip <= 1:
            raise ValueError(f"scale {scale} must lie in (0, 1] and hflip {hflip} in [0, 1]")
        if color_jitter and len(color_jitter) != 4:
            raise ValueError(f"color_jitter {color_jitter} is not (brightness, contrast, saturation, hue)")
        self.crop_scale, self.hflip, self.color_jitter = scale, hflip, color_jitter
        self.scale = math.ceil(2 * cfg.size / math.sqrt(scale[0] * RATIO[0]))  # enough pixels for the smallest crop

    def __call__(self, image: Image.Image, rng: random.Random) -> Tensor:
        return self.normalize(self.levels(image, rng))

    def levels(self, image: Image.Image, rng: random.Random) -> Tensor:
        image = to_rgb(image)
        if self.crop_scale[0] < 1:
            # Crop first: resize(box=...) would let pixels outside the crop bleed into its edges.
            image = image.crop(self.crop_box(*image.size, rng)).resize((self.cfg.size,) * 2, self.interpolation)
        else:
            image = self.resize(image)
        if rng.random() < self.hflip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if self.color_jitter:
            image = jitter(image, self.color_jitter, rng)
        return to_levels(image)

    def crop_box(self, width: int, height: int, rng: random.Random) -> tuple[int, int, int, int]:
        """A random rectangle within the image; after ten that do not fit, the largest one at the centre."""
        for _ in range(10):
            area = width * height * rng.uniform(*self.crop_scale)
            aspect = math.exp(rng.uniform(*map(math.log, RATIO)))
            w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < w <= width and 0 < h <= height:
                left, top = rng.randint(0, width - w), rng.randint(0, height - h)
                return left, top, left + w, top + h
        w, h = min(width, round(height * RATIO[1])), min(height, round(width / RATIO[0]))
        return (width - w) // 2, (height - h) // 2, (width + w) // 2, (height + h) // 2


def jitter(image: Image.Image, strengths: tuple[float, float, float, float], rng: random.Random) -> Image.Image:
    """Random brightness, contrast and saturation, in random order, then hue."""
    *factors, turn = strengths
    changes = list(zip((ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color), factors))
    rng.shuffle(changes)
    for enhance, strength in changes:
        image = enhance(image).enhance(rng.uniform(max(0, 1 - strength), 1 + strength))
    if turn:
        hue, *others = image.convert("HSV").split()
        shift = round(255 * rng.uniform(-turn, turn))
        hue = hue.point([(level + shift) % 256 for level in range(256)])
        image = Image.merge("HSV", (hue, *others)).convert("RGB")
    return image
