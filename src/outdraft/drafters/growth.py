"""Growing a tree from a drafter that gives logits, one level a step.

`grow_dynamic` is EAGLE-2 (arXiv 2406.16858, section 4): expand the nodes with the largest cumulative draft
probability, then keep the best of all candidates. `grow_sampled` draws candidates from the drafter's own law and hands
the law over. Both work for any drafter that can answer `step`; neither knows what is behind it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from outdraft.cache import SlotCache
from outdraft.drafters.base import RowContext, TreeShape
from outdraft.tree import Tree

Step = Callable[[Tensor, Tensor], Tensor]
"""(tokens, parents), each `(rows, nodes)`, parents indexing the level before -> `(rows, nodes, vocab)` draft logits."""


def grow(roots: Tensor, logits: Tensor, step: Step, shape: TreeShape, rows: RowContext) -> Tree:
    """A tree of at most `shape` below each of the `(rows,)` root tokens, whose draft logits are `(rows, vocab)`."""
    if shape.size == 1:
        return Tree.roots(roots)
    if shape.candidates == "top-k" or rows.greedy:
        return grow_dynamic(roots, logits, step, shape)
    return grow_sampled(roots, logits, step, shape, rows)


def grow_dynamic(roots: Tensor, logits: Tensor, step: Step, shape: TreeShape) -> Tree:
    """EAGLE-2's tree: every level expands the `top_k` nodes of largest cumulative probability; the `size - 1` best of
    all candidates stay. Deterministic, so the candidates count as point masses."""
    batch, vocab = logits.shape
    k = min(shape.top_k, vocab)
    scores, tokens = log_softmax(logits).topk(k)
    parents = torch.zeros_like(tokens)  # index among all candidates, the root first
    levels = [(tokens, scores, parents)]
    nodes = torch.arange(1, k + 1, device=logits.device).expand(batch, k)  # of the level to expand, likewise
    above = torch.zeros_like(nodes)  # their parents' places in the level before
    for _ in range(shape.depth):
        child_scores, child_tokens = log_softmax(step(tokens, above)).topk(k)
        child_scores = (child_scores + scores[..., None]).flatten(1)
        child_tokens = child_tokens.flatten(1)
        first = 1 + sum(level[0].shape[1] for level in levels)
        levels.append((child_tokens, child_scores, nodes.repeat_interleave(k, dim=1)))
        scores, best = child_scores.topk(k)
        tokens, above, nodes = child_tokens.gather(1, best), best // k, first + best
    all_tokens, all_scores, all_parents = (torch.cat(parts, dim=1) for parts in zip(*levels, strict=True))
    # A stable sort keeps a parent before a child of equal probability, so that no kept node loses its parent.
    order = all_scores.sort(dim=1, descending=True, stable=True).indices[:, : shape.size - 1]
    kept = order.sort(dim=1).values
    renumber = torch.zeros(batch, all_tokens.shape[1] + 1, dtype=torch.long, device=logits.device)
    places = torch.arange(1, kept.shape[1] + 1, device=logits.device).expand_as(kept)
    renumber.scatter_(1, kept + 1, places)
    tree_parents = renumber.gather(1, all_parents.gather(1, kept))
    return Tree(
        torch.cat([roots[:, None], all_tokens.gather(1, kept)], dim=1),
        torch.cat([tree_parents.new_full((batch, 1), -1), tree_parents], dim=1),
        [1 + kept.shape[1]] * batch,
    )


def grow_sampled(roots: Tensor, logits: Tensor, step: Step, shape: TreeShape, rows: RowContext) -> Tree:
    """`top_k` first tokens drawn from the draft law, each continued by a chain drawn token by token.

    The shape is settled before anything is drawn: no candidate is dropped for what it turned out to be.
    """
    batch, replacing = len(roots), shape.candidates == "sampled-with-replacement"
    width = min(shape.top_k, shape.size - 1)
    length = min(shape.depth + 1, (shape.size - 1) // width)
    draws = [_RowDraws(row, logits[row], width, replacing, rows) for row in range(batch)]
    above = torch.arange(width, device=logits.device).expand(batch, width)
    for level in range(1, length):
        tokens = torch.tensor([draw.newest() for draw in draws], device=logits.device)
        level_logits = step(tokens, above if level > 1 else torch.zeros_like(above))
        for draw, row_logits in zip(draws, level_logits, strict=True):
            draw.extend(row_logits)
    nodes = max(draw.count for draw in draws)
    parts = [draw.columns(nodes) for draw in draws]
    tokens, parents, laws = (torch.stack(part) for part in zip(*parts, strict=True))
    return Tree(
        torch.cat([roots[:, None], tokens.to(roots.device)], dim=1),
        parents.to(roots.device),
        [draw.count for draw in draws],
        "with_replacement" if replacing else "without_replacement",
        laws,
    )


class _RowDraws:
    """The chains of one row while they are drawn, and the laws that they were drawn from."""

    def __init__(self, row: int, logits: Tensor, width: int, replacing: bool, rows: RowContext):
        self.prefix, self.warper, self.chance = rows.prefixes[row], rows.warpers[row], rows.chances[row]
        self.width = width  # chains of the batch; this row may have fewer
        root = self.law(logits, [])
        # Without replacement there are no more candidates than tokens of positive probability.
        chains = width if replacing else min(width, int((root > 0).sum()))
        self.chains: list[list[int]] = []
        left = root.clone()
        for _ in range(chains):
            self.chains.append([self.chance.draw(left)])
            if not replacing:
                left[self.chains[-1][0]] = 0
        self.laws = [root]

    def law(self, logits: Tensor, path: list[int]) -> Tensor:
        reads = self.warper.reads_prefix
        return self.warper.law(logits, torch.cat([self.prefix, self.prefix.new_tensor(path)]) if reads else self.prefix)

    @property
    def count(self) -> int:
        """Nodes of the row's tree, the root included."""
        return 1 + sum(len(chain) for chain in self.chains)

    def newest(self) -> list[int]:
        """The chains' last tokens, filled up to the width of the batch."""
        return [chain[-1] for chain in self.chains] + [0] * (self.width - len(self.chains))

    def extend(self, logits: Tensor) -> None:
        """Draw one more token for every chain from `(width, vocab)` logits."""
        for chain, chain_logits in zip(self.chains, logits, strict=False):
            self.laws.append(self.law(chain_logits, chain))
            chain.append(self.chance.draw(self.laws[-1]))

    def columns(self, nodes: int) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens `(nodes - 1,)`, parents `(nodes,)`, laws `(nodes, vocab)`, level by level, padded."""
        width, padding = len(self.chains), nodes - self.count
        tokens = [token for level in zip(*self.chains, strict=True) for token in level]
        parents = [-1] + [max(0, node - width) for node in range(1, self.count)]
        laws = torch.zeros(nodes, len(self.laws[0]), dtype=self.laws[0].dtype, device=self.laws[0].device)
        laws[: len(self.laws)] = torch.stack(self.laws)
        return torch.tensor(tokens + [0] * padding), torch.tensor(parents + [0] * padding), laws


class RunAhead:
    """Where the levels of one tree lie in a drafter's cache, and what each node of the newest level sees of them.

    Args:
        cache: of the drafter; its committed tokens end with each row's root. The caller rolls it back at the end.
        last_position: where positions stop growing; what is drafted beyond the context is never used.
    """

    def __init__(self, cache: SlotCache, last_position: int):
        self.cache, self.last_position = cache, last_position
        self.levels = 0
        self.positions = self.seen = self.slots = torch.empty(0)

    def place(self, tokens: Tensor, parents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Reserve a level of `(rows, nodes)` nodes; `parents` index the level before.

        Returns:
            positions, sight and slots of all levels so far, as `attention_mask` takes them.
        """
        (rows, nodes), device = tokens.shape, tokens.device
        slots = self.cache.reserve(nodes, device)
        depth = torch.tensor(self.cache.lengths, device=device)[:, None] + self.levels
        positions = depth.clamp(max=self.last_position).expand(rows, nodes)
        own = torch.eye(nodes, dtype=torch.bool, device=device).expand(rows, -1, -1)
        if self.levels:
            row = torch.arange(rows, device=device)[:, None]
            own = torch.cat([self.seen[row, parents], own], dim=2)
            slots = torch.cat([self.slots, slots], dim=1)
            positions = torch.cat([self.positions, positions], dim=1)
        self.positions, self.seen, self.slots = positions, own, slots
        self.levels += 1
        return positions, own, slots


def log_softmax(logits: Tensor) -> Tensor:
    """In float32 at least, whatever the drafter computes in."""
    return logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
