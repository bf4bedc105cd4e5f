"""The allocator keeps freed memory where it can be told to."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import resource, torch
from outdraft.training.trainer import keep_freed_memory
if {keep}:
    assert keep_freed_memory()
torch.ones(16_000_000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    torch.ones(16_000_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mallopt is glibc's")
def test_large_tensors_made_again_map_few_new_pages() -> None:
    faults = {
        keep: int(
            subprocess.run([sys.executable, "-c", PROGRAM.format(keep=keep)], check=True, capture_output=True).stdout
        )
        for keep in (False, True)
    }
    if faults[False] < 100:
        pytest.skip("this allocator keeps freed memory by itself")
    assert faults[True] < faults[False] / 2
