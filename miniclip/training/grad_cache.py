"""Training wrappers of a tower's forward pass: captions by length, pixels normalised, GradCache, stored features."""

from collections.abc import Callable
from functools import partial

import torch
from accelerate.data_loader import DataLoaderShard
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from miniclip.inference.fast import fast_wrappers, plain_reason
from miniclip.model import MiniClip, TextTransformer, Tower
from miniclip.towers.huggingface import HfTower
from miniclip.utils.machine import return_freed_memory


def wrap_towers(model: MiniClip, normalize: Callable | None = None, chunk_size: int = 0, fast: bool = True) -> MiniClip:
    """Sets the `wrappers` of both towers, and returns the model. From the inside out: the fast path, or for encoders of
    captions `by_length` (`fast`), pixels normalised by `normalize`, chunks of `chunk_size`, precomputed features."""
    for tower in (model.visual, model.text):
        pixels = (partial(normalize_pixels, normalize),) if normalize and tower is model.visual else ()
        divide = tokens_in_chunks if fast and type(tower) is TextTransformer else in_chunks
        chunks = (partial(divide, chunk_size),) if chunk_size else ()
        fastest = (by_length,) if isinstance(tower, HfTower) and tower.kind == "text" else fast_wrappers(tower)
        tower.wrappers = (*(fastest if fast else ()), *pixels, *chunks, precomputed)
    return model


def by_length(tower: HfTower, features: Callable, inputs: Tensor) -> Tensor:
    """Token ids (B, L) go through the tower 32 at a time, the shortest first, with as much padding as these need. On a
    GPU, which prefers large batches, all at once."""
    if len(inputs) <= 32 or inputs.device.type != "cpu" or torch.compiler.is_compiling():
        return features(inputs)
    lengths, order = tower.tokenizer.lengths(inputs).sort()
    parts = zip(lengths.split(32), inputs[order].split(32))
    return torch.cat([features(ids[:, : longest[-1]]) for longest, ids in parts])[order.argsort()]


def normalize_pixels(normalize: Callable, tower: Tower, features: Callable, inputs: Tensor) -> Tensor:
    """Normalises pixel levels (B, 3, S, S) uint8 on the model's device: a quarter of the bytes to send."""
    return features(normalize(inputs) if inputs.dtype == torch.uint8 else inputs)


def in_chunks(size: int, tower: Tower, features: Callable, inputs: Tensor) -> Tensor:
    """GradCache (Gao et al., arXiv 2101.06983): the whole batch is contrasted with the memory of a chunk.

    The forward pass keeps only a chunk's features. In the backward pass `checkpoint` runs the tower again on one chunk
    after another, with the same random numbers: one more forward pass, and the gradients of the whole batch. All of it
    lies within one forward pass, so DistributedDataParallel and autocast work as usual."""
    if len(inputs) <= size:
        return features(inputs)

    def tidily(part: Tensor) -> Tensor:  # what the other tower's chunks have left are gaps, which would not fit these
        return_freed_memory()
        return features(part)

    parts = inputs.split(size)
    on_cpu = inputs.device.type == "cpu" and not torch.compiler.is_compiling()
    ways = [features] * (len(parts) - 1) + [tidily if on_cpu else features]  # the backward pass begins with the last
    return torch.cat([checkpoint(way, part, use_reentrant=False) for way, part in zip(ways, parts)])


def tokens_in_chunks(size: int, tower: TextTransformer, features: Callable, inputs: Tensor) -> Tensor:
    """`in_chunks` of token ids (B, L), with an embedding of those tokens alone that occur in the batch: the gradient of
    each chunk would be a table of all 49,408. Their order stays, so the end token has the highest number as before."""
    if len(inputs) > size and not torch.compiler.is_compiling() and plain_reason(tower) is None:
        ids, inputs = inputs.unique(return_inverse=True)
        features = partial(with_table, tower.token_embedding, tower.token_embedding.weight[ids], features)
    return in_chunks(size, tower, features, inputs)


def with_table(embedding: nn.Embedding, table: Tensor, features: Callable, inputs: Tensor) -> Tensor:
    """Returns `features(inputs)`, with the rows of a `table` (N, W) as the embeddings of tokens 0 to N - 1."""
    weight = embedding._parameters.pop("weight")
    embedding.weight = table
    try:
        return features(inputs)
    finally:
        del embedding.weight
        embedding.weight = weight


class OneBatch(DataLoaderShard):
    """accelerate's loader, of one process on the CPU, that fetches no batch ahead. That is how accelerate sees which is
    the last; the length says it too. An epoch that a resumed run begins in its middle has accelerate's own."""

    def __init__(self, loader: DataLoaderShard):
        vars(self).update(vars(loader))

    def __iter__(self):
        self.begin()
        self.set_epoch(self.iteration)
        for number, batch in enumerate(self.base_dataloader, 1):
            self.end_of_dataloader = number == len(self.base_dataloader)
            yield batch
        self.iteration += 1
        self.end()


def precomputed(tower: Tower, features: Callable, inputs: Tensor) -> Tensor:
    """Passes the features (B, W) of a frozen tower through to its projection."""
    computed = inputs.ndim == 2 and inputs.is_floating_point() and inputs.shape[1] == tower.width
    return inputs if computed else features(inputs)
