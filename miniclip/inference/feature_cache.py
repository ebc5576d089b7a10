"""Feature caches: what a frozen tower computed for an image or a text, kept for the next run.

    <folder>/<sha256 of weights, preprocessing and precision>/<sha256 of the part>.npy

The path depends on everything that decides the features. A part has rows (sha256 of the image file, features). Parts
are only added, by atomic renames: a killed process leaves no partial file, and processes may share a folder."""

import errno
import hashlib
import json
import logging
import os
import warnings
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

from miniclip.inference.fast import InferenceClip, plain_reason
from miniclip.model import MiniClip, Tower
from miniclip.towers.tokens import has_tokens
from miniclip.transforms import Preprocess
from miniclip.utils.errors import InputError
from miniclip.utils.files import scratch_path, sha256, sync, write_npy
from miniclip.utils.image_files import ImageFile

logger = logging.getLogger(__name__)

PART = 4096  # rows: as many as a killed process may lose
FORMATS = {"int8": 2}  # by precision, 1 for others: raise it when features or speeds change but weights do not


class FeatureCache(dict):
    """The features (W,) of one tower, before its projection, by key. Made by `for_images` and `for_texts`. With
    `folder` None they stay in memory. Only one thread may write. With `positions`, a number, they are those of as many
    patches or words, one after the other, in float16."""

    precision = "fp32"  # that the tower computes in

    def __init__(self, folder: str | Path | None, fingerprint: str, width: int, dtype: str = "<f4"):
        self.folder = None if folder is None else Path(folder) / fingerprint[:32]
        self.row = np.dtype([("key", "V32"), ("features", dtype, (width,))])
        self.part = max(1, min(PART, (1 << 26) // width))
        self.added = {}  # what is not yet written
        self.reused = 0  # how often something was found
        for path in sorted(self.folder.glob("*.npy")) if self.folder else ():
            if sha256(path) != path.stem:
                warnings.warn(f"{path} is damaged: its features are computed again; it can be deleted", stacklevel=3)
                continue
            part = np.load(path, mmap_mode="r", allow_pickle=False)
            if part.dtype != self.row:
                raise InputError(f"{path} holds no features of this width ({self.row}): delete it")
            keys, features = part["key"].tobytes(), np.asarray(part["features"])
            super().update((keys[32 * row : 32 * row + 32], features[row]) for row in range(len(part)))

    @classmethod
    def for_images(cls, folder, model: MiniClip, preprocess: Preprocess, precision: str = "fp32", positions: int = 0):
        about = {"preprocess": vars(preprocess.cfg), "scale": preprocess.scale}
        about |= {"decode": "openclip"} if preprocess.stored else {}
        return cls._of(folder, model, model.visual, model.config.vision_cfg, precision, about, positions)

    @classmethod
    def for_texts(cls, folder, model: MiniClip, precision: str = "fp32", positions: int = 0):
        about = {"tokenizer": tokenizer} if (tokenizer := model.text.tokenizer.fingerprint()) else {}
        return cls._of(folder, model, model.text, model.config.text_cfg, precision, about, positions)

    @classmethod
    def _of(cls, folder, model: MiniClip, tower: Tower, section, precision: str, about: dict, positions: int):
        about |= {"precision": precision, "format": FORMATS.get(precision, 1), "quick_gelu": model.config.quick_gelu}
        about |= {"positions": positions} if positions else {}
        after = "hf_proj", "token_dim"  # what the features do not depend on
        about["tower"] = {name: value for name, value in vars(section).items() if not name.startswith(after)}
        if folder is not None and (reason := plain_reason(tower)):  # keys know weights, not code
            logger.warning("%s: the feature cache in %s is neither read nor written", reason, folder)
            folder = None
        form = (positions * tower.width, "<f2") if positions else (tower.width,)
        found = cls(folder, "" if folder is None else fingerprint(model, tower, about), *form)
        found.precision = precision
        return found

    def __getitem__(self, key: bytes) -> np.ndarray:
        self.reused += 1
        return super().__getitem__(key)

    def update(self, items: Iterable[tuple[bytes, np.ndarray]]):
        """Adds features (W,) by their keys. They are written by `save`, and whenever a part is full."""
        items = {key: features.astype(self.row["features"].base) for key, features in items}
        super().update(items)
        self.added |= items if self.folder else {}
        if len(self.added) >= self.part:
            self.save()

    def save(self):
        """Writes what was added since the last call as one part."""
        if not self.added:
            return
        part = np.empty(len(self.added), self.row)
        part["key"] = np.frombuffer(b"".join(self.added), "V32")
        part["features"] = np.stack(list(self.added.values()))
        self.added = {}
        scratch = scratch_path(self.folder / "part")  # its name will be its sha256
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_npy(scratch, part.dtype, part.shape, [part])
            sync(scratch)
            os.replace(scratch, self.folder / f"{sha256(scratch)}.npy")
        except OSError as error:  # of others, for example, who share it: nothing but time is lost
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise
            logger.warning("%s cannot be written to (%s): new features are not kept", self.folder, error.strerror)
            self.folder = None


def file_key(path) -> bytes:
    """The key of an image: the sha256 of its file's content, wherever it lies, or an ImageFile's own."""
    return path.key() if isinstance(path, ImageFile) else bytes.fromhex(sha256(path))


def text_key(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def projections(model: MiniClip) -> list:
    """What makes an image's vectors of its features: the projection, and that of late interaction if there is one."""
    return [model.visual.projection, *([model.visual.token_proj] if has_tokens(model) else [])]


def fingerprint(model: MiniClip, tower: Tower, about: dict) -> str:
    """sha256 of a tower's weights, without its projections, and of everything else that its features depend on."""
    if isinstance(model, InferenceClip) and not model.weights_as_loaded:
        raise InputError("a feature cache needs the weights as they were loaded: load the model without a precision")
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name, tensor in sorted(tower.state_dict().items()):
        if not name.startswith((f"{tower.projection_name}.", "token_proj.")):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
