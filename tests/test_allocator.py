"""The allocator keeps freed memory where it can be told to."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import resource, torch

def new_pages():
    torch.ones(16_000_000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(16_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

by_itself = new_pages()
from outdraft.training.trainer import keep_freed_memory
assert keep_freed_memory()
print(by_itself, new_pages())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mallopt is glibc's")
def test_large_tensors_made_again_map_few_new_pages() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], check=True, capture_output=True, text=True)
    by_itself, told = map(int, done.stdout.split())
    if by_itself < 100:
        pytest.skip("this allocator keeps freed memory by itself")
    assert told < by_itself / 2
