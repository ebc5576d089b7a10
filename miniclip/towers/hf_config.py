"""TODO docstring."""

import json
from dataclasses import dataclass
from pathlib import Path

from miniclip.config import TextConfig, VisionConfig
from miniclip.towers.packages import EfficientNetLite, packaged, source
from miniclip.utils.errors import InputError

POOLERS = ("cls", "cls_last_hidden_state", "mean", "max")
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


@dataclass
class _HfConfig:
    """What the sections of both towers have."""

    hf_model_name: str | None = None  # a folder, a name on the hub, or package:NAME
    hf_model_pretrained: bool = True  # whether training starts from its weights
    hf_model_config: dict | None = None  # transformers' config, read from there, and kept so that this is done once
    hf_pooler_type: str | None = None  # cls, mean or max
    hf_proj_type: str | None = "linear"  # linear, mlp, or none where the tower is as wide as embed_dim
    hf_proj_dropout: float = 0.0  # share of the features hidden from the projection in training
    width: int | None = None  # channels of the features; found out

    def problems(self):
        """As VisionConfig's."""
        yield self.hf_model_name or self.hf_model_config, "hf_model_name or hf_model_config must say which encoder"
        pooler, kinds = self.hf_pooler_type, (None, *POOLERS)
        yield (pooler and pooler.removesuffix("_pooler")) in kinds, f"hf_pooler_type is none of {', '.join(POOLERS)}"
        yield self.hf_proj_type in (None, "none", "linear", "mlp"), "hf_proj_type is none of linear, mlp, none"
        yield 0 <= self.hf_proj_dropout < 1, "hf_proj_dropout is not in [0, 1)"

    @property
    def pretrained(self) -> bool:
        return bool(self.hf_model_name and self.hf_model_pretrained)


@dataclass
class HfVisionConfig(_HfConfig):
    """An image tower from transformers or from a package. Without hf_pooler_type it pools as it was made to: by its
    class token, the mean over the picture, or attention."""

    image_size: int | None = None  # pixels; that of its own preprocessing unless given

    def preprocess(self) -> dict:
        """The encoder's own preprocessing, from its preprocessor_config.json."""
        size = {} if self.image_size is None else {"size": self.image_size}
        entry, config = packaged(self.hf_model_name), self.hf_model_config
        if isinstance(entry, type):
            return entry.PREPROCESS | size
        if self.hf_model_name and not config:
            return read_preprocessing(self.hf_model_name) | size
        side = (config or {}).get("image_size")  # there is nobody to ask, or he was asked already
        return {"size": side if isinstance(side, int) else 224, **IMAGENET} | size


@dataclass
class HfTextConfig(_HfConfig):
    """A text tower from transformers. Of hf_pooler_type, cls is the class token through the encoder's own last layer,
    if it has one (BERT), cls_last_hidden_state the token itself. The defaults are OpenCLIP's; null is that token for
    BERT and the mean for all others."""

    hf_pooler_type: str | None = "mean"
    hf_proj_type: str | None = "mlp"
    hf_tokenizer_name: str | None = None  # where it is not with the model
    context_length: int = 77  # tokens, special ones included; longer captions are cut
    vocab_size: int | None = None  # found out

    def problems(self):
        yield from super().problems()
        yield packaged(self.hf_model_name) is not EfficientNetLite, "hf_model_name is an image encoder"
        yield self.context_length > 2, "context_length leaves no room for words"


SECTIONS = {VisionConfig: HfVisionConfig, TextConfig: HfTextConfig}


def read_preprocessing(name: str) -> dict:
    """The fields of a PreprocessConfig as an encoder's preprocessor_config.json has them. Raises InputError for what
    cannot be done here."""
    from transformers.utils import cached_file

    path = _ask(name, lambda: cached_file(source(name), "preprocessor_config.json"))
    theirs = json.loads(Path(path).read_text(encoding="utf-8"))
    size, crop = theirs.get("size", 224), theirs.get("crop_size") or {}
    maker = str(theirs.get("image_processor_type") or theirs.get("feature_extractor_type") or "")
    if isinstance(size, int):  # old files: some makers mean the shorter side, ViT's and most others a square
        shorter = "crop_pct" in theirs or any(name in maker for name in ("CLIP", "ConvNext", "Bit"))
        size = {"shortest_edge": size} if shorter else {"height": size, "width": size}
    crop = (crop if isinstance(crop, int) else crop.get("height")) if theirs.get("do_center_crop", True) else None
    side = size.get("shortest_edge") or size.get("height")
    ours = {"resize_mode": "shortest" if "shortest_edge" in size else "squash"}
    if theirs.get("crop_pct") and side < 384:  # ConvNeXt's and ResNet's: enlarged, then cut
        ours["crop_pct"] = theirs["crop_pct"]
    elif theirs.get("crop_pct"):
        ours["resize_mode"] = "squash"
    elif ours["resize_mode"] == "shortest" and crop:
        side, ours["crop_pct"] = crop, crop / side
    interpolation = {2: "bilinear", 3: "bicubic"}.get(theirs.get("resample", 2))
    levels = theirs.get("rescale_factor", 1 / 255), theirs.get("rescale_offset", False)
    squashed = ours["resize_mode"] == "squash" and (crop not in (None, side) or size.get("width", side) != side)
    levelled = not levels[1] and abs(levels[0] * 255 - 1) < 1e-3 and theirs.get("do_resize", True)
    if side is None or interpolation is None or crop and crop > side or squashed or not levelled:
        raise InputError(f"{path}: this preprocessing is not known here; say preprocess_cfg in the model config")
    mean, std = theirs.get("image_mean", IMAGENET["mean"]), theirs.get("image_std", IMAGENET["std"])
    if not theirs.get("do_normalize", True):
        mean, std = (0.0,) * 3, (1.0,) * 3
    return ours | {"size": side, "interpolation": interpolation, "mean": tuple(mean), "std": tuple(std)}


def _ask(name: str, question):
    """What transformers answers, or an InputError in its words: it raises nearly anything."""
    try:
        return question()
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"the encoder {name!r} cannot be used: {type(error).__name__}: {error}") from error
