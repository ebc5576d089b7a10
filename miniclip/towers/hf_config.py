"""Config sections of transformers' encoders, and their preprocessing."""

import json
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from miniclip.config import LARGEST, PreprocessConfig
from miniclip.towers.packages import packaged, source
from miniclip.utils.config_files import check, in_range
from miniclip.utils.errors import InputError
from miniclip.utils.weight_files import read_json

POOLERS = ("cls", "cls_last_hidden_state", "mean", "max")
IMAGENET = PreprocessConfig(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
FOREIGN = ("auto_map", "quantization_config", "compression_config", "use_pretrained_backbone")
IMPLEMENTATIONS = (None, "eager", "sdpa", "grouped_mm", "batched_mm")  # transformers' own, which need nothing else
COUNT = 1 << 24  # transformers makes lists as long as some numbers in a config say
RESAMPLE = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers
CENTER_CROP_FILE = "image_processing_torchvision_crop"  # the code that weights/to_huggingface.py puts into folders
# Encoders of published CLIP models: their files need no config from the hub. Names also begin with FacebookAI/.
ROBERTA = {"max_position_embeddings": 514, "type_vocab_size": 1, "layer_norm_eps": 1e-5}  # other than by default
XLM = ROBERTA | {"model_type": "xlm-roberta", "vocab_size": 250002}
LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
KNOWN = {
    "roberta-base": ROBERTA | {"model_type": "roberta", "vocab_size": 50265}, "xlm-roberta-base": XLM,
    "xlm-roberta-large": XLM | LARGE,
}  # fmt: skip


@dataclass
class HfConfig:
    """The fields of both towers."""

    hf_model_name: str | None = None  # a folder, a name on the hub, or package:NAME
    hf_model_pretrained: bool = True  # whether training starts from its weights
    hf_model_config: dict | None = None  # transformers' config; filled in from hf_model_name, so that it gets saved
    hf_pooler_type: str | None = None  # cls, mean or max
    hf_proj_type: str | None = "linear"  # linear, mlp, or none where the tower is as wide as embed_dim
    hf_proj_dropout: float = 0.0  # dropout of the features in training
    width: int | None = None  # channels of the features; filled in

    def problems(self):
        yield from in_range("", self, LARGEST)
        yield self.hf_model_name or self.hf_model_config, "hf_model_name or hf_model_config has to name the encoder"
        yield self.pooler in (None, *POOLERS), f"hf_pooler_type is none of {', '.join(POOLERS)}"
        yield self.hf_proj_type in (None, "none", "linear", "mlp"), "hf_proj_type is none of linear, mlp, none"
        yield 0 <= self.hf_proj_dropout < 1, "hf_proj_dropout is not in [0, 1)"

    @property
    def pooler(self) -> str | None:
        """hf_pooler_type without the ending of OpenCLIP's names."""
        return self.hf_pooler_type and self.hf_pooler_type.removesuffix("_pooler")

    @property
    def pretrained(self) -> bool:
        return bool(self.hf_model_name and self.hf_model_pretrained)

    def encoder_config(self, kind: str):
        """Transformers' config of the encoder, of a pair the "image" or "text" half; becomes hf_model_config."""
        from transformers import AutoConfig, PreTrainedConfig

        name = self.hf_model_name or ""
        known = None if Path(name or "?").is_dir() else KNOWN.get(name.removeprefix("FacebookAI/"))
        if given := self.hf_model_config or known:
            check_encoder(given, "hf_model_config")
            config = AutoConfig.for_model(**given)
        else:
            folder = source(self.hf_model_name)
            check_encoder(PreTrainedConfig.get_config_dict(folder)[0], self.hf_model_name)
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        config = getattr(config, f"{'vision' if kind == 'image' else 'text'}_config", config)
        config.use_cache = False  # a decoder's, for generating text
        if hasattr(config, "mask_ratio"):
            config.mask_ratio = 0.0  # a masked autoencoder has to see whole images
        self.hf_model_config = json.loads(config.to_json_string(use_diff=False))
        for field in ("transformers_version", "_name_or_path", "dtype", "torch_dtype", "attn_implementation"):
            self.hf_model_config.pop(field, None)
        return config


@dataclass
class HfVisionConfig(HfConfig):
    """An image tower from transformers or a package. Without hf_pooler_type it pools as it was trained to."""

    image_size: int | None = None  # pixels; by default that of its own preprocessing

    def preprocess(self) -> dict:
        """The encoder's own preprocessing, from its preprocessor_config.json."""
        name = self.hf_model_name
        size = {} if self.image_size is None else {"size": self.image_size}
        if isinstance(entry := packaged(name), type):
            return entry.PREPROCESS | size
        if name and not self.hf_model_config:
            from transformers.utils import cached_file

            return read_preprocessing(Path(ask(name, cached_file, source(name), "preprocessor_config.json"))) | size
        side = (self.hf_model_config or {}).get("image_size")  # from random weights, or read already
        return {"size": side if isinstance(side, int) else 224, "mean": IMAGENET.mean, "std": IMAGENET.std} | size


@dataclass
class HfTextConfig(HfConfig):
    """A text tower from transformers. hf_pooler_type cls is the class token after the encoder's pooling layer, if any;
    cls_last_hidden_state is the token itself; null means the token itself for BERT, the mean for all others."""

    hf_pooler_type: str | None = "mean"
    hf_proj_type: str | None = "mlp"
    hf_tokenizer_name: str | None = None  # if it is not with the model
    context_length: int = 77  # tokens, special ones included; longer captions are cut
    vocab_size: int | None = None  # filled in

    def problems(self):
        yield from super().problems()
        yield not isinstance(packaged(self.hf_model_name), type), "hf_model_name is an image encoder"
        yield self.context_length > 2, "context_length leaves no room for words"


def check_encoder(config: dict, name: str):
    """Raises InputError for an encoder's config that asks for more than a model of transformers itself: for code or
    weights from elsewhere, quantised weights, or numbers that no encoder has."""
    inside = [("", config)]
    for key, value in inside:  # the list grows
        if isinstance(value, dict | list):
            inside += value.items() if isinstance(value, dict) else ((key, item) for item in value)
        problem = f"the encoder {name!r} cannot be used: its config has {key} {value!r:.100}"
        if key in FOREIGN and value:
            raise InputError(f"{problem}, and only transformers' own code and plain weights are; save it without")
        chosen = value.values() if isinstance(value, dict) else [value]  # a dict names one for each part
        if str(key).endswith("_implementation") and any(one not in IMPLEMENTATIONS for one in chosen):
            raise InputError(f"{problem}, and code from the hub is never run; remove it, or set it to eager or sdpa")
        if type(value) is int and abs(value) > COUNT and "theta" not in key:
            raise InputError(f"{problem}, more than any encoder's")


@contextmanager
def offline():
    """Inside, nothing is asked of the hub, whatever a config names."""
    from huggingface_hub import constants

    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def read_preprocessing(path: Path, maker: str = "") -> dict:
    """The fields of a PreprocessConfig from transformers' preprocessor_config.json or processor_config.json. `maker` is
    the image processor's class if the file does not name one. Raises InputError for preprocessing that MiniCLIP cannot
    do, and for a file of another form."""
    theirs = read_json(path)
    if isinstance(theirs.get("image_processor"), dict):  # of a processor_config.json
        theirs = theirs["image_processor"]
    try:
        ours = _from_transformers(theirs, path, maker)
        check(PreprocessConfig(**ours).problems())
    except (AttributeError, TypeError, ValueError, ZeroDivisionError) as error:
        if str(path) in str(error):
            raise
        raise InputError(f"{path} is not the preprocessing of an encoder: {error}") from None
    return ours


def preprocessing_of(folder: Path, maker: str) -> dict:
    """The preprocessing in a folder of transformers: in a file of its own, or in its processor's; {} without either."""
    files = (folder / name for name in ("preprocessor_config.json", "processor_config.json"))
    return next((read_preprocessing(file, maker) for file in files if file.is_file()), {})


def _from_transformers(theirs: dict, path: Path, maker: str) -> dict:
    maker = str(theirs.get("image_processor_type") or theirs.get("feature_extractor_type") or maker)
    clip = "CLIP" in maker  # whose defaults are others
    resample = theirs.get("resample", 3 if clip else 2)
    size, crop = theirs.get("size", 224), theirs.get("crop_size")
    crop = 224 if clip and crop is None else crop
    if isinstance(size, int):  # old files: some makers mean the shorter side, ViT's and most others a square
        shorter = "crop_pct" in theirs or any(name in maker for name in ("CLIP", "ConvNext", "Bit"))
        size = {"shortest_edge": size} if shorter else {"height": size, "width": size}
    cropped = theirs.get("do_center_crop", True)
    square = not isinstance(crop, dict) or crop.get("width") == crop.get("height")
    crop = None if not cropped else crop.get("height") if isinstance(crop, dict) else crop
    side = size.get("shortest_edge") or size.get("height")
    rounding = "torchvision" if CENTER_CROP_FILE in str(theirs.get("auto_map")) else "transformers"
    ours = {"resize_mode": "shortest" if "shortest_edge" in size else "squash", "center_crop": rounding}
    if theirs.get("crop_pct") and side and side < 384:  # ConvNeXt's and ResNet's: enlarged, then cropped
        ours["crop_pct"], cropped = theirs["crop_pct"], True
    elif theirs.get("crop_pct"):
        ours["resize_mode"] = "squash"
    elif ours["resize_mode"] == "shortest" and crop and side and crop <= side:
        side, ours["crop_pct"] = crop, crop / side
    factor = theirs.get("rescale_factor", 1 / 255)
    squash = ours["resize_mode"] == "squash"
    for supported, problem in (
        (resample in RESAMPLE, f"resample {resample} is neither 2 (bilinear) nor 3 (bicubic)"),
        (type(side) is int and side > 0, f"size {size} has neither a shortest_edge nor a height"),
        ("longest_edge" not in size, f"size {size} limits the longest_edge too"),
        (square or not cropped, f"crop_size {theirs.get('crop_size')} is not a square"),
        (squash or cropped, "images that are neither cropped nor squashed have no fixed size"),
        (squash or crop is None or side and crop <= side, f"crop_size {crop} is larger than size {side}"),
        (not squash or crop in (None, side) and size.get("width", side) == side, "images do not become squares"),
        (not theirs.get("rescale_offset") and abs(factor * 255 - 1) < 1e-3, f"rescale_factor is {factor}, not 1/255"),
        (theirs.get("do_resize", True), "do_resize is false"),
    ):
        check([(supported, f"{path}: {problem}; set preprocess_cfg in the model config")])
    default = PreprocessConfig if clip else IMAGENET
    mean, std = theirs.get("image_mean", default.mean), theirs.get("image_std", default.std)
    mean, std = (mean, std) if theirs.get("do_normalize", True) else ((0.0,) * 3, (1.0,) * 3)
    return ours | {"size": side, "interpolation": RESAMPLE[resample], "mean": tuple(mean), "std": tuple(std)}


def ask(name: str, function, /, *args, **kwargs):
    """Calls a function of transformers, which may raise nearly anything, and turns that into an InputError."""
    try:
        return function(*args, **kwargs)
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"the encoder {name!r} cannot be used: {type(error).__name__}: {error}") from error


def open_tokenizer(folder: str | Path, kind=None):
    """A tokenizer of transformers in a folder or on the hub, of class `kind` or any. Raises InputError without one."""
    from transformers import AutoTokenizer

    try:
        with offline() if Path(folder).is_dir() else nullcontext():
            return ask(str(folder), (kind or AutoTokenizer).from_pretrained, folder, trust_remote_code=False)
    except InputError as error:
        fix = "put the model's tokenizer.json and tokenizer_config.json beside the weights"
        reason = str(error).splitlines()[0]
        raise InputError(f"the tokenizer {folder} of the text tower cannot be read: {fix} ({reason})") from error
