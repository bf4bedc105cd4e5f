"""Memory on the CPU that lies in huge pages, where the system grants them to who asks.

A pass over a model reads all its weights. In pages of 4 KB every page is looked up and no prefetch goes beyond it; in
huge pages a token of a 135M model took 5% less time (docs/measurements/limit.md). Many distributions grant them on
demand only (`madvise` in /sys/kernel/mm/transparent_hugepage/enabled). Elsewhere this is ordinary memory.
"""

from __future__ import annotations

import contextlib
import mmap
import threading
from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

LINE = 64
"""Bytes of a line of a CPU's cache, at which kernels like a matrix to begin."""
HUGE = 2 << 20
"""Bytes of a huge page."""
CHUNK = 64 << 20
"""Bytes asked for at once: matrices of a small model are smaller than a huge page, so that many share one."""


class Arena:
    """Places for tensors that live as long as their model, side by side in large pieces of memory.

    A piece is freed once no tensor in it is used any more. What no tensor has taken of it was never touched.
    """

    def __init__(self) -> None:
        self._piece, self._taken = torch.empty(0, dtype=torch.uint8), 0
        self._lock = threading.Lock()

    def settled(self, tensor: Tensor) -> Tensor:
        """Return a contiguous copy of a tensor of the CPU in huge pages."""
        size = tensor.nbytes
        with self._lock:
            if self._taken + size > len(self._piece):
                self._piece, self._taken = pages(max(CHUNK, size)), 0
            place = self._piece[self._taken : self._taken + size]
            self._taken += -(-size // LINE) * LINE
        return place.view(tensor.dtype).view(tensor.shape).copy_(tensor)


ARENA = Arena()
"""Where weights lie that our kernels read."""


def pages(size: int) -> Tensor:
    """Return `(size,)` bytes, all zero; large memory the system provides where and when it is used."""
    if not hasattr(mmap, "MADV_HUGEPAGE") or size < HUGE:
        return torch.zeros(size, dtype=torch.uint8)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # of a system without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


def zeros(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return zeros on the CPU, which the system makes where they are used; `torch.zeros` writes all at once."""
    return pages(prod(shape) * dtype.itemsize).view(dtype).view(*shape)
