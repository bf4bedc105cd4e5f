"""Growing a tree from a drafter that gives logits, one level a step.

`grow_dynamic` is EAGLE-2 (arXiv 2406.16858, section 4): expand the nodes with the largest cumulative draft
probability, then keep the best of all candidates. `grow_sampled` draws candidates from the drafter's own law and hands
the law over. Both work for any drafter that can answer `step`; neither knows what is behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from outdraft.cache import SlotCache
from outdraft.drafters.base import Pace, RowContext, TreeShape
from outdraft.tree import Tree

Step = Callable[[Tensor, Tensor], Tensor]
"""(tokens, parents), each `(rows, nodes)`, parents indexing the level before -> `(rows, nodes, vocab)` draft logits."""


def grow(roots: Tensor, logits: Tensor, step: Step, shape: TreeShape, rows: RowContext) -> Tree:
    """A tree of at most `shape` below each of the `(rows,)` root tokens, whose draft logits are `(rows, vocab)`.

    Where the context has a pace, rows draft no further than it wants; the caller has asked it for the first level.
    """
    if shape.size == 1:
        return Tree.roots(roots)
    if shape.candidates == "top-k" or rows.greedy:
        return grow_dynamic(roots, logits, step, shape, rows.pace)
    return grow_sampled(roots, logits, step, shape, rows)


def grow_dynamic(roots: Tensor, logits: Tensor, step: Step, shape: TreeShape, pace: Pace | None = None) -> Tree:
    """EAGLE-2's tree: every level expands the `top_k` nodes of largest cumulative probability; the `size - 1` best of
    all candidates stay, or as many as the pace says. Deterministic, so the candidates count as point masses."""
    batch, vocab = logits.shape
    k, most = min(shape.top_k, vocab), shape.size - 1
    scores, tokens = log_softmax(logits).topk(k)
    levels = [_Level(tokens, scores, torch.zeros_like(tokens))]
    nodes = torch.arange(1, k + 1, device=logits.device).expand(batch, k)  # of the level to expand, the root being 0
    above = torch.zeros_like(nodes)  # their parents' places in the level before
    wanted = [True] * batch
    if pace is not None:
        wanted = pace.going
        levels[0].drop([not going for going in wanted])
        pace.drafted(scores.exp().sum(1).tolist())
    count = k
    for _ in range(shape.depth):
        if pace is not None:
            wanted = pace.wants(min(most, count + k) - min(most, count))
            if not any(wanted):
                break
        child_scores, child_tokens = log_softmax(step(tokens, above)).topk(k)
        child_scores = child_scores + scores[..., None]
        mass = scores.exp().sum(1)
        levels.append(_Level(child_tokens.flatten(1), child_scores.flatten(1), nodes.repeat_interleave(k, dim=1)))
        first, count = 1 + count, count + k * k
        scores, best = levels[-1].scores.topk(k)
        tokens, above, nodes = levels[-1].tokens.gather(1, best), best // k, first + best
        if pace is not None:
            levels[-1].drop([not going for going in wanted])
            pace.drafted((scores.exp().sum(1) / mass).tolist())
    return _best(roots, levels, most, pace)


@dataclass
class _Level:
    """Candidates of one level, each `(rows, candidates)`; parents index those of all levels, the root being 0."""

    tokens: Tensor
    scores: Tensor
    parents: Tensor

    def drop(self, rows: Sequence[bool]) -> None:
        """Take the level out of these rows."""
        if any(rows):
            gone = torch.tensor(rows, device=self.scores.device)[:, None]
            self.scores = self.scores.masked_fill(gone, -torch.inf)


def _best(roots: Tensor, levels: Sequence[_Level], most: int, pace: Pace | None) -> Tree:
    """The trees of the most probable candidates, at most so many a row."""
    tokens = torch.cat([level.tokens for level in levels], dim=1)
    scores = torch.cat([level.scores for level in levels], dim=1)
    parents = torch.cat([level.parents for level in levels], dim=1)
    # A stable sort keeps a parent before a child of equal probability, so that no kept node loses its parent.
    scores, order = scores.sort(dim=1, descending=True, stable=True)
    order, counts = order[:, :most], [min(most, scores.shape[1])] * len(roots)
    if pace is not None:
        gains = [[gain for gain in row if gain > 0] for row in scores[:, :most].exp().tolist()]
        own = torch.cat([torch.full_like(level.tokens, place) for place, level in enumerate(levels)], dim=1)
        counts = pace.sizes(gains, own.gather(1, order).tolist())
        order = order[:, : max(counts)]
        beyond = torch.arange(order.shape[1], device=order.device) >= torch.tensor(counts, device=order.device)[:, None]
        order = order.masked_fill(beyond, tokens.shape[1])  # sorts behind every candidate; its parent is the root
        tokens, parents = F.pad(tokens, (0, 1)), F.pad(parents, (0, 1))
    kept = order.sort(dim=1).values
    renumber = torch.zeros(len(roots), tokens.shape[1] + 1, dtype=torch.long, device=roots.device)
    renumber.scatter_(1, kept + 1, torch.arange(1, kept.shape[1] + 1, device=roots.device).expand_as(kept))
    tree_parents = renumber.gather(1, parents.gather(1, kept))
    return Tree(
        torch.cat([roots[:, None], tokens.gather(1, kept)], dim=1),
        torch.cat([torch.full_like(roots[:, None], -1), tree_parents], dim=1),
        [1 + count for count in counts],
    )


def grow_sampled(roots: Tensor, logits: Tensor, step: Step, shape: TreeShape, rows: RowContext) -> Tree:
    """`top_k` first tokens drawn from the draft law, each continued by a chain drawn token by token.

    How far is settled before anything is drawn: no candidate is dropped for what it turned out to be.
    """
    batch, replacing, pace = len(roots), shape.candidates == "sampled-with-replacement", rows.pace
    width = min(shape.top_k, shape.size - 1)
    length = min(shape.depth + 1, (shape.size - 1) // width)
    wanted = [True] * batch if pace is None else pace.going
    draws = [_RowDraws(row, logits[row], width if wanted[row] else 0, replacing, rows) for row in range(batch)]
    if pace is not None:
        pace.drafted([draw.confidence() for draw in draws])
    above = torch.arange(width, device=logits.device).expand(batch, width)
    for level in range(1, length):
        if pace is not None:
            wanted = pace.wants(width)
            if not any(wanted):
                break
        tokens = torch.tensor([draw.newest(width) for draw in draws], device=logits.device)
        level_logits = step(tokens, above if level > 1 else torch.zeros_like(above))
        for draw, row_logits, going in zip(draws, level_logits, wanted, strict=True):
            if going:
                draw.extend(row_logits)
        if pace is not None:
            pace.drafted([draw.confidence() for draw in draws])
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

    def newest(self, width: int) -> list[int]:
        """The chains' last tokens, filled up to the width of the batch."""
        return [chain[-1] for chain in self.chains] + [0] * (width - len(self.chains))

    def confidence(self) -> float:
        """In the newest level: of first tokens all together, of later ones the mean of the chains."""
        if not self.chains:
            return 0.0
        if len(self.laws) == 1:
            return float(self.laws[0][list({chain[0] for chain in self.chains})].sum())
        laws = self.laws[-len(self.chains) :]
        return sum(float(law[chain[-1]]) for law, chain in zip(laws, self.chains, strict=True)) / len(laws)

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
