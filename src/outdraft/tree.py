"""Candidate trees, one for every row of a batch, and what attention needs to know of them.

Node 0 of every row is its root: the last token already decided, whose keys and values the target has not computed
yet. Parents come before children. Rows are padded to one number of nodes. A tree also says under which law its
candidates were drawn, which is all that verification has to know of the drafter.

It does not know who grew the tree, or what the target makes of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

Candidates = Literal["point", "with_replacement", "without_replacement"]


@dataclass
class Tree:
    """Trees of `rows` sequences, each of at most `nodes` nodes.

    Attributes:
        tokens: `(rows, nodes)`; column 0 the roots.
        parents: `(rows, nodes)` index of the parent, -1 for the root; padding points to the root.
        counts: nodes that each row really has, the root included; the rest is padding.
        candidates: how a node's children were chosen: `point` (deterministically, by whatever rule) or drawn from
            `laws`, independently or without replacement, in the order of their indices.
        laws: `(rows, nodes, vocab)` the exact law each node's children were drawn from; None for `point`.
    """

    tokens: Tensor
    parents: Tensor
    counts: list[int]
    candidates: Candidates = "point"
    laws: Tensor | None = None
    _depths: Tensor | None = field(default=None, repr=False)
    _ancestors: Tensor | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if (self.laws is None) != (self.candidates == "point"):
            raise ValueError("a tree of sampled candidates needs the laws they were drawn from, and only such a tree")

    @classmethod
    def roots(cls, tokens: Tensor) -> Tree:
        """Trees of nothing but their roots, from `(rows,)` tokens: what plain decoding verifies."""
        return cls(tokens[:, None], torch.full_like(tokens[:, None], -1), [1] * len(tokens))

    @property
    def rows(self) -> int:
        return self.tokens.shape[0]

    @property
    def nodes(self) -> int:
        return self.tokens.shape[1]

    @property
    def depths(self) -> Tensor:
        """`(rows, nodes)` edges between node and root."""
        if self._depths is None:
            self._walk()
        assert self._depths is not None
        return self._depths

    @property
    def ancestors(self) -> Tensor:
        """`(rows, nodes, nodes)` True where the column is the row's node itself or one of its ancestors."""
        if self._ancestors is None:
            self._walk()
        assert self._ancestors is not None
        return self._ancestors

    def _walk(self) -> None:
        """Climb from all nodes at once, one level a step."""
        depths = torch.zeros_like(self.tokens)
        seen = torch.eye(self.nodes, dtype=torch.bool, device=self.tokens.device).repeat(self.rows, 1, 1)
        above = self.parents
        while self.nodes > 1:
            climbing = above >= 0
            if not climbing.any():
                break
            depths += climbing
            there = above.clamp(min=0)
            # A node that has arrived marks the root again, which every node sees anyway.
            seen.scatter_(2, there[..., None], True)
            above = self.parents.gather(1, there).where(climbing, above)
        self._depths, self._ancestors = depths, seen

    def children(self, row: int) -> dict[int, list[int]]:
        """Children of every node of a row that has some, in the order in which they were proposed."""
        result: dict[int, list[int]] = {}
        for node, parent in enumerate(self.parents[row].tolist()[1 : self.counts[row]], start=1):
            result.setdefault(parent, []).append(node)
        return result

    def validate(self) -> None:
        """Raise ValueError where the tree breaks the promises of this class."""
        order = torch.arange(self.nodes, device=self.tokens.device)
        if not ((self.parents[:, 1:] >= 0) & (self.parents[:, 1:] < order[1:])).all():
            raise ValueError("every parent comes before its children")
        if not (self.parents[:, 0] == -1).all() or max(self.counts) > self.nodes or min(self.counts) < 1:
            raise ValueError("every row has a root and at most as many nodes as the batch")


def attention_mask(
    seen: Tensor, slots: Tensor, lengths: Sequence[int], extent: int, positions: Tensor, window: int | None = None
) -> Tensor:
    """Which cached slots each new token may look at.

    Args:
        seen: `(rows, tokens, m)` which of the newest `m` pending tokens each token sees, itself included.
        slots: `(rows, m)` where those lie in the cache.
        lengths: committed tokens of every row, all of which are seen.
        extent: slots that the forward reads.
        positions: `(rows, tokens + ...)` positions of the `m` tokens; the last `tokens` of them are the new ones'.
        window: sliding attention: only positions less than this far back are seen.

    Returns:
        `(rows, 1, tokens, extent)` bool.
    """
    rows, tokens, newest = seen.shape
    device = seen.device
    arange = torch.arange(extent, device=device)
    committed = arange[None] < torch.tensor(list(lengths), device=device)[:, None]
    mask = committed[:, None].repeat(1, tokens, 1)
    mask.scatter_(2, slots[:, None].expand(rows, tokens, newest), seen)
    if window is not None:
        key_positions = arange.repeat(rows, 1).scatter(1, slots, positions)
        near = positions[:, -tokens:, None] - key_positions[:, None] < window
        mask &= near
    return mask[:, None]
