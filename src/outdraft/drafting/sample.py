"""Candidates drawn from a drafter's own distribution, level by level, for all rows at once.

The trees hold the distributions that candidates were drawn from. Any drafter that implements `Step` can use this.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from outdraft.core.dice import draw_each
from outdraft.core.sampling import UNREAD, probs_of
from outdraft.core.shape import TreeShape
from outdraft.core.tensors import counting, integers
from outdraft.core.tree import Candidates, Tree
from outdraft.drafting.base import RowContext

Step = Callable[[Tensor, Tensor], Tensor]
"""(tokens, parents), each `(rows, nodes)`, parents indexing the level before -> `(rows, nodes, vocab)` draft logits."""


class Block:
    """A `Step` for drafters that compute the logits of all levels in one forward.

    Args:
        levels: `(rows, levels, vocab)` draft logits; those of the first level are `first`.
        adjust: adjusts a level's logits for the candidates before it: (level, tokens `(rows, nodes)`, logits `(rows,
            nodes, vocab)`) -> logits. With None, every node of a level has the same logits.
    """

    def __init__(self, levels: Tensor, adjust: Callable[[int, Tensor, Tensor], Tensor] | None = None):
        self._levels, self._adjust, self._level = levels, adjust, 0

    @property
    def first(self) -> Tensor:
        """`(rows, vocab)` logits after the root."""
        return self._levels[:, 0]

    def __call__(self, tokens: Tensor, parents: Tensor) -> Tensor:
        self._level += 1
        logits = self._levels[:, self._level, None].expand(-1, tokens.shape[1], -1)
        return logits if self._adjust is None else self._adjust(self._level, tokens, logits)


def grow_sampled(roots: Tensor, logits: Tensor, step: Step, shape: TreeShape, rows: RowContext) -> Tree:
    """Draw `top_k` first tokens from the draft distribution, and continue each by a chain drawn token by token.

    Lengths are decided before tokens are drawn, so no candidate is dropped because of its token.
    """
    replacing, budget = shape.candidates == "sampled-with-replacement", rows.budget
    width = min(shape.top_k, shape.size - 1)
    length = min(shape.depth + 1, (shape.size - 1) // width)
    chains = _Chains(logits, width, replacing, rows, [True] * len(roots) if budget is None else budget.going)
    if budget is not None:
        budget.drafted(chains.confidences())
    above = counting(0, width, logits.device).expand(len(roots), width)
    for level in range(1, length):
        if budget is not None:
            wanted = budget.wants(width)
            if not any(wanted):
                break
            chains.stop([not going for going in wanted])
        chains.extend(step(chains.tokens[-1], above if level > 1 else torch.zeros_like(above)))
        if budget is not None:
            budget.drafted(chains.confidences())
    return chains.tree(roots)


class _Chains:
    """The chains of all rows while they are drawn, and the distributions that they are drawn from.

    Args:
        logits: `(rows, vocab)` logits of the drafter after the roots.
        width: chains per row.
        replacing: True if several chains may begin with the same token.
        rows: random numbers and settings of the rows.
        wanted: for every row, True if it drafts at all.
    """

    def __init__(self, logits: Tensor, width: int, replacing: bool, rows: RowContext, wanted: Sequence[bool]):
        self.rows, self.width, self.replacing = rows, width, replacing
        root = probs_of(rows.warpers, logits, rows.prefixes)
        self.chains = [width if going else 0 for going in wanted]  # chains per row
        if not replacing and width > 1:
            # There are no more candidates than tokens of positive probability.
            self.chains = [min(most, own) for most, own in zip(self.chains, (root > 0).sum(1).tolist(), strict=True)]
        self.lengths = [int(chains > 0) for chains in self.chains]  # candidates in each chain of the row
        left, tokens = root.clone() if not replacing and width > 1 else root, []
        for chain in range(width):
            tokens.append(self._draw(left[:, None], [int(chain < chains) for chains in self.chains]))
            if left is not root:
                left.scatter_(1, tokens[-1], 0.0)
        self.tokens = [torch.cat(tokens, dim=1)]  # tokens of each level, (rows, width)
        self.probs = [root[:, None]]  # distributions of each level, (rows, 1 or width, vocab)
        self.going = [chains > 0 for chains in self.chains]

    def stop(self, rows: Sequence[bool]) -> None:
        """Stop the rows marked True: they draw no further."""
        self.going = [going and not stops for going, stops in zip(self.going, rows, strict=True)]

    def extend(self, logits: Tensor) -> None:
        """Draw one more token for every chain of the rows that go on, from `(rows, width, vocab)` logits."""
        warpers = self.rows.warpers
        self.lengths = [length + going for length, going in zip(self.lengths, self.going, strict=True)]
        prefixes = [self._before(row, chain) for row in range(len(warpers)) for chain in range(self.width)]
        probs = probs_of([warper for warper in warpers for _ in range(self.width)], logits.flatten(0, 1), prefixes)
        probs = probs.view(*logits.shape)
        self.tokens.append(
            self._draw(probs, [chains if self.going[row] else 0 for row, chains in enumerate(self.chains)])
        )
        self.probs.append(probs)

    def confidences(self) -> list[float]:
        """Return every row's confidence in its newest level: a sum over first tokens, later a mean over chains."""
        probs, tokens = self.probs[-1], self.tokens[-1]
        real = counting(0, self.width, tokens.device) < integers(self.chains, tokens.device)[:, None]
        if len(self.probs) == 1:
            chosen = torch.zeros_like(probs[:, 0]).scatter_reduce_(1, tokens, real.to(probs.dtype), "amax")
            return (probs[:, 0] * chosen).sum(1).tolist()
        shares = (probs.gather(2, tokens[..., None])[..., 0] * real).sum(1).tolist()
        return [share / max(1, chains) for share, chains in zip(shares, self.chains, strict=True)]

    def tree(self, roots: Tensor) -> Tree:
        """Build the tree of what was drawn, with its distributions; the last candidates have none after them."""
        candidates: Candidates = "with_replacement" if self.replacing else "without_replacement"
        tokens = torch.cat([roots[:, None], *self.tokens], dim=1)
        probs = torch.cat(self.probs, dim=1)
        nodes = 1 + self.width * len(self.tokens)
        probs = torch.cat([probs, probs.new_zeros(len(roots), nodes - probs.shape[1], probs.shape[2])], dim=1)
        if set(self.chains) == {self.width} and set(self.lengths) == {len(self.tokens)}:
            return Tree.chains(tokens, self.width, candidates, probs)
        # Rows of fewer or shorter chains: what they have comes first, what the batch drew beside it is padding.
        kept, parents = [], []
        counts = [1 + chains * length for chains, length in zip(self.chains, self.lengths, strict=True)]
        for chains, length in zip(self.chains, self.lengths, strict=True):
            own = [0] + [1 + level * self.width + chain for level in range(length) for chain in range(chains)]
            kept.append(own + [0] * (max(counts) - len(own)))
            above = [-1] + [max(0, node - chains) for node in range(1, len(own))]
            parents.append(above + [0] * (max(counts) - len(own)))
        order = torch.tensor(kept, device=roots.device)
        index = counting(0, len(kept), roots.device)[:, None]
        last = integers([count - chains for count, chains in zip(counts, self.chains, strict=True)], roots.device)
        declared = counting(0, max(counts), roots.device) < last[:, None]
        return Tree(
            tokens.gather(1, order),
            torch.tensor(parents, device=roots.device),
            counts,
            candidates,
            probs[index, order] * declared[..., None],
            levels=len(self.tokens),
        )

    def _draw(self, probs: Tensor, counts: Sequence[int]) -> Tensor:
        """Draw `(rows, chains)` tokens from the first `counts` distributions of every row of `(rows, chains, vocab)`.
        The others get token 0 and use no random number."""
        (rows, chains), flat, chances = probs.shape[:2], probs.flatten(0, 1), self.rows.chances
        last = flat.shape[-1] - 1  # stands for a draw from a NaN distribution; never accepted
        if min(counts) == chains:
            drawn = draw_each([chance for chance in chances for _ in range(chains)], flat)
            return drawn.clamp(max=last).view(rows, chains)
        drawn = torch.zeros(rows * chains, dtype=torch.long, device=probs.device)
        indices = [row * chains + chain for row, count in enumerate(counts) for chain in range(count)]
        if indices:
            index = torch.tensor(indices, device=probs.device)
            drawn[index] = draw_each([chances[place // chains] for place in indices], flat[index]).clamp(max=last)
        return drawn.view(rows, chains)

    def _before(self, row: int, chain: int) -> Tensor:
        """Return the tokens up to a chain's newest one if the warper reads them, else an empty tensor."""
        if not self.rows.warpers[row].reads_prefix:
            return UNREAD
        return torch.cat([self.rows.prefixes[row], torch.stack([level[row, chain] for level in self.tokens])])
