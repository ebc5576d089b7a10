"""Reading ahead with threads, and records shared between worker processes."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from miniclip.utils.image_files import ImageFile


def read_ahead(function: Callable, items: Iterable, num_workers: int | None, ahead: int) -> Iterator:
    """Yields `map(function, items)`, computed by threads up to `ahead` items in advance.

    `num_workers` is the number of threads (0: none; by default one per core, at most 16)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    num_workers = min(16, cores) if num_workers is None else num_workers
    if not num_workers or (hasattr(items, "__len__") and len(items) == 1):
        yield from map(function, items)
        return
    with ThreadPoolExecutor(num_workers) as pool:
        queue = deque()
        try:
            for item in items:
                queue.append(pool.submit(function, item))
                if len(queue) > ahead:
                    yield queue.popleft().result()
            while queue:
                yield queue.popleft().result()
        finally:
            for future in queue:
                future.cancel()


def as_table(records: Sequence[dict]) -> Sequence[dict]:
    """Returns a list of records as an Arrow table, outside Python's heap, which worker processes share instead of
    copying. Other sequences, and lists with an ImageFile, are returned as they are."""
    import datasets  # slow to import

    if not isinstance(records, list) or any(isinstance(record["image"], ImageFile) for record in records):
        return records
    return datasets.Dataset.from_list(records)
