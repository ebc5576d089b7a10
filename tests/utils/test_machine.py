"""What the C library does with freed memory."""

import subprocess
import sys

import pytest

BLOCKS = """
import torch
from pathlib import Path
from miniclip.utils.machine import keep_freed_memory, return_freed_memory

def held():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 >> 20

torch.ones(8 << 20)  # 32 MiB: from now on glibc takes such blocks from its heap
{first}
before, blocks = held(), [torch.ones(1 << 20) for _ in range(64)]  # 4 MiB each
del blocks[::2]
print(held() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
@pytest.mark.parametrize("first, least, most", [
    ("keep_freed_memory()", 250, 270),
    ("keep_freed_memory(); return_freed_memory(always=True)", 120, 140),  # half of the blocks
])  # fmt: skip
def test_freed_memory_is_kept_or_returned(first, least, most):
    done = subprocess.run([sys.executable, "-c", BLOCKS.format(first=first)], stdout=subprocess.PIPE, check=True)
    assert least <= int(done.stdout) <= most
