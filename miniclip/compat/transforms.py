"""OpenCLIP's image transforms: lists of steps that print and can be taken apart, without torchvision."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from PIL import Image
from torch import Tensor

from miniclip.config import PreprocessConfig
from miniclip.training.augment import TrainTransform, jitter
from miniclip.transforms import Preprocess, to_levels
from miniclip.utils.config_files import fill
from miniclip.utils.errors import InputError

TIMM = "only timm's transforms have it: use them on the images yourself"


def square(size, name: str = "size") -> int:
    """The side of a square, from a number or a pair of equal ones. Raises InputError for another pair."""
    height, width = size if isinstance(size, list | tuple) else (size, size)
    if height != width:
        raise InputError(f"{name} {size}: MiniCLIP's models take square images")
    return height


@dataclass
class PreprocessCfg(PreprocessConfig):
    """OpenCLIP's description of the preprocessing, checked."""

    size: int = 224

    def __post_init__(self):
        self.size = square(self.size)
        super().__post_init__()

    input_size = property(lambda self: (3, self.size, self.size))


@dataclass
class AugmentationCfg:
    """OpenCLIP's augmentations, except those that it has from timm. Raises InputError for these."""

    scale: tuple[float, float] = (0.9, 1.0)  # area of the random crop, as a fraction of the image's
    ratio: tuple[float, float] | None = None
    color_jitter: tuple[float, float, float, float] | None = None  # brightness, contrast, saturation, hue
    re_prob: float | None = None
    re_count: int | None = None
    use_timm: bool = False
    color_jitter_prob: float | None = None
    gray_scale_prob: float | None = None

    def __post_init__(self):
        for name in ("use_timm", "ratio", "re_prob", "re_count"):
            if getattr(self, name):
                raise InputError(f"aug_cfg: {name} {getattr(self, name)}: {TIMM}")
        jitter = self.color_jitter
        if jitter and not (isinstance(jitter, list | tuple) and len(jitter) == 4):
            raise InputError(f"aug_cfg: color_jitter {jitter}: give brightness, contrast, saturation and hue")
        if bool(jitter) != bool(self.color_jitter_prob):
            raise InputError("aug_cfg: color_jitter and color_jitter_prob have no effect without each other: give both")


class Compose:
    """Applies steps one after another; `transforms` is the list."""

    def __init__(self, transforms: list[Callable]):
        self.transforms = transforms

    def __call__(self, image):
        for transform in self.transforms:
            image = transform(image)
        return image

    def __repr__(self) -> str:
        return "Compose(\n" + "".join(f"    {transform}\n" for transform in self.transforms) + ")"


@dataclass
class Resize:
    """Resizes and crops or pads to a square, in the image's own mode."""

    size: int
    interpolation: str
    resize_mode: str
    preprocess: Preprocess = field(repr=False)

    def __call__(self, image: Image.Image) -> Image.Image:
        return self.preprocess.resize(pil(image))


@dataclass
class RandomResizedCrop:
    """Resizes a random part of an image to a square. Random numbers come from torch, as in torchvision."""

    size: int
    scale: tuple[float, float]
    transform: TrainTransform = field(repr=False)

    def __call__(self, image: Image.Image) -> Image.Image:
        box = self.transform.crop_box(*pil(image).size, torch_random())
        return image.crop(box).resize((self.size, self.size), Image.Resampling.BICUBIC)


@dataclass
class ColorJitter:
    """Changes brightness, contrast, saturation and hue, in this probability and by at most these strengths."""

    strengths: tuple[float, float, float, float]
    p: float

    def __call__(self, image: Image.Image) -> Image.Image:
        rng = torch_random()
        return jitter(image, self.strengths, rng) if rng.random() < self.p else image


@dataclass
class RandomGrayscale:
    """Makes an image grey, in this probability."""

    p: float

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.convert("L").convert("RGB") if torch_random().random() < self.p else image


@dataclass
class ToRGB:
    """Converts an image as OpenCLIP and OpenAI do: transparent pixels show their hidden colour."""

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.convert("RGB")


@dataclass
class ToTensor:
    """An image to a float32 tensor (3, H, W) from 0 to 1; a tensor stays as it is."""

    def __call__(self, image: Image.Image | Tensor) -> Tensor:
        return image if isinstance(image, Tensor) else to_levels(image).to(torch.float32).div_(255)


@dataclass
class Normalize:
    """(x - mean) / std for each channel."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __call__(self, x: Tensor) -> Tensor:
        mean, std = torch.tensor([self.mean, self.std], dtype=x.dtype, device=x.device).view(2, 3, 1, 1)
        return (x - mean).div_(std)


def pil(image) -> Image.Image:
    """The image. Raises TypeError for anything else."""
    if not isinstance(image, Image.Image):
        raise TypeError(f"expected a PIL image, found {type(image).__name__}: open it with PIL.Image.open")
    return image


def torch_random() -> random.Random:
    return random.Random(int(torch.randint(1 << 62, ())))


def image_transform_v2(cfg: PreprocessConfig, is_train: bool, aug_cfg: dict | AugmentationCfg | None = None) -> Compose:
    """A PIL image to a float32 tensor (3, size, size), as OpenCLIP's transforms for training or evaluation."""
    aug = fill(AugmentationCfg, aug_cfg, "aug_cfg") if isinstance(aug_cfg, dict) else aug_cfg or AugmentationCfg()
    steps = [Resize(cfg.size, cfg.interpolation, cfg.resize_mode, Preprocess(cfg, "openclip")), ToRGB()]
    if is_train:
        steps[0] = RandomResizedCrop(cfg.size, tuple(aug.scale), TrainTransform(cfg, tuple(aug.scale)))
        if aug.color_jitter_prob:
            steps.append(ColorJitter(aug.color_jitter, aug.color_jitter_prob))
        if aug.gray_scale_prob:
            steps.append(RandomGrayscale(aug.gray_scale_prob))
    return Compose([*steps, ToTensor(), Normalize(tuple(cfg.mean), tuple(cfg.std))])


def image_transform(
    image_size, is_train: bool, mean=None, std=None, resize_mode: str | None = None, interpolation: str | None = None,
    fill_color: int = 0, aug_cfg: dict | AugmentationCfg | None = None,
) -> Compose:  # fmt: skip
    """The same from single values, OpenAI's unless given; a single mean or std is that of all channels."""
    mean, std = (x if x is None or isinstance(x, list | tuple) else (x,) * 3 for x in (mean, std))
    given = {"mean": mean, "std": std, "resize_mode": resize_mode, "interpolation": interpolation}
    given = {name: value for name, value in given.items() if value is not None}
    return image_transform_v2(PreprocessCfg(size=image_size, fill_color=fill_color, **given), is_train, aug_cfg)
