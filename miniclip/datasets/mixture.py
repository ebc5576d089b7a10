"""Mixtures of several sources, and the order of an epoch of them."""

from collections.abc import Iterator, Sequence

import numpy as np

from miniclip.utils.errors import InputError
from miniclip.utils.parallel import as_table


class Mixture(Sequence):
    """Several sources, one after the other, and what an epoch of them is, drawn from (seed, epoch).

    Without `factors` and `num_samples`: every sample once. With `factors` f, one for each source: every sample floor(f)
    times, and a share f - floor(f) of the source's samples once more. With `num_samples` N: N draws with replacement,
    of a source in proportion to its factor times its size, then of any of its samples, as OpenCLIP's factors do."""

    def __init__(self, sources: list[Sequence[dict]], factors: list[float] | None = None, num_samples=None):
        if num_samples is not None and num_samples < 1:
            raise InputError(f"train_num_samples {num_samples}: expected at least 1")
        self.sources, self.sizes = [as_table(source) for source in sources], [len(source) for source in sources]
        self.ends, self.num_samples, self.plain = np.cumsum(self.sizes), num_samples, not (factors or num_samples)
        self.factors = factors or [1.0] * len(sources)
        # For each source: how often all of it comes in an epoch, and how many of its samples once more.
        self.copies = [(int(factor), round(factor % 1 * size)) for factor, size in zip(self.factors, self.sizes)]

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, index: int) -> dict:
        index = range(len(self))[index]  # IndexError beyond the end, where iteration stops
        source = int(np.searchsorted(self.ends, index, side="right"))
        return self.sources[source][int(index - self.ends[source] + self.sizes[source])]

    def sampler(self, seed: int, epoch) -> "MixtureSampler | None":
        """Returns the sampler of an epoch, a tensor that changes; None where the Trainer's shuffle will do."""
        return None if self.plain else MixtureSampler(self, seed, epoch)

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """Returns the indices of an epoch, in order. A repeated one has len(self) added, so that it is drawn anew."""
        rng, n, sizes = np.random.default_rng([seed, epoch]), len(self), np.array(self.sizes)
        starts = self.ends - sizes
        if self.num_samples is not None:
            weights = np.array(self.factors) * sizes
            source = rng.choice(len(weights), self.num_samples, p=weights / weights.sum())
            index = starts[source] + (rng.random(self.num_samples) * sizes[source]).astype(np.int64)
            return index + n * np.arange(self.num_samples)
        parts = []
        for start, size, (whole, extra) in zip(starts, sizes, self.copies):
            parts += [start + np.arange(size) + n * copy for copy in range(whole)]
            parts.append(start + rng.permutation(size)[:extra] + n * whole)
        return rng.permutation(np.concatenate(parts))


class MixtureSampler:
    """The order of a mixture, as a sampler for torch's DataLoader."""

    def __init__(self, mixture: Mixture, seed: int, epoch):
        self.mixture, self.seed, self.epoch = mixture, seed, epoch

    def __len__(self) -> int:
        copies = zip(self.mixture.sizes, self.mixture.copies)
        return self.mixture.num_samples or sum(whole * size + extra for size, (whole, extra) in copies)

    def __iter__(self) -> Iterator[int]:
        return iter(self.mixture.order(self.seed, int(self.epoch)).tolist())


def parse_factors(text: str | None, n: int) -> list[float] | None:
    """Parses the upsampling factors of n sources, in OpenCLIP's form: "1::2.5"."""
    if text is None:
        return None
    try:
        factors = [float(part) for part in text.split("::")]
    except ValueError:
        factors = []
    if len(factors) != n or not any(factors) or not all(0 <= factor < float("inf") for factor in factors):
        raise InputError(f"train_data_upsampling_factors {text!r}: expected {n} numbers from 0, separated by ::")
    return factors
