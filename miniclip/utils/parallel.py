"""Reading ahead with threads, and records shared between worker processes."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from miniclip.utils.image_files import ImageFile
from miniclip.utils.machine import CORES


def read_ahead(function: Callable, items: Iterable, num_workers: int | None, ahead: int) -> Iterator:
    """Yields `map(function, items)`, up to `ahead` items early, by threads (0: none; None: one a core, at most 16)."""
    num_workers = min(16, CORES) if num_workers is None else num_workers
    if not num_workers or (hasattr(items, "__len__") and len(items) == 1):
        yield from map(function, items)
        return
    pool, queue = ThreadPoolExecutor(num_workers), deque()
    try:
        for item in items:
            queue.append(pool.submit(function, item))
            if len(queue) > ahead:
                yield queue.popleft().result()
        while queue:
            yield queue.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def as_table(records: Sequence[dict]) -> Sequence[dict]:
    """Returns a list of records as an Arrow table, outside Python's heap, which worker processes share instead of
    copying. Other sequences, and lists with an ImageFile, are returned as they are."""
    import datasets  # slow to import

    if not isinstance(records, list) or any(isinstance(record["image"], ImageFile) for record in records):
        return records
    return datasets.Dataset.from_list(records)
