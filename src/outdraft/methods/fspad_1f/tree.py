"""Best-first trees over tables of transitions.

A node's score is the sum of log-probabilities on its path. Every row of a table is sorted once; a heap then pops the best
node, and pushes its next sibling and its own best child. Scores only fall along a path and along a sorted row, so the n
nodes popped first are the n best nodes of all, parents before children (DDTree's argument, over rows by predecessor).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from outdraft.core.shape import TreeShape
from outdraft.core.tensors import sent
from outdraft.core.tree import Tree
from outdraft.drafting.base import Budget


class Node(NamedTuple):
    """A candidate of a row's tree."""

    token: int
    """The place among its slot's candidates."""
    parent: int
    """The index of its parent, 0 for the root."""
    level: int
    score: float


class Tables(NamedTuple):
    """One row's tables on the host; each of their rows is sorted, best first."""

    scores: list[list[list[float]]]
    """`[slot][candidate of the slot before][rank]` log-probabilities; slot 0 has one row."""
    order: list[list[list[int]]]
    """The candidates in that order."""
    ids: list[list[int]]
    """`[slot][candidate]` token ids."""

    def popped(self, width: int, depth: int) -> Iterator[Node]:
        """Yield the row's nodes, best first, of at most `width` children each and levels up to `depth`."""
        heap = [(-self.scores[0][0][0], 0, 0, 0, 0, 0)]  # score, a number for ties, level, parent, table row, rank
        count = pushed = 0
        while heap:
            negative, _, level, parent, row, rank = heapq.heappop(heap)
            if negative == math.inf:
                return
            token, above = self.order[level][row][rank], -negative - self.scores[level][row][rank]
            count += 1
            yield Node(token, parent, level, -negative)
            if rank + 1 < min(width, len(self.order[level][row])):
                pushed += 1
                sibling = above + self.scores[level][row][rank + 1]
                heapq.heappush(heap, (-sibling, pushed, level, parent, row, rank + 1))
            if level < depth:
                pushed += 1
                child = -negative + self.scores[level + 1][token][0]
                heapq.heappush(heap, (-child, pushed, level + 1, count, token, 0))


def host_tables(ids: Tensor, first: Tensor, later: Tensor, kept: Tensor | None) -> list[Tables]:
    """Bring the tables of all rows to the host, in one transfer.

    Args:
        ids: `(rows, slots, k)` candidates of every slot, best first in slot 0.
        first: `(rows, k)` log-probabilities of slot 0's.
        later: `(rows, slots - 1, k, k)` log-probabilities of later slots' after each candidate before.
        kept: token ids of the draft vocabulary, which `ids` index; None where they are token ids.
    """
    rows, slots, k = ids.shape
    scores, order = later.sort(dim=-1, descending=True, stable=True)
    named = ids if kept is None else kept[ids]
    parts = [named.flatten(1), first, scores.flatten(1), order.flatten(1)]
    flat = torch.cat([part.double() for part in parts], dim=1).tolist()
    found = []
    for row in flat:
        named_, rest = row[: slots * k], row[slots * k :]
        first_, rest = rest[:k], rest[k:]
        scores_, order_ = rest[: (slots - 1) * k * k], rest[(slots - 1) * k * k :]
        found.append(
            Tables(
                [[first_], *_split(scores_, k)],
                [[list(range(k))], *_split([int(place) for place in order_], k)],
                [[int(token) for token in named_[slot * k : (slot + 1) * k]] for slot in range(slots)],
            )
        )
    return found


def _split(numbers: list, k: int) -> list[list[list]]:
    return [
        [numbers[start + row * k : start + (row + 1) * k] for row in range(k)]
        for start in range(0, len(numbers), k * k)
    ]


def best_first(
    roots: Tensor,
    ids: Tensor,
    first: Tensor,
    later: Tensor,
    shape: TreeShape,
    budget: Budget | None,
    kept: Tensor | None,
) -> Tree:
    """Build trees of the best nodes, as many as the shape allows, or the budget where there is one.

    Args:
        roots: `(rows,)` root tokens.
        ids, first, later, kept: as in `host_tables`.
        shape: largest size; `top_k` bounds the children of a node.
        budget: decides how many levels and nodes each row has.
    """
    tables = host_tables(ids, first, later, kept)
    grown: list[list[Node]] = []
    for table in tables:
        nodes = table.popped(shape.top_k, shape.depth)
        grown.append([node for node, _ in zip(nodes, range(shape.size - 1), strict=False)])
    if budget is not None:
        grown = _within(grown, budget, shape)
    texts = [
        [(table.ids[node.level][node.token], node.parent) for node in own]
        for table, own in zip(tables, grown, strict=True)
    ]
    return _tree(roots.tolist(), texts, shape, roots.device)


def _within(grown: list[list[Node]], budget: Budget, shape: TreeShape) -> list[list[Node]]:
    """Cut every row's nodes, best first, to the levels and to the number that the budget wants."""
    masses = [[0.0] * (shape.depth + 1) for _ in grown]
    for row, own in zip(masses, grown, strict=True):
        for node in own:
            row[node.level] += math.exp(node.score)
    levels, wanted = [0] * len(grown), budget.going
    for level in range(shape.depth + 1):
        if level:
            wanted = budget.wants(max(sum(node.level == level for node in own) for own in grown))
        if not any(wanted):
            break
        levels = [level + 1 if going else most for going, most in zip(wanted, levels, strict=True)]
        above = [row[level - 1] if level else 1.0 for row in masses]
        budget.drafted([row[level] / mass if mass else None for row, mass in zip(masses, above, strict=True)])
    cut = [[node for node in own if node.level < most] for own, most in zip(grown, levels, strict=True)]
    # Nodes of a level that was cut leave gaps in the numbers of those behind them.
    cut = [_renumbered(own, kept) for own, kept in zip(grown, cut, strict=True)]
    gains = [[math.exp(node.score) for node in own] for own in cut]
    sizes = budget.sizes(gains, [[node.level for node in own] for own in cut])
    return [own[:size] for own, size in zip(cut, sizes, strict=True)]


def _renumbered(before: Sequence[Node], kept: Sequence[Node]) -> list[Node]:
    """Renumber the parents of nodes of which some were left out, none of them a parent of those kept."""
    if len(before) == len(kept):
        return list(kept)
    deepest = max((node.level for node in kept), default=-1)
    places, count = {0: 0}, 0
    for place, node in enumerate(before, start=1):
        if node.level <= deepest:
            count += 1
            places[place] = count
    return [node._replace(parent=places[node.parent]) for node in kept]


def with_spine(chain: Tree, ids: Tensor, first: Tensor, later: Tensor, shape: TreeShape, kept: Tensor | None) -> Tree:
    """Add the best chosen nodes to chains that were drawn; the drawn child of a node comes before the chosen ones.

    Args:
        chain: a chain of every row with the distributions that it was drawn from.
        ids, first, later, kept: as in `host_tables`.
        shape: largest size.
    """
    tables, grown = host_tables(ids, first, later, kept), []
    tokens, _ = chain.lists
    for table, drawn, count in zip(tables, tokens, chain.counts, strict=True):
        nodes = [(drawn[place], place - 1) for place in range(1, count)]
        spine = {(place - 1, drawn[place]): place for place in range(1, count)}
        index = [0]  # of every popped node in the whole tree
        for node in table.popped(shape.top_k, shape.depth):
            if len(nodes) >= shape.size - 1 or count == 1:
                break
            parent, token = index[node.parent], table.ids[node.level][node.token]
            if (parent, token) in spine:
                index.append(spine[parent, token])
                continue
            nodes.append((token, parent))
            index.append(len(nodes))
        grown.append(nodes)
    tree = _tree([drawn[0] for drawn in tokens], grown, shape, chain.tokens.device)
    probs = chain.draft_probs
    if probs is None:
        return tree
    more = tree.nodes - probs.shape[1]
    tree.candidates, tree.draft_probs = "spine", torch.nn.functional.pad(probs, (0, 0, 0, more))
    return tree


def _tree(
    roots: Sequence[int], grown: Sequence[Sequence[tuple[int, int]]], shape: TreeShape, device: torch.device
) -> Tree:
    """Build the trees of `(token, parent)` nodes, parents before children."""
    counts = [1 + len(nodes) for nodes in grown]
    most = max(counts)
    tokens = [
        [root, *(token for token, _ in own)] + [0] * (most - 1 - len(own))
        for root, own in zip(roots, grown, strict=True)
    ]
    parents = [[-1, *(parent for _, parent in own)] + [0] * (most - 1 - len(own)) for own in grown]
    both = sent([tokens, parents], device)
    return Tree(both[0], both[1], counts, levels=shape.depth + 1, _lists=(tokens, parents))
