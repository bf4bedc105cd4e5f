"""Catching up a drafter: runs decided tokens of rows of different lengths through its own network and cache, in
pieces."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from outdraft.core.tensors import causal, counting, integers
from outdraft.target.cache import SlotCache
from outdraft.target.runner import PREFILL_CHUNK

Forward = Callable[[slice, Tensor, Tensor, Tensor], tuple[Tensor, ...]]
"""(piece, positions, seen, slots) -> outputs, each `(rows, tokens of the piece, width)`."""


def take_in(
    cache: SlotCache, counts: Sequence[int], last_position: int, device: torch.device, forward: Forward
) -> list[Tensor]:
    """Run the first `counts` tokens of every row and commit them.

    Args:
        cache: the drafter's cache.
        counts: number of tokens of each row, at least one.
        last_position: largest position.
        device: device of the cache.
        forward: runs a piece of all rows, padding included, over reserved slots.

    Returns:
        `(rows, width)` of every output, at each row's last token.
    """
    row = counting(0, len(counts), device)
    last: list[Tensor] = []
    for start in range(0, max(counts), PREFILL_CHUNK):
        count = min(PREFILL_CHUNK, max(counts) - start)
        slots = cache.reserve(count, device)
        seen = causal(len(counts), count, device)
        outputs = forward(slice(start, start + count), slots.clamp(max=last_position), seen, slots)
        real = [max(0, min(count, total - start)) for total in counts]
        cache.commit([range(n) for n in real])
        newest = [output[row, integers([max(0, n - 1) for n in real], device)] for output in outputs]
        if last:  # rows that ended before this piece keep what they had
            going = torch.tensor([n > 0 for n in real], device=device)[:, None]
            newest = [new.where(going, old) for new, old in zip(newest, last, strict=True)]
        last = newest
    return last
