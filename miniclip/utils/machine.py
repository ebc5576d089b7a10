"""The machine: CPU cores and name, and what the C library does with freed memory."""

import ctypes
import os
import platform
from contextlib import suppress
from functools import cache
from pathlib import Path

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@cache
def processor() -> str:
    """Returns the name of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def keep_freed_memory():
    """Makes glibc keep large freed blocks of memory from now on; does nothing elsewhere. By default the system takes
    them back and clears their pages at the next step: a tenth to a third of a training step on the CPU."""
    _glibc("mallopt", -3, 1 << 30)  # M_MMAP_THRESHOLD: smaller blocks come from the heap,
    _glibc("mallopt", -1, (1 << 31) - 1)  # M_TRIM_THRESHOLD: which stays as large as it was


def return_freed_memory():
    """Returns all freed memory to the system, once."""
    _glibc("malloc_trim", 0)


def _glibc(name: str, *values: int):
    with suppress(AttributeError, OSError, TypeError):
        getattr(ctypes.CDLL(None), name)(*values)
