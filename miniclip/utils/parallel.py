"""TODO docstring."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor


def read_ahead(function: Callable, items: Iterable, num_workers: int | None, ahead: int) -> Iterator:
    """`map(function, items)`, computed by threads up to `ahead` items before they are asked for."""
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
    """A list of records as an Arrow table: there they lie outside Python's heap, and worker processes share them
    instead of copying. Other sequences as they are."""
    import datasets  # slow to import

    return datasets.Dataset.from_list(records) if isinstance(records, list) else records
