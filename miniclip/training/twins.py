"""Can the same picture or sentence be kept from meeting itself in a batch?

Where it cannot, the loss knows what to do (`loss.clip_loss`).
"""

import logging
from collections import Counter, deque
from collections.abc import Iterator

from torch.utils.data import Sampler

from miniclip.data import CaptionDataset

logger = logging.getLogger(__name__)


class TwinFreeSampler(Sampler):
    """The rows of a CaptionDataset in random order, so that among each `batch_size` in a row no picture and no caption
    occurs twice.

    `batch_size` is that of all processes together, whose batches are cut from the order one after another. Where there
    is no way, as for a picture with more rows than there are batches, twins stay together; how many is logged. The
    order depends on the dataset's seed and epoch alone, as do the captions that are drawn. With `order`, a sampler, it
    is that one's order, as near as can be.
    """

    def __init__(self, dataset: CaptionDataset, batch_size: int, order: Sampler | None = None):
        self.dataset, self.batch_size, self.order = dataset, batch_size, order

    def __len__(self) -> int:
        return len(self.order or self.dataset)

    def __iter__(self) -> Iterator[int]:
        order = list(self.order or range(len(self.dataset)))
        if self.order is None:
            self.dataset.rng("order").shuffle(order)
        rows = [(index, tuple(enumerate(self.dataset.pair_ids(index)))) for index in order]
        batches = part_twins(rows, self.batch_size)
        left = sum(n - 1 for batch in batches for n in _names(batch).values())
        if left:
            logger.warning("%d twins could not be kept apart: there is too little else to put between them", left)
        return iter([index for batch in batches for index, _ in batch])


def twin_free(dataset: CaptionDataset, usual, args) -> TwinFreeSampler:
    """The sampler for a run with these ClipTrainingArguments; `usual(args)` is the one that there would be, or None."""
    return TwinFreeSampler(dataset, args.train_batch_size * args.world_size, usual(args))


def part_twins(rows: list[tuple], size: int) -> list[list[tuple]]:
    """Cuts rows, (index, names) each, into batches of `size` without a name twice, as far as a simple search finds a
    way. Every row is in one batch; the last one may be smaller.

    A row that would be a twin waits for the next batch without one. At the end, when nothing else comes, those that
    wait stand together; then each of them changes places with a row of another batch where both are without twins.
    """
    coming, waiting, batches = deque(rows), deque(), []
    while coming or waiting:
        batch, seen, passed = [], set(), deque()
        looked = 0  # at those that wait: not at all of them for each batch, which of many takes long
        while len(batch) < size and (waiting or coming):
            looked += bool(waiting)
            row = (waiting if waiting and looked <= 4 * size or not coming else coming).popleft()
            if seen.isdisjoint(row[1]):
                batch.append(row)
                seen.update(row[1])
            else:
                passed.append(row)
        waiting = passed + waiting
        while len(batch) < size and waiting:
            batch.append(waiting.popleft())
        batches.append(batch)
    names = [_names(batch) for batch in batches]
    often = _names(rows)
    for here, batch in enumerate(batches):
        for place in range(len(batch)):
            if max(names[here][name] for name in batch[place][1]) > 1:
                if all(often[name] <= len(batches) for name in batch[place][1]):  # else there is no place for it
                    _change_places(batches, names, here, place)
    return batches


def _names(batch: list[tuple]) -> Counter:
    return Counter(name for _, row in batch for name in row)


def _change_places(batches: list[list[tuple]], names: list[Counter], here: int, place: int):
    row = batches[here][place]
    for there, batch in enumerate(batches):
        if there == here or any(names[there][name] for name in row[1]):
            continue
        for other, candidate in enumerate(batch):
            if not any(names[here][name] - (name in row[1]) for name in candidate[1]):
                batches[here][place], batch[other] = candidate, row
                names[here], names[there] = _names(batches[here]), _names(batch)
                return
