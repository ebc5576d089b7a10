"""How is a picture not encoded twice?

A tower gives the same features whenever it sees the same picture with the same weights after the same preprocessing. A
cache folder keeps them under a key made of all three, so that nothing needs to be told when one of them changes:

    <folder>/<sha256 of weights, preprocessing and precision>/<sha256 of the part>.npy

A part is one NumPy file of rows (sha256 of the picture's file, features). Parts are only ever added, each by one
rename, so that a killed process leaves no half of one, and several may work in the same folder.
"""

import hashlib
import json
import os
import warnings
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from miniclip.inference.fast import InferenceClip
from miniclip.model import MiniClip
from miniclip.transforms import Preprocess
from miniclip.utils.errors import InputError
from miniclip.utils.files import scratch_path, sha256, sync, write_npy
from miniclip.utils.image_files import ImageFile

PART = 4096  # rows: what a killed process may have computed in vain
FORMAT = 1  # to be raised when features change for another reason than weights and preprocessing


class FeatureCache:
    """Features by key: what one tower made, before its projection. Made by `for_images` and `for_texts`.

    `folder` None keeps them in memory only. One thread may write.
    """

    def __init__(self, folder: str | Path | None, fingerprint: str, width: int):
        self.folder = None if folder is None else Path(folder) / fingerprint[:32]
        self.row = np.dtype([("key", "V32"), ("features", "<f4", (width,))])
        self.found, self.added = {}, {}  # key -> (array, row in it), key -> features (W,)
        self.reused = 0  # how often something was taken from it
        for part in sorted(self.folder.glob("*.npy")) if self.folder else ():
            self._read(part)

    @classmethod
    def for_images(cls, folder: str | Path | None, model: MiniClip, preprocess: Preprocess, precision: str = "fp32"):
        """The cache for what the image tower of a model makes of pictures, or has made in `folder`."""
        about = {"preprocess": vars(preprocess.cfg), "scale": preprocess.scale, "quick_gelu": model.config.quick_gelu}
        about |= {"tower": _without_head(model.config.vision_cfg), "precision": precision, "format": FORMAT}
        return cls(folder, fingerprint(model, model.visual, about), model.visual.width)

    @classmethod
    def for_texts(cls, folder: str | Path | None, model: MiniClip, precision: str = "fp32"):
        """The same for what the text tower makes of sentences."""
        about = {"tower": _without_head(model.config.text_cfg), "quick_gelu": model.config.quick_gelu}
        about |= {"precision": precision, "format": FORMAT}
        if tokenizer := model.text.tokenizer.fingerprint():
            about["tokenizer"] = tokenizer
        return cls(folder, fingerprint(model, model.text, about), model.text.width)

    def __len__(self) -> int:
        return len(self.found) + len(self.added)

    def __contains__(self, key: bytes) -> bool:
        return key in self.added or key in self.found

    def __getitem__(self, key: bytes) -> np.ndarray:
        """Features (W,) float32."""
        self.reused += 1
        if key in self.added:
            return self.added[key]
        array, row = self.found[key]
        return array[row]

    def update(self, items: Iterable[tuple[bytes, np.ndarray]]):
        """Adds features (W,) by their keys. They are written by `save`, or when there are enough for a part."""
        self.added.update((key, features.copy()) for key, features in items)
        if len(self.added) >= PART:
            self.save()

    def save(self):
        """Writes what was added since the last time, as one part."""
        if self.folder is None or not self.added:
            return
        part = np.empty(len(self.added), self.row)
        part["key"] = np.frombuffer(b"".join(self.added), "V32")
        part["features"] = np.stack(list(self.added.values()))
        self.folder.mkdir(parents=True, exist_ok=True)
        scratch = scratch_path(self.folder / "part")  # its name will be its sha256
        write_npy(scratch, part.dtype, part.shape, [part])
        sync(scratch)
        os.replace(scratch, self.folder / f"{sha256(scratch)}.npy")
        self.found |= {key: (part["features"], row) for row, key in enumerate(self.added)}
        self.added = {}

    def _read(self, path: Path):
        if sha256(path) != path.stem:
            warnings.warn(f"{path} is damaged: its features are computed again; it can be deleted", stacklevel=4)
            return
        part = np.load(path, mmap_mode="r", allow_pickle=False)
        if part.dtype != self.row:
            raise InputError(f"{path} holds no features of this width ({self.row}): delete it")
        keys, features = part["key"].tobytes(), part["features"]
        self.found |= {keys[32 * row : 32 * row + 32]: (features, row) for row in range(len(part))}


def file_key(path) -> bytes:
    """Returns the key of an image: the sha256 of its file's content, wherever it lies, or an ImageFile's own."""
    return path.key() if isinstance(path, ImageFile) else bytes.fromhex(sha256(path))


def text_key(text: str) -> bytes:
    """The key of a sentence."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def fingerprint(model: MiniClip, tower: nn.Module, about: dict) -> str:
    """sha256 of a tower's weights, its projection apart, and of whatever else its features depend on."""
    if isinstance(model, InferenceClip):
        raise InputError("features are known by the weights of a model as it was loaded: give it without a precision")
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name, tensor in sorted(tower.state_dict().items()):
        if name.partition(".")[0] not in ("proj", "text_projection"):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _without_head(section) -> dict:
    """What a tower's features depend on, of its section of the config."""
    return {name: value for name, value in vars(section).items() if not name.startswith("hf_proj")}
