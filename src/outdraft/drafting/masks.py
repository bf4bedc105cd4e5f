"""Additive attention masks for drafted nodes in a drafter's own cache.

Masks grow with the tree: a level's mask is its parents' mask plus the level's own nodes, so nothing is built twice.
There is no mask if every node sees every key, as in a chain of one row. `attention_mask` in `tree.py` computes the same
for any tree at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from outdraft.core.tensors import sent
from outdraft.target.cache import SlotCache

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
        dtype: dtype of the masks.
        device: device of the masks.
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
