"""TODO docstring."""

import ctypes
import os
import platform
from contextlib import suppress
from functools import cache
from pathlib import Path

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@cache
def processor() -> str:
    """The name of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def keep_freed_memory():
    """Has the C library keep large blocks of memory that are freed, for the whole process from now on. Otherwise they
    go back to the system, which clears them page by page when the next step wants them again: a tenth to a third of a
    training step on the CPU, and two thirds of EfficientNet-Lite0's time. For Linux's glibc; elsewhere nothing."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD: smaller blocks come from the heap,
    mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD: which stays as large as it was


def return_freed_memory():
    """Gives all that was kept back to the system, once."""
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
