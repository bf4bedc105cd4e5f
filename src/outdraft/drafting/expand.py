"""Tree expansion for a drafter that gives logits one level per step.

`grow_dynamic` is EAGLE-2 (arXiv 2406.16858, section 4): it expands the nodes with the largest cumulative draft
probability, then keeps the best of all candidates. `grow_sampled` (`sample.py`) draws candidates from the drafter's own
distribution. Both work for any drafter that implements `Step`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from outdraft.core.sampling import greatest, scores_of
from outdraft.core.shape import TreeShape
from outdraft.core.tensors import counting, sent
from outdraft.core.tree import Tree
from outdraft.drafting.base import Budget, RowContext
from outdraft.drafting.sample import Step, grow_sampled


def grow(roots: Tensor, logits: Tensor, step: Step, shape: TreeShape, rows: RowContext) -> Tree:
    """Build trees of at most `shape` below the `(rows,)` root tokens, whose draft logits are `(rows, vocab)`.

    If the context has a budget, rows draft no further than it allows; the caller has asked it for the first level.
    """
    if shape.size == 1:
        return Tree.roots(roots)
    chosen = shape.candidates == "top-k" or rows.greedy
    if (rows.coupled or chosen) and rows.guided(logits.device):  # where candidates are drawn, their warpers mask them
        logits, step = _guided(logits, step, rows)
    if rows.coupled:
        return _grow_coupled(roots, logits, step, shape, rows)
    if chosen:
        return grow_dynamic(roots, logits, step, shape, rows.budget)
    return grow_sampled(roots, logits, step, shape, rows)


def _guided(logits: Tensor, step: Step, rows: RowContext) -> tuple[Tensor, Step]:
    """The drafter's first logits and its step without the tokens that rows' guides rule out: those are never accepted.

    Where a guide leaves nothing that the drafter knows, or fails, its logits stay as they are.
    """
    paths: list[list[list[int]]] = [[[]] for _ in rows.warpers]  # of every row's newest nodes, below the root

    def masked(logits: Tensor) -> Tensor:
        logits = logits.clone()
        for row, warper in enumerate(rows.warpers):
            for node, path in enumerate(paths[row] if warper.guides else []):
                prefix = torch.cat([rows.prefixes[row], rows.prefixes[row].new_tensor(path)])[None]
                for guide in warper.guides:
                    with suppress(Exception):  # verification asks again, and then it ends this row alone
                        found = guide(prefix, logits[row, node][None])[0]
                        if found.max() > -torch.inf:
                            logits[row, node] = found
        return logits

    def guided_step(tokens: Tensor, above: Tensor) -> Tensor:
        nonlocal paths
        pairs = zip(paths, tokens.tolist(), above.tolist(), strict=True)
        paths = [[[*own[place], token] for token, place in zip(*level, strict=True)] for own, *level in pairs]
        return masked(step(tokens, above))

    return masked(logits[:, None])[:, 0], guided_step


def grow_dynamic(roots: Tensor, logits: Tensor, step: Step, shape: TreeShape, budget: Budget | None = None) -> Tree:
    """Build EAGLE-2's tree. Every level expands the `top_k` nodes of largest cumulative probability. The `size - 1`
    best of all candidates stay, or as many as the budget says. It is deterministic, so candidates are point masses."""
    batch, vocab = logits.shape
    k, most = min(shape.top_k, vocab), shape.size - 1
    if k == 1 and budget is None:
        return grow_chain(roots, logits, step, min(most, shape.depth + 1))
    scores, tokens = log_softmax(logits).topk(k)
    levels = [Level(tokens, scores, torch.zeros_like(tokens))]
    nodes = counting(1, k, logits.device).expand(batch, k)  # nodes of the level to expand; the root is 0
    above = torch.zeros_like(nodes)  # indices of their parents in the level before
    wanted = [True] * batch
    if budget is not None:
        wanted = budget.going
        levels[0].drop([not going for going in wanted])
        budget.drafted(scores.exp().sum(1).tolist())
    count = k
    for _ in range(shape.depth):
        if budget is not None:
            wanted = budget.wants(min(most, count + k) - min(most, count))
            if not any(wanted):
                break
            mass = scores.exp()
        child_scores, child_tokens = log_softmax(step(tokens, above)).topk(k)
        levels.append(Level(child_tokens.flatten(1), (child_scores + scores[..., None]).flatten(1), _each(nodes, k)))
        first, count = 1 + count, count + levels[-1].tokens.shape[1]
        scores, best = levels[-1].scores.topk(k)
        tokens, above, nodes = levels[-1].tokens.gather(1, best), best // k, first + best
        if budget is not None:
            levels[-1].drop([not going for going in wanted])
            budget.drafted((scores.exp().sum(1) / mass.sum(1)).tolist())
    return best_of(roots, levels, most) if budget is None else best_within(roots, levels, most, budget)


def _grow_coupled(roots: Tensor, logits: Tensor, step: Step, shape: TreeShape, rows: RowContext) -> Tree:
    """Run `grow_dynamic` for coupled rows: it ranks what the drafter would choose under the target's noise."""
    depth = 0

    def choosing(logits: Tensor) -> Tensor:
        nonlocal depth
        noise = torch.stack([chance.at(depth) for chance in rows.chances]).log()  # type: ignore[attr-defined]
        scores = scores_of(rows.warpers, logits)
        depth += 1
        return scores - (noise if scores.dim() == 2 else noise[:, None])

    return grow_dynamic(roots, choosing(logits), lambda *level: choosing(step(*level)), shape, rows.budget)


def grow_chain(roots: Tensor, logits: Tensor, step: Step, length: int) -> Tree:
    """Run `grow_dynamic` with one candidate per level: no ranking is needed, and every drafted candidate stays."""
    chain = [roots, greatest(logits)]
    above = torch.zeros_like(roots)[:, None]
    for _ in range(length - 1):
        chain.append(greatest(step(chain[-1][:, None], above)[:, 0]))
    return Tree.chains(torch.stack(chain, dim=1), 1)


def _each(nodes: Tensor, times: int) -> Tensor:
    """Repeat every node `times` times in a row: `(rows, nodes * times)`."""
    return nodes[..., None].expand(*nodes.shape, times).flatten(1)


@dataclass
class Level:
    """The candidates of one level, each tensor `(rows, candidates)`; parents index all levels' nodes, root 0."""

    tokens: Tensor
    scores: Tensor
    parents: Tensor

    def drop(self, rows: Sequence[bool]) -> None:
        """Remove the level from the rows marked True."""
        if any(rows):
            gone = torch.tensor(rows, device=self.scores.device)[:, None]
            self.scores = self.scores.masked_fill(gone, -torch.inf)


def best_of(roots: Tensor, levels: Sequence[Level], most: int) -> Tree:
    """Build the trees of the most probable candidates, at most `most` per row."""
    tokens, scores, parents = _joined(levels)
    # A stable sort keeps a parent before a child of equal probability, so that no kept node loses its parent.
    kept = scores.sort(dim=1, descending=True, stable=True).indices[:, :most].sort(dim=1).values
    renumber = torch.zeros(len(roots), tokens.shape[1] + 1, dtype=torch.long, device=roots.device)
    renumber.scatter_(1, kept + 1, counting(1, kept.shape[1], roots.device).expand_as(kept))
    return Tree(
        torch.cat([roots[:, None], tokens.gather(1, kept)], dim=1),
        F.pad(renumber.gather(1, parents.gather(1, kept)), (1, 0), value=-1),
        [1 + kept.shape[1]] * len(roots),
        levels=len(levels),
    )


def best_within(roots: Tensor, levels: Sequence[Level], most: int, budget: Budget) -> Tree:
    """Build the trees of the most probable candidates, at most `most` per row and as many as the budget says; on the
    host, where it decides."""
    tokens, scores, parents = (part.tolist() for part in _joined(levels))
    place = [depth for depth, level in enumerate(levels) for _ in range(level.tokens.shape[1])]
    # Sorting is stable, as in `best_of`.
    orders = [
        sorted((node for node, score in enumerate(own) if math.isfinite(score)), key=own.__getitem__, reverse=True)[
            :most
        ]
        for own in scores
    ]
    gains = [[math.exp(own[node]) for node in order] for own, order in zip(scores, orders, strict=True)]
    counts = budget.sizes(gains, [[place[node] for node in order] for order in orders])
    width = max(counts)
    if not width:
        return Tree.roots(roots)
    trees: list[list[list[int]]] = [[], []]  # tokens and parents of every row, the root's left out
    for row, (order, count) in enumerate(zip(orders, counts, strict=True)):
        kept = sorted(order[:count])
        number = {0: 0} | {node + 1: new for new, node in enumerate(kept, start=1)}
        padding = [0] * (width - count)
        trees[0].append([tokens[row][node] for node in kept] + padding)
        trees[1].append([number[parents[row][node]] for node in kept] + padding)
    below = sent(trees, roots.device)
    return Tree(
        torch.cat([roots[:, None], below[0]], dim=1),
        F.pad(below[1], (1, 0), value=-1),
        [1 + count for count in counts],
        levels=len(levels),
    )


def _joined(levels: Sequence[Level]) -> list[Tensor]:
    """Return tokens, scores and parents of all levels, each `(rows, candidates)`."""
    return [torch.cat([getattr(level, name) for level in levels], dim=1) for name in ("tokens", "scores", "parents")]


def log_softmax(logits: Tensor) -> Tensor:
    """Return log-probabilities in float32 at least, whatever precision the drafter has."""
    return logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
