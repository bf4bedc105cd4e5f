"""Buffers of keys and values that outlive their caches, in few sizes, for recorded forwards."""

from __future__ import annotations

import torch
from torch import Tensor

MOST_UNUSED = 3
"""Largest memory of a pool's unused buffers, as a multiple of the largest buffer's."""


class BufferPool:
    """Buffers that outlive the caches that borrow them, so that a recorded forward can serve many caches.

    Unused buffers take at most `MOST_UNUSED` times the memory of the largest one. So all smaller sizes stay that a
    batch has grown through, as rows joined it, those of a drafter beside them, and the next rows find what is recorded.
    """

    def __init__(self) -> None:
        self._free: list[Tensor] = []
        self._largest = 0

    def take(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Return a buffer of this shape, with the dtype and device of `like`; it holds numbers, never NaN."""
        for i in reversed(range(len(self._free))):  # the one that was used last, for which most is recorded
            buffer = self._free[i]
            if buffer.shape == shape and buffer.dtype == like.dtype and buffer.device == like.device:
                return self._free.pop(i)
        try:
            return like.new_zeros(shape)
        except torch.OutOfMemoryError:
            self._free.clear()
            return like.new_zeros(shape)

    def give_back(self, buffers: list[Tensor]) -> None:
        """Take buffers back that no cache uses any more; those that were given back first go where room is short."""
        self._free += buffers
        self._largest = max([self._largest, *(buffer.nbytes for buffer in buffers)])
        while sum(buffer.nbytes for buffer in self._free) > MOST_UNUSED * self._largest:
            self._free.pop(0)


def rounded_rows(rows: int) -> int:
    """Round up to a power of two."""
    return 1 << (rows - 1).bit_length() if rows else 0


def rounded_slots(slots: int) -> int:
    """Round up to a power of two or one and a half of one, at least 512."""
    whole = max(512, 1 << (slots - 1).bit_length())
    return whole * 3 // 4 if whole > 512 and slots <= whole * 3 // 4 else whole
