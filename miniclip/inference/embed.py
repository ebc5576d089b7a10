"""Embeddings of images and texts, and of their patches and words: batches, threads that read ahead, feature caches."""

import copy
import os
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from miniclip.inference.fast import InferenceClip, inference_copy
from miniclip.inference.feature_cache import FeatureCache, file_key, text_key
from miniclip.model import MiniClip, Tower
from miniclip.tokenizer import Tokenizer
from miniclip.towers.tokens import patch_vectors, token_features, word_vectors
from miniclip.transforms import Preprocess
from miniclip.utils.errors import InputError
from miniclip.utils.image_files import ImageError, ImageFile, open_image
from miniclip.utils.machine import keep_freed_memory, return_freed_memory
from miniclip.utils.parallel import read_ahead

MANY = 64  # items that are worth laying out weights for oneDNN
SOME = 8  # images that are worth fusing BatchNorms
WORDS = 32  # positions of a text that count, start and end included: those after them do not
PIECE = 512  # items of whose positions features are in memory at once


def embed_texts(
    model: MiniClip, tokenizer: Tokenizer, texts: Iterable[str], batch_size: int = 64, progress: bool = False,
    cache: FeatureCache | None = None, project: bool = True,
) -> np.ndarray:  # fmt: skip
    """Embeds n texts: (n, E) float32, of unit length, in their order. Without `project`: their features (n, W).

    Texts of similar length share a batch as long as its longest text: with causal attention padding has no influence.
    Those in the `cache` are not encoded. Raises TypeError with the position of anything that is not a string."""
    texts = [texts] if isinstance(texts, str) else list(texts)
    fast = for_inference(model, len(texts))
    device = model.logit_scale.device
    features = np.empty((len(texts), model.text.width), np.float32)
    ids = tokenizer(texts, trim=True)
    lengths = tokenizer.lengths(ids)
    keys = [] if cache is None else [text_key(text) for text in texts]
    known = [row for row, key in enumerate(keys) if key in cache]
    for row in known:
        features[row] = cache[keys[row]]
    order = lengths.argsort(stable=True).numpy()
    order = order[~np.isin(order, known)]
    for start in tqdm(range(0, len(order), batch_size), desc="texts", disable=not progress, leave=False):
        rows = order[start : start + batch_size]
        features[rows] = fast.features(fast.text, ids[rows, : lengths[rows].max()].to(device)).cpu().numpy()
        if cache is not None:
            cache.update((keys[row], features[row]) for row in rows)
    if cache is not None:
        cache.save()
    return finish(fast, fast.text, features, project)


def embed_images(
    model: MiniClip, preprocess: Preprocess, paths: Iterable, batch_size: int = 32, num_workers: int | None = None,
    progress: bool = False, cache: FeatureCache | None = None, project: bool = True,
    faults: dict[int, str] | None = None,
) -> np.ndarray:  # fmt: skip
    """Embeds n images, by path, as an ImageFile or opened by Pillow: (n, E) float32, of unit length, in their order.
    Without `project`: their features (n, W).

    `num_workers` threads read files while others are encoded (None: as many as suit the machine). Images in the `cache`
    are neither decoded nor encoded. Raises an ImageError that names every unreadable file; with `faults`, a dict, their
    row numbers and errors go there instead, and these rows are NaN."""
    paths = [paths] if isinstance(paths, (str, Path, ImageFile, Image.Image)) else list(paths)
    fast = for_inference(model, len(paths), fuse=len(paths) >= SOME)
    device = model.logit_scale.device
    features = np.empty((len(paths), model.visual.width), np.float32)
    pending = []  # (row, key, levels) of the next batch
    stop = faults is None
    faults = {} if stop else faults

    def read(path: str | Path | ImageFile | Image.Image):
        """The file's key, and its levels, features or error."""
        if isinstance(path, Image.Image):
            return None, preprocess.levels(path)
        try:
            hashed = cache is not None and (isinstance(path, ImageFile) or os.path.isfile(path))
            key = file_key(path) if hashed else None
            if hashed and key in cache:
                return key, cache[key]
            return key, preprocess.levels(open_image(path, preprocess.scale, preprocess.stored))
        except ImageError as error:
            return None, error
        except OSError as error:  # from its key
            return None, ImageError(f"{path}: cannot be opened ({error.strerror})")

    files = read_ahead(read, paths, num_workers, 2 * batch_size)
    for row, (key, found) in enumerate(tqdm(files, "images", len(paths), disable=not progress, leave=False)):
        if isinstance(found, ImageError):
            faults[row] = str(found)
            features[row] = np.nan
        elif isinstance(found, np.ndarray):
            features[row] = found
        elif not (stop and faults):  # after an error files are read on, to name all the bad ones, but not encoded
            pending.append((row, key, found))
        if len(pending) == batch_size or (pending and row == len(paths) - 1):
            rows, keys, levels = zip(*pending)
            pending.clear()
            pixel_values = preprocess.normalize(torch.stack(levels).to(device, non_blocking=True))
            features[list(rows)] = fast.features(fast.visual, pixel_values).cpu().numpy()
            if cache is not None:
                cache.update((key, features[row]) for key, row in zip(keys, rows) if key)
    if cache is not None:
        cache.save()
    if len(paths) >= MANY and device.type == "cpu":
        return_freed_memory()
    if stop and faults:
        raise ImageError("\n".join(faults.values()))
    return finish(fast, fast.visual, features, project, faults)


def finish(fast: InferenceClip, tower: Tower, found: np.ndarray, project: bool, faults=()) -> np.ndarray:
    """The embeddings (n, E) of features (n, W), or these. Raises InputError for NaN and infinity outside `faults`."""
    x = fast.project(tower, torch.from_numpy(found).to(fast.logit_scale.device)).cpu().numpy() if project else found
    if n := len(set(np.flatnonzero(~np.isfinite(x.sum(axis=1))).tolist()).difference(faults)):
        what = f"{type(tower).__name__} computes NaN or infinity for {n} of {len(x)} inputs in {fast.precision}"
        raise InputError(f"{what}: its weights are damaged, too large for this precision, or diverged")
    return x


def for_inference(model: MiniClip, n: int, fuse: bool = False) -> InferenceClip:
    """An inference copy to embed n items with. If they are many, weights are laid out for oneDNN, and on a CPU freed
    memory is kept for the next batch: returning large activations to the system costs more than their convolutions."""
    if n >= MANY and model.logit_scale.device.type == "cpu":
        keep_freed_memory()
    return model if isinstance(model, InferenceClip) else inference_copy(model, pack=n >= MANY, fuse=fuse)


def on_all_processes(items: list, embed: Callable[[list], np.ndarray]) -> np.ndarray:
    """`embed(items)` on every process, of which process i of n computes items i, i + n, i + 2n, ..."""
    if (n := dist.get_world_size() if dist.is_initialized() else 1) == 1:
        return embed(items)
    shares: list = [None] * n
    dist.all_gather_object(shares, embed(items[dist.get_rank() :: n]))
    embeds = np.empty((len(items), shares[0].shape[1]), np.float32)
    for rank, share in enumerate(shares):
        embeds[rank::n] = share
    return embeds


class _Positions(Tower):
    """A tower whose features are those of its first `length` positions, one after the other: (B, length W)."""

    def __init__(self, tower: Tower, length: int):
        super().__init__()
        self.inner, self.length, self.width, self.tokenizer = tower, length, length * tower.width, tower.tokenizer

    def features(self, inputs: Tensor) -> Tensor:
        x = token_features(self.inner, inputs)[:, : self.length]
        return F.pad(x, (0, 0, 0, self.length - x.shape[1])).flatten(1)


def positions(model: MiniClip, name: str) -> InferenceClip:
    """An inference copy of a model in which the features of a tower, "visual" or "text", are those of its positions."""
    twin = copy.copy(inference_copy(model))
    length = WORDS
    if name == "visual":
        with twin.inference():
            image = torch.zeros(1, 3, *(twin.visual.image_size,) * 2, dtype=twin.dtype, device=twin.logit_scale.device)
            length = token_features(twin.visual, image).shape[1]
    twin._modules = {**twin._modules, name: _Positions(twin.get_submodule(name), length)}
    return twin


def in_pieces(
    items: Sequence, embed: Callable, finish: Callable[[Tensor], Tensor], faults: dict[int, str] | None = None
) -> np.ndarray:
    """`finish(embed(items))` in pieces: all features would not fit the memory. `faults`: that of `embed_images`."""
    found = []
    for start in range(0, len(items), PIECE):
        wrong = {}
        features = embed(items[start : start + PIECE], **{} if faults is None else {"faults": wrong})
        found.append(finish(torch.from_numpy(features)).cpu().numpy())
        for row, reason in wrong.items():
            faults[start + row] = reason
    return np.concatenate(found)


@torch.inference_mode()
def embed_patches(model: MiniClip, preprocess, paths: Sequence, faults: dict | None = None, **how) -> np.ndarray:
    """The vectors of the patches of n images, (n, P, D) float16, row by row. `faults` and `how`: of `embed_images`."""
    tower, device = model.visual, model.logit_scale.device
    embed = partial(embed_images, positions(model, "visual"), preprocess, project=False, **how)
    return in_pieces(
        paths, embed, lambda x: patch_vectors(tower, x.to(device).unflatten(1, (-1, tower.width))).half(), faults
    )


@torch.inference_mode()
def embed_words(model: MiniClip, tokenizer, texts: Sequence[str], **how) -> np.ndarray:
    """The vectors of the words of n texts, (n, WORDS, D) float32, zeros behind the end. `how`: of `embed_texts`."""
    embed = partial(embed_texts, positions(model, "text"), tokenizer, project=False, **how)
    tower, device = model.text, model.logit_scale.device
    return in_pieces(texts, embed, lambda x: word_vectors(tower, x.to(device).unflatten(1, (WORDS, -1))))
