"""The tools of a drafter that has a cache: catching up with decided tokens, and slots and masks of a tree's levels.

`take_in` runs decided tokens through the drafter. `RunAhead` gives a level's slots and ancestor masks, as
`attention_mask` in `core/tree.py` takes them. `DraftMask` gives additive masks, each its parents' mask and the level's
own nodes, so nothing is built twice; there is none if every node sees every key, as in a chain of one row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from outdraft.core.tensors import causal, counting, integers, itself, sent
from outdraft.drafting.base import DraftState, Update
from outdraft.target.cache import SlotCache
from outdraft.target.runner import PREFILL_CHUNK

Forward = Callable[[slice, Tensor, Tensor, Tensor], Tensor]
"""(piece, positions, mask, slots) -> `(rows, tokens of the piece, width)`."""


def take_in(
    cache: SlotCache, counts: Sequence[int], last_position: int, device: torch.device, forward: Forward
) -> Tensor:
    """Run the first `counts` tokens of every row and commit them.

    Args:
        counts: number of tokens of each row, at least one.
        last_position: largest position.
        forward: runs a piece of all rows, padding included, over reserved slots.

    Returns:
        `(rows, width)` of the output, at each row's last token.
    """
    row, last = counting(0, len(counts), device), torch.empty(0)
    for start in range(0, max(counts), PREFILL_CHUNK):
        count = min(PREFILL_CHUNK, max(counts) - start)
        slots = cache.reserve(count, device)
        mask = causal(len(counts), count, device)
        output = forward(slice(start, start + count), slots.clamp(max=last_position), mask, slots)
        real = [max(0, min(count, total - start)) for total in counts]
        cache.commit([range(n) for n in real])
        newest = output[row, integers([max(0, n - 1) for n in real], device)]
        if start:  # rows that ended before this piece keep what they had
            newest = newest.where(torch.tensor([n > 0 for n in real], device=device)[:, None], last)
        last = newest
    return last


def pieces(update: Update, counts: Sequence[int]) -> Iterator[tuple[Tensor, Tensor, list[range]]]:
    """Yield tokens and taps of the first pairs of every row, some at a time, and which of them are no padding."""
    for start in range(0, max(counts), PREFILL_CHUNK):
        count = min(PREFILL_CHUNK, max(counts) - start)
        piece = slice(start, start + count)
        yield (
            update.tokens[:, piece],
            update.taps[:, piece],
            [range(max(0, min(count, total - start))) for total in counts],
        )


class CachedState(DraftState):
    """A state whose memory of its rows is a cache."""

    cache: SlotCache

    def select_rows(self, rows: Sequence[int]) -> None:
        self.cache.select_rows(rows)

    def join(self, other: CachedState) -> None:
        self.cache.join(other.cache)


class RunAhead:
    """Slots and ancestor masks of one tree's levels in a drafter's cache.

    Args:
        cache: the drafter's cache; its committed tokens end with each row's root. The caller rolls it back at the end.
        last_position: largest position; drafts beyond the context are never used.
    """

    def __init__(self, cache: SlotCache, last_position: int):
        self.cache, self.last_position = cache, last_position
        self.levels = self.first = 0  # pending slots before the first level
        self.positions = self.mask = self.slots = torch.empty(0)

    def place(self, tokens: Tensor, parents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Reserve a level of `(rows, nodes)` nodes; `parents` index the level before.

        Returns:
            Positions, ancestor mask and slots of all levels so far, as `attention_mask` takes them.
        """
        (rows, nodes), device = tokens.shape, tokens.device
        before = self.cache.pending
        self.cache.reserve(nodes, device)
        depths = [min(length + self.levels, self.last_position) for length in self.cache.lengths]
        positions = integers(depths, device)[:, None].expand(rows, nodes)
        own = itself(rows, nodes, device)
        if self.levels:
            above = self.mask.gather(1, parents[..., None].expand(-1, -1, before - self.first))
            own = torch.cat([above, own], dim=2)
            positions = torch.cat([self.positions, positions], dim=1)
        else:
            self.first = before
        self.slots = self.cache.pending_slots(self.first, own.shape[2], device)
        self.positions, self.mask = positions, own
        self.levels += 1
        return positions, own, self.slots


HIDDEN = -torch.inf


def causal_mask(cache: SlotCache, count: int, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """Return the causal mask `(rows or 1, 1, count, extent)` of `count` tokens per row, reserved right after the
    committed ones; None if every token sees everything."""
    lengths, even = cache.lengths, len(set(cache.lengths)) == 1
    if count == 1 and even:
        return None
    first = sent(lengths[:1] if even else lengths, device)[:, None, None, None]
    newest = first + torch.arange(count, device=device)[:, None]
    hidden = torch.arange(cache.extent, device=device) > newest
    return torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, HIDDEN)


class DraftMask:
    """Masks of the levels of one tree after the committed tokens, level by level.

    Args:
        cache: the drafter's cache; its committed tokens end with each row's root. The caller rolls it back at the end.
    """

    def __init__(self, cache: SlotCache, dtype: torch.dtype, device: torch.device):
        self.cache, self.dtype, self.device = cache, dtype, device
        self._even = len(set(cache.lengths)) == 1
        self._mask: Tensor | None = None  # None: all slots so far are seen

    def level(self, parents: Tensor) -> Tensor | None:
        """Reserve a level of `(rows, nodes)` nodes; `parents` index the level before.

        Returns:
            `(rows or 1, 1, nodes, extent)`, or None if every node sees all.
        """
        rows, nodes = parents.shape
        before = self.cache.extent
        slots = self.cache.reserve(nodes, self.device)
        above = self._mask
        if above is None and self._even and nodes == 1:
            return None
        if above is None:
            above = self._committed(before)
        if above.shape[2] > 1:
            index = parents[:, None, :, None]
            above = above.expand(rows, -1, -1, -1).gather(2, index.expand(-1, -1, -1, above.shape[3]))
        above = above.expand(-1, -1, nodes, -1)
        own = torch.full((nodes, nodes), HIDDEN, dtype=self.dtype, device=self.device)
        if self._even:
            own.fill_diagonal_(0.0)
        self._mask = torch.cat([above, own.expand(above.shape[0], 1, -1, -1)], dim=3)
        if not self._even:
            self._mask.scatter_(3, slots[:, None, :, None], 0.0)
        return self._mask

    def _committed(self, extent: int) -> Tensor:
        """Return the mask of every row's committed tokens, `(rows or 1, 1, 1, extent)`."""
        if self._even:
            return torch.zeros(1, 1, 1, extent, dtype=self.dtype, device=self.device)
        lengths = sent(self.cache.lengths, self.device)[:, None, None, None]
        hidden = torch.arange(extent, device=self.device) >= lengths
        return torch.zeros(hidden.shape, dtype=self.dtype, device=self.device).masked_fill_(hidden, HIDDEN)
