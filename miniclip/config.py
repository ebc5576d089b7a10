"""Which sizes make up a CLIP model?

A JSON file in OpenCLIP's form describes a model: `embed_dim`, `vision_cfg`, `text_cfg`, `quick_gelu`. `model_configs/`
has some. A folder saved by MiniCLIP has its own `config.json`, which includes the image preprocessing: with the wrong
activation or preprocessing, weights are worse and nothing says so."""

import dataclasses
import difflib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from miniclip.utils.config_files import check, fill, in_range, parse_json
from miniclip.utils.errors import InputError

# In the package where it is installed, beside it in a clone.
MODEL_CONFIGS = next(filter(Path.is_dir, (folder / "model_configs" for folder in Path(__file__).resolve().parents[:2])))
# Larger values are mistakes, or meant to exhaust the memory.
LARGEST = {
    "embed_dim": 1 << 16, "width": 1 << 16, "head_width": 1 << 16, "heads": 1 << 16, "mlp_ratio": 64, "layers": 1000,
    "image_size": 4096, "patch_size": 4096, "context_length": 1 << 14, "vocab_size": 1 << 20,
}  # fmt: skip


@dataclass
class VisionConfig:
    """The image tower (a vision transformer). Widths in channels, sizes in pixels."""

    image_size: int = 224
    layers: int = 12
    width: int = 768
    head_width: int = 64  # channels per attention head
    mlp_ratio: float = 4.0
    patch_size: int = 32
    patch_dropout: float = 0.0  # share of patches dropped in training (FLIP, arXiv 2212.00794); 0 in evaluation
    pretrained = False  # not a field: whether the section names weights to start from

    def problems(self):  # (whether a condition on the values holds, what to say if it does not)
        yield from in_range("vision_cfg.", self, LARGEST)
        yield self.image_size % self.patch_size == 0, "vision_cfg.image_size is not a multiple of patch_size"
        yield self.width % self.head_width == 0, "vision_cfg.width is not a multiple of head_width"
        yield 0 <= self.patch_dropout < 1, "vision_cfg.patch_dropout is not in [0, 1)"

    def preprocess(self) -> dict:
        """The preprocessing of the tower's images, for fields that preprocess_cfg does not set."""
        return {"size": self.image_size}


@dataclass
class TextConfig:
    """The text tower (a causal transformer)."""

    context_length: int = 77  # tokens, start and end included
    vocab_size: int = 49408
    width: int = 512
    heads: int = 8
    layers: int = 12
    mlp_ratio: float = 4.0
    pretrained = False

    def problems(self):
        yield from in_range("text_cfg.", self, LARGEST)
        yield self.width % self.heads == 0, "text_cfg.width is not a multiple of heads"


@dataclass
class PreprocessConfig:
    """From an image to the model's input. The default mean and deviation (RGB, 0 to 1) are OpenAI's."""

    size: int | None = None  # pixels; the model's image_size unless given
    mode: Literal["RGB"] = "RGB"
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    resize_mode: Literal["shortest", "longest", "squash"] = "shortest"  # then centre crop; longest: then pad
    crop_pct: float = 1.0  # of resize_mode "shortest": size over the shortest side when it is cropped
    center_crop: Literal["torchvision", "transformers"] = "torchvision"  # odd margin / 2: half to even, or down
    fill_color: int = 0  # grey level of the padding of resize_mode "longest"

    def __post_init__(self):
        check(self.problems())

    def problems(self):
        yield from in_range("", self, LARGEST)
        yield 0.1 <= self.crop_pct <= 1, f"crop_pct is {self.crop_pct}, not from 0.1 to 1"
        yield min(self.std) > 0, f"std is {self.std}, not above 0"
        yield 0 <= self.fill_color <= 255, f"fill_color is {self.fill_color}, not from 0 to 255"


@dataclass
class MiniClipConfig:
    """Everything needed to build a model, except its weights. Raises InputError for unknown fields and bad values."""

    embed_dim: int = 512  # channels of the space that images and texts share
    vision_cfg: VisionConfig = field(default_factory=VisionConfig)
    text_cfg: TextConfig = field(default_factory=TextConfig)
    quick_gelu: bool = False  # activation: x * sigmoid(1.702 x), as in OpenAI's weights, instead of GELU
    init_logit_scale: float = math.log(1 / 0.07)  # where training starts: temperature 0.07 (the paper's section 2.5)
    init_logit_bias: float | None = None  # a learned bias of the logits, which SigLIP's loss needs
    preprocess_cfg: PreprocessConfig = field(default_factory=PreprocessConfig)

    def __post_init__(self):
        vision, text, preprocess = self.vision_cfg, self.text_cfg, self.preprocess_cfg
        preprocess.size = preprocess.size or vision.image_size
        vision.image_size = vision.image_size or preprocess.size
        check(vision.problems(), text.problems(), self.problems())

    def problems(self):
        yield from in_range("", self, LARGEST)
        yield abs(self.init_logit_scale) <= 20, f"init_logit_scale is {self.init_logit_scale}, not from -20 to 20"
        fits = self.preprocess_cfg.size == self.vision_cfg.image_size
        yield fits, "preprocess_cfg.size differs from vision_cfg.image_size"

    @classmethod
    def from_dict(cls, values: dict, source: str = "the model config") -> "MiniClipConfig":
        """Builds a config from OpenCLIP's JSON form; `source` is what error messages call it."""
        if isinstance(values, dict) and isinstance(values.get("vision_cfg"), dict):
            vision = fill(VisionConfig, values["vision_cfg"], f"{source}, vision_cfg", SECTIONS)
            given = values.get("preprocess_cfg", {})
            if isinstance(given, dict) and {f.name for f in dataclasses.fields(PreprocessConfig)} - set(given):
                given = vision.preprocess() | given
            values = values | {"vision_cfg": vision, "preprocess_cfg": given}
        return fill(cls, values, source, SECTIONS)

    @classmethod
    def from_json(cls, path: str | Path) -> "MiniClipConfig":
        """Reads a config file. Raises InputError, naming it, for one that cannot be read."""
        try:
            values = parse_json(Path(path))
        except (OSError, ValueError) as error:
            raise InputError(f"the model config {path} cannot be read: {error}") from None
        return cls.from_dict(values, str(path))

    @classmethod
    def from_name(cls, name: str) -> "MiniClipConfig":
        """Reads `model_configs/<name>.json`, or a path that ends in .json."""
        if name.endswith(".json"):
            return cls.from_json(name)
        if name not in list_models():
            nearest = ", ".join(difflib.get_close_matches(name, list_models(), n=3, cutoff=0.0))
            raise InputError(f"{name!r} is neither a folder nor the name of a model config; nearest: {nearest}")
        return cls.from_json(MODEL_CONFIGS / f"{name}.json")

    def to_dict(self) -> dict:  # the inverse of `from_dict`
        return dataclasses.asdict(self)

    def to_json_string(self) -> str:  # Trainer shows it in TensorBoard
        return json.dumps(self.to_dict(), indent=2)


def list_models() -> list[str]:
    """Names of the configs that ship with the project."""
    return sorted(path.stem for path in MODEL_CONFIGS.glob("*.json"))


# Other towers: (base section, what tells it from the values, the section: a dataclass or "module:name" of one).
SECTIONS: list[tuple[type, Callable[[dict], bool], type | str]] = []
MODELS: dict[type, type] = {}  # of a kind of config with more than two towers, the subclass of MiniClip
