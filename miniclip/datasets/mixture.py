"""TODO docstring."""

from collections.abc import Sequence

import numpy as np

from miniclip.utils.errors import InputError
from miniclip.utils.parallel import as_table

# --- Several sources, and what an epoch is.


class Mixture(Sequence):
    """Several sources one behind the other, and what an epoch of them is.

    - Without `factors` and `num_samples`: every sample once, shuffled.
    - `factors` f, one for each source: every sample floor(f) times, and a share f - floor(f) of the source's samples,
      drawn anew each epoch, once more; all shuffled together. 0 leaves a source out, 0.25 takes a quarter of it.
    - `num_samples` N: N draws with replacement. A draw takes a source with a probability in proportion to its factor
      times its size (its size without factors), then any of its samples. This is what OpenCLIP's factors do.

    All draws come from (seed, epoch). A sample that comes several times in an epoch has another caption and crop drawn
    each time.
    """

    def __init__(
        self, sources: list[Sequence[dict]], factors: list[float] | None = None, num_samples: int | None = None
    ):
        self.sources, self.factors, self.num_samples = [as_table(source) for source in sources], factors, num_samples
        self.sizes = [len(source) for source in sources]
        self.ends = np.cumsum(self.sizes)
        if num_samples is not None and num_samples < 1:
            raise InputError(f"train_num_samples {num_samples}: expected at least 1")

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, index: int) -> dict:
        index = range(len(self))[index]  # IndexError beyond the end, where iteration stops
        source = int(np.searchsorted(self.ends, index, side="right"))
        return self.sources[source][int(index - self.ends[source] + self.sizes[source])]

    def sampler(self, seed: int, epoch):
        """A torch Sampler of an epoch, or None where the Trainer's shuffle does. `epoch` is a tensor that changes."""
        if self.factors is None and self.num_samples is None:
            return None
        from torch.utils.data import Sampler

        mixture = self

        class MixtureSampler(Sampler):
            def __len__(self) -> int:
                return mixture.num_samples or sum(whole * size + extra for whole, extra, size in mixture.copies())

            def __iter__(self):
                return iter(mixture.order(seed, int(epoch)).tolist())

        return MixtureSampler()

    def copies(self) -> list[tuple[int, int, int]]:
        """For each source how often all of it comes in an epoch, how many of it once more, and its size."""
        factors = self.factors or [1.0] * len(self.sizes)
        return [(int(f), round((f - int(f)) * size), size) for f, size in zip(factors, self.sizes)]

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """The indices of an epoch, in order. What comes again has len(self) added, which draws it anew."""
        rng, n = np.random.default_rng([seed, epoch]), len(self)
        starts = self.ends - self.sizes
        if self.num_samples is not None:
            weights = np.array(self.factors or [1.0] * len(self.sizes)) * self.sizes
            source = rng.choice(len(weights), self.num_samples, p=weights / weights.sum())
            index = starts[source] + (rng.random(self.num_samples) * np.array(self.sizes)[source]).astype(np.int64)
            return index + n * np.arange(self.num_samples)
        parts = []
        for start, (whole, extra, size) in zip(starts, self.copies()):
            parts += [start + np.arange(size) + n * copy for copy in range(whole)]
            parts.append(start + rng.permutation(size)[:extra] + n * whole)
        return rng.permutation(np.concatenate(parts))


def parse_factors(text: str | None, n: int) -> list[float] | None:
    """The upsampling factors of n sources, in OpenCLIP's form: "1::2.5"."""
    if text is None:
        return None
    try:
        factors = [float(part) for part in str(text).split("::")]
    except ValueError:
        factors = []
    if len(factors) != n or not all(0 <= factor < float("inf") for factor in factors) or not any(factors):
        raise InputError(f"train_data_upsampling_factors {text!r}: expected {n} numbers from 0, with :: between them")
    return factors


class Part(Sequence):
    """Some records of a source."""

    def __init__(self, source: Sequence[dict], rows: np.ndarray):
        self.source, self.rows = source, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        return self.source[self.rows[index].item()]
