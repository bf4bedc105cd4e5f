"""Best-first trees over tables of transitions.

A node's score is the sum of log-probabilities on its path. Every row of a table is sorted once; a heap then pops the
best node, and pushes its next sibling and its own best child. Scores only fall along a path and along a sorted row, so
the n nodes popped first are the n best nodes of all, parents before children (DDTree's argument, with a row for every
predecessor). Where the host would wait for the tables, the device finds the same nodes level by level (`best_at_once`).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from outdraft.core.shape import TreeShape
from outdraft.core.tensors import chosen, counting, sent
from outdraft.core.tree import Tree
from outdraft.drafting.base import Budget
from outdraft.drafting.expand import Level, best_of


class Node(NamedTuple):
    """A candidate of a row's tree."""

    token: int
    parent: int
    """The index of its parent, 0 for the root."""
    level: int
    score: float


@dataclass
class Tables:
    """The candidates of all slots and their log-probabilities, on the device.

    Attributes:
        ids: `(rows, slots, k)` token ids of every slot's candidates, best first in slot 0.
        first: `(rows, k)` log-probabilities of slot 0's.
        later: `(rows, slots - 1, k, k)` log-probabilities of a later slot's after each candidate of the slot before.
    """

    ids: Tensor
    first: Tensor
    later: Tensor

    def lists(self, roots: Tensor, width: int) -> tuple[list[int], list[list[list[list[float]]]]]:
        """Bring roots and tables to the host, in one transfer.

        Returns:
            Every row's root, and for every row `[slot][place]` lists of the best `width` children: the first k places
            hold their log-probabilities after each candidate before, the next k places which candidates they are, the
            last one the slot's ids.
        """
        k = self.ids.shape[2]
        scores, order = torch.cat([self.first[:, None, None].expand(-1, -1, k, -1), self.later], dim=1).sort(
            dim=-1, descending=True, stable=True
        )
        ids = F.pad(self.ids, (0, 1))
        ids[:, 0, k] = roots
        parts = [
            F.pad(part, (0, k + 1 - part.shape[-1])).double() for part in (scores[..., :width], order[..., :width])
        ]
        found = torch.cat([*parts, ids.double()[:, :, None]], dim=2).tolist()
        return [int(row[0][-1][k]) for row in found], found

    @property
    def k(self) -> int:
        return self.ids.shape[2]


def popped(table: list[list[list[float]]], k: int, width: int, depth: int) -> Iterator[Node]:
    """Yield the nodes of a row's table (`Tables.lists`), best first, with `width` children each, to level `depth`."""
    width = min(width, k)
    heap = [(-table[0][0][0], 0, 0, 0, 0, 0)]  # score, a number for ties, level, parent, row of the table, rank
    count = pushed = 0
    while heap:
        negative, _, level, parent, row, rank = heapq.heappop(heap)
        if negative == math.inf:
            return
        scores, candidate = table[level][row], int(table[level][k + row][rank])
        count, pushed = count + 1, pushed + 2
        yield Node(int(table[level][-1][candidate]), parent, level, -negative)
        if rank + 1 < width:
            sibling = negative + scores[rank] - scores[rank + 1]
            heapq.heappush(heap, (sibling, pushed, level, parent, row, rank + 1))
        if level < depth:
            child = negative - table[level + 1][candidate][0]
            heapq.heappush(heap, (child, pushed + 1, level + 1, count, candidate, 0))


def best_first(roots: Tensor, tables: Tables, shape: TreeShape, budget: Budget | None) -> Tree:
    """Build trees of the best nodes, as many as the shape allows, or the budget where there is one.

    Args:
        roots: `(rows,)` root tokens.
        shape: largest size; `top_k` bounds the children of a node.
        budget: decides how many levels and nodes each row has.
    """
    named, found = tables.lists(roots, shape.top_k)
    grown = [list(islice(popped(own, tables.k, shape.top_k, shape.depth), shape.size - 1)) for own in found]
    if budget is not None:
        grown = _within(grown, budget, shape.depth + 1)
    return _tree(named, [[(node.token, node.parent) for node in own] for own in grown], shape, roots.device)


def best_at_once(roots: Tensor, tables: Tables, shape: TreeShape) -> Tree:
    """Build the trees of `best_first` without a question of the host; every row has as many nodes as the tables allow.

    No node scores more than its parent. So the best nodes of a level are children of the best of the level before, and
    of a tree of n nodes at most n - d lie d levels below its first.
    """
    most, width = shape.size - 1, min(shape.top_k, tables.k)
    further, order = tables.later.clamp(max=0).topk(width)  # rounding may leave a probability above 1
    scores = tables.first[:, : min(width, most)]
    places = counting(0, scores.shape[1], roots.device).expand_as(scores)  # among the candidates of the level's slot
    levels, first = [Level(tables.ids[:, 0].gather(1, places), scores, torch.zeros_like(places))], 1
    for depth in range(1, min(shape.depth, most - 1) + 1):
        above = places.shape[1]
        children = chosen(further[:, depth - 1], places) + scores[..., None]
        scores, best = children.flatten(1).topk(min(above * width, most - depth))
        places = chosen(order[:, depth - 1], places).flatten(1).gather(1, best)
        levels.append(Level(tables.ids[:, depth].gather(1, places), scores, first + best // width))
        first += above
    return best_of(roots, levels, most)


def _within(grown: list[list[Node]], budget: Budget, levels: int) -> list[list[Node]]:
    """Cut every row's nodes, best first, to the levels and to the number that the budget wants.

    All levels came at once, and the budget's `sizes` weighs the nodes of all of them, so a further level costs nothing.
    """
    masses = [[sum(math.exp(n.score) for n in own if n.level == level) for level in range(levels)] for own in grown]
    deep, wanted = [0] * len(grown), budget.going
    for level in range(levels):
        if level:
            wanted = budget.wants(0)
        if not any(wanted):
            break
        deep = [level + 1 if going else most for going, most in zip(wanted, deep, strict=True)]
        above = [row[level - 1] if level else 1.0 for row in masses]
        budget.drafted([row[level] / mass if row[level] else None for row, mass in zip(masses, above, strict=True)])
    cut = [_shallow(own, most) for own, most in zip(grown, deep, strict=True)]
    gains = [[math.exp(node.score) for node in own] for own in cut]
    sizes = budget.sizes(gains, [[node.level for node in own] for own in cut])
    return [own[:size] for own, size in zip(cut, sizes, strict=True)]


def _shallow(nodes: list[Node], levels: int) -> list[Node]:
    """Keep the nodes of the first levels; parents are renumbered."""
    indices, kept = {0: 0}, []
    for place, node in enumerate(nodes, start=1):
        if node.level < levels:
            kept.append(node._replace(parent=indices[node.parent]))
            indices[place] = len(kept)
    return kept


def with_spine(chain: Tree, tables: Tables, shape: TreeShape) -> Tree:
    """Add the best chosen nodes to chains that were drawn; the drawn child of a node comes before the chosen ones.

    Args:
        chain: a chain of every row with the distributions that it was drawn from.
    """
    named, found = tables.lists(chain.tokens[:, 0], shape.top_k)
    grown = []
    for table, drawn, count in zip(found, chain.lists[0], chain.counts, strict=True):
        nodes = [(drawn[place], place - 1) for place in range(1, count)]
        indices = [0]  # of every popped node in the whole tree
        for node in popped(table, tables.k, shape.top_k, shape.depth):
            if len(nodes) >= shape.size - 1 or count == 1:  # a row that drew nothing drafts nothing
                break
            parent = indices[node.parent]
            if (
                parent + 1 < count and drawn[parent + 1] == node.token
            ):  # the drawn child of a drawn node, or of the root
                indices.append(parent + 1)
            else:
                nodes.append((node.token, parent))
                indices.append(len(nodes))
        grown.append(nodes)
    tree = _tree(named, grown, shape, chain.tokens.device)
    if chain.draft_probs is None:
        return tree
    more = tree.nodes - chain.draft_probs.shape[1]
    tree.candidates, tree.draft_probs = "spine", F.pad(chain.draft_probs, (0, 0, 0, more))
    return tree


def _tree(roots: Sequence[int], grown: Sequence[list[tuple[int, int]]], shape: TreeShape, device: torch.device) -> Tree:
    """Build the trees of `(token, parent)` nodes, parents before children."""
    counts = [1 + len(nodes) for nodes in grown]
    padded = [own + [(0, 0)] * (max(counts) - 1 - len(own)) for own in grown]
    tokens = [[root, *(token for token, _ in own)] for root, own in zip(roots, padded, strict=True)]
    parents = [[-1, *(parent for _, parent in own)] for own in padded]
    both = sent([tokens, parents], device)
    tree = Tree(both[0], both[1], counts, levels=shape.depth + 1)
    tree.lists = (tokens, parents)
    return tree
