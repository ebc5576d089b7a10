"""The training wrappers around a tower's forward pass: pixel normalisation, GradCache and precomputed features."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from miniclip.inference.fast import fast_wrappers
from miniclip.model import MiniClip, Tower


def wrap_towers(model: MiniClip, normalize: Callable | None = None, chunk_size: int = 0, fast: bool = True) -> MiniClip:
    """Sets the `wrappers` of both towers, and returns the model. From the inside out: the fast path (`fast`), the
    normalisation of pixels by `normalize`, chunks of `chunk_size` inputs, and precomputed features."""
    for tower in (model.visual, model.text):
        pixels = (partial(normalize_pixels, normalize),) if normalize and tower is model.visual else ()
        chunks = (partial(in_chunks, chunk_size),) if chunk_size else ()
        tower.wrappers = (*(fast_wrappers(tower) if fast else ()), *pixels, *chunks, precomputed)
    return model


def normalize_pixels(normalize: Callable, tower: Tower, features: Callable, inputs: Tensor) -> Tensor:
    """Normalises pixel levels (B, 3, S, S) uint8 on the model's device: a quarter of the bytes to send."""
    return features(normalize(inputs) if inputs.dtype == torch.uint8 else inputs)


def in_chunks(size: int, tower: Tower, features: Callable, inputs: Tensor) -> Tensor:
    """GradCache (Gao et al., arXiv 2101.06983): the whole batch is contrasted with the memory of a chunk.

    The forward pass keeps only a chunk's features. In the backward pass `checkpoint` runs the tower again on one chunk
    after another, with the same random numbers: one more forward pass, and the gradients of the whole batch. All of it
    lies within one forward pass, so DistributedDataParallel and autocast work as usual.
    """
    if len(inputs) <= size:
        return features(inputs)
    return torch.cat([checkpoint(features, part, use_reentrant=False) for part in inputs.split(size)])


def precomputed(tower: Tower, features: Callable, inputs: Tensor) -> Tensor:
    """Passes the features (B, W) of a frozen tower through to its projection."""
    computed = inputs.ndim == 2 and inputs.is_floating_point() and inputs.shape[1] == tower.width
    return inputs if computed else features(inputs)
