"""Candidate trees, one for every row of a batch, and the ancestor masks that attention needs.

Node 0 of every row is its root: the last token already decided, whose keys and values the target has not computed yet.
Parents come before children. Rows are padded to one number of nodes. A tree also holds the distribution that its
candidates were drawn from, which is all that verification must know of the drafter.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from outdraft.core.tensors import counting, integers, itself, sent

Candidates = Literal["point", "with_replacement", "without_replacement", "spine"]


@dataclass
class Tree:
    """Trees of `rows` sequences, each of at most `nodes` nodes.

    Attributes:
        tokens: `(rows, nodes)` token ids; column 0 holds the roots.
        parents: `(rows, nodes)` index of the parent, -1 for the root; padding points to the root.
        counts: real nodes of each row, the root included; the rest is padding.
        candidates: how a node's children were chosen: `point` (deterministically, by whatever rule) or drawn from
            `draft_probs`, independently or without replacement, in the order of their indices. In a `spine` tree the
            first child of a node was drawn, where `draft_probs` has a distribution, and all others were chosen.
        draft_probs: `(rows, nodes, vocab)` the exact distribution each node's children were drawn from; None for
            `point`.
        levels: upper bound of the nodes' depth; None if unknown.
        chain: True if every node is known to be the child of the one before it.
    """

    tokens: Tensor
    parents: Tensor
    counts: list[int]
    candidates: Candidates = "point"
    draft_probs: Tensor | None = None
    levels: int | None = None
    chain: bool = False

    def __post_init__(self) -> None:
        if (self.draft_probs is None) != (self.candidates == "point"):
            raise ValueError(
                "a tree of sampled candidates needs the distributions they were drawn from, and only such a tree"
            )

    @classmethod
    def roots(cls, tokens: Tensor) -> Tree:
        """Make trees that hold only roots, from `(rows,)` tokens: what plain decoding verifies."""
        return cls(tokens[:, None], torch.full_like(tokens[:, None], -1), [1] * len(tokens), levels=0)

    @classmethod
    def chains(
        cls, tokens: Tensor, width: int, candidates: Candidates = "point", draft_probs: Tensor | None = None
    ) -> Tree:
        """Make `width` chains from the root, level by level; `(rows, 1 + width * length)` tokens without padding."""
        rows, nodes = tokens.shape
        parents, ancestors, depths = _chains(width, nodes, tokens.device)
        tree = cls(tokens, parents.expand(rows, -1), [nodes] * rows, candidates, draft_probs, (nodes - 1) // width)
        tree.chain = width == 1
        tree.ancestors, tree.depths = ancestors.expand(rows, -1, -1), depths.expand(rows, -1)
        return tree

    @classmethod
    def listed(cls, chains: Sequence[Sequence[int]], device: torch.device) -> Tree:
        """Make one chain per row, with point masses, from token lists of any length that begin with the root."""
        counts = [len(chain) for chain in chains]
        nodes = max(counts)
        tokens = sent([[*chain, *[0] * (nodes - len(chain))] for chain in chains], device)
        if min(counts) == nodes:
            return cls.chains(tokens, 1)
        parents = [[*range(-1, count - 1), *[0] * (nodes - count)] for count in counts]
        return cls(tokens, sent(parents, device), counts, levels=nodes - 1)

    @property
    def rows(self) -> int:
        return self.tokens.shape[0]

    @property
    def nodes(self) -> int:
        return self.tokens.shape[1]

    def with_tokens(self, tokens: Tensor) -> Tree:
        """Return the same trees with other tokens, `(rows, nodes)`."""
        other = copy.copy(self)
        other.tokens = tokens
        other.__dict__.pop("lists", None)
        return other

    @cached_property
    def depths(self) -> Tensor:
        """`(rows, nodes)` number of edges between node and root."""
        return self.ancestors.sum(-1) - 1

    @cached_property
    def ancestors(self) -> Tensor:
        """`(rows, nodes, nodes)` ancestor mask: True if the column is the node itself or one of its ancestors.

        It is computed from node and parent, then by squaring for 2, 4, 8 ... steps.
        """
        levels = self.nodes - 1 if self.levels is None else self.levels
        mask = itself(self.rows, self.nodes, self.tokens.device)
        if levels < 1:
            return mask
        # The root's own column stands for its missing parent.
        steps = mask.float().scatter_(2, self.parents.clamp(min=0)[..., None], 1.0)
        reach = 1
        while reach < levels:
            steps = torch.bmm(steps, steps).clamp_(max=1.0)
            reach *= 2
        return steps > 0

    @cached_property
    def deepest(self) -> list[int]:
        """Depth of the deepest node of every row, computed on the host if the parents are there already."""
        found = [0] * self.rows
        if self.nodes > 1 and "lists" in self.__dict__:
            for row, parents in enumerate(self.lists[1]):
                depths = [0] * len(parents)
                for node in range(1, len(parents)):  # parents come before their children
                    depths[node] = depths[parents[node]] + 1
                found[row] = max(depths)
        elif self.nodes > 1:
            found = self.depths.amax(1).tolist()
        # Padding lies right below the root, so that it counts only where there is nothing else.
        return [depth if count > 1 else 0 for depth, count in zip(found, self.counts, strict=True)]

    @cached_property
    def lists(self) -> tuple[list[list[int]], list[list[int]]]:
        """Tokens and parents of every row, in one transfer."""
        tokens, parents = torch.stack([self.tokens, self.parents]).tolist()
        return tokens, parents

    def children(self, row: int) -> dict[int, list[int]]:
        """Return the children of every node of a row that has some, in the order in which they were proposed."""
        result: dict[int, list[int]] = {}
        for node, parent in enumerate(self.lists[1][row][1 : self.counts[row]], start=1):
            result.setdefault(parent, []).append(node)
        return result

    def validate(self) -> None:
        """Raise ValueError if the tree violates the invariants of this class."""
        order = torch.arange(self.nodes, device=self.tokens.device)
        if not ((self.parents[:, 1:] >= 0) & (self.parents[:, 1:] < order[1:])).all():
            raise ValueError("every parent comes before its children")
        if not (self.parents[:, 0] == -1).all() or max(self.counts) > self.nodes or min(self.counts) < 1:
            raise ValueError("every row has a root and at most as many nodes as the batch")


@lru_cache(maxsize=128)
def _chains(width: int, nodes: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return parents, ancestors and depths of one row of `Tree.chains`, which are the same every round."""
    with torch.inference_mode(False):
        parents = sent([[-1, *(max(0, node - width) for node in range(1, nodes))]], device)
        tree = Tree(torch.zeros_like(parents), parents, [nodes])
        return parents, tree.ancestors, tree.depths


def attention_mask(
    mask: Tensor, slots: Tensor, lengths: Sequence[int], extent: int, positions: Tensor, window: int | None = None
) -> Tensor:
    """Compute which cached slots each new token attends to.

    Args:
        mask: `(rows, tokens, m)` ancestor mask: which of the `m` pending tokens each token sees, itself included.
        slots: `(rows, m)` cache slots of the pending tokens: in order, right after the committed ones.
        lengths: committed tokens of every row, all of which are seen.
        extent: slots that the forward reads, the longest row's `lengths + m`.
        positions: `(rows, tokens + ...)` positions of the `m` tokens; the last `tokens` of them are the new ones'.
        window: sliding attention: only positions less than this far back are seen.

    Returns:
        `(rows, 1, tokens, extent)` bool.
    """
    rows, tokens, newest = mask.shape
    device, longest = mask.device, extent - newest
    arange = counting(0, extent, device)
    if min(lengths) == longest:
        visible = F.pad(mask, (longest, 0), value=True)
    else:
        visible = (arange < integers(lengths, device)[:, None])[:, None].repeat(1, tokens, 1)
        visible.scatter_(2, slots[:, None].expand(rows, tokens, newest), mask)
    if window is not None and window < extent:
        key_positions = arange.repeat(rows, 1).scatter(1, slots, positions)
        visible &= positions[:, -tokens:, None] - key_positions[:, None] < window
    return visible[:, None]
