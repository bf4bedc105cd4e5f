"""The drafter of one batch: its pending updates, and the trees that a plan asks for."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from outdraft.core.shape import TreeShape
from outdraft.core.tree import Tree
from outdraft.drafting.base import Drafter, DraftState, RowContext, Update
from outdraft.drafting.ngrams import FullDrafts, spliced
from outdraft.engine.plan import Plan
from outdraft.engine.rows import Prefixes, Row
from outdraft.target.runner import ModelRunner

FIRST_DRAFTS, POOR = 64, 0.05
"""The number of drafts after which a drafter is judged, and the acceptance below which it is reported."""


class Drafts:
    """Trees for the rows of a batch, from n-grams of their own texts and from a drafter.

    Args:
        drafter: the model that proposes tokens; None is plain decoding.
    """

    def __init__(self, drafter: Drafter | None):
        self.drafter = drafter
        self.state: DraftState | None = None
        self.updates: list[Update] = []  # decided tokens that the drafter has not seen
        self.pending = 0
        """The largest number of such tokens of a row."""
        self.asked = False
        """True once the drafter has read the prompts."""
        self.heeds_budget = True
        """Whether the drafter asks the budget that it is given before each level."""

    @property
    def able(self) -> bool:
        """True if there is a drafter with a state."""
        return self.state is not None

    def slots(self, shape: TreeShape) -> int:
        """Return the slots of the target's cache that a round of this shape takes."""
        return shape.size if self.drafter is None else self.drafter.slots(shape)

    def begin(self, prompts: Sequence[Tensor], firsts: Sequence[int], taps: Tensor, run: ModelRunner) -> None:
        """Start the drafter's state after the target has run the prompts.

        Args:
            prompts: `(tokens,)` token ids of every row, on the host.
            firsts: the token decided after each prompt.
            taps: `(rows, tokens, width)` hidden states that the drafter reads of the target.
            run: the target's runner, which has run these prompts.
        """
        if self.drafter is None:
            return
        # Pairs (token one ahead, taps): the prompt from its second token on, then the token just decided.
        counts = [len(prompt) for prompt in prompts]
        tokens = torch.zeros(taps.shape[:2], dtype=torch.long)
        for i, (prompt, first) in enumerate(zip(prompts, firsts, strict=True)):
            tokens[i, : counts[i] - 1] = prompt[1:]
            tokens[i, counts[i] - 1] = first
        lists = [row[:count] for row, count in zip(tokens.tolist(), counts, strict=True)]
        self.updates, self.pending = [Update(tokens.to(taps.device), taps, counts, lists)], max(counts)
        self.state = self.drafter.begin([prompt.to(taps.device) for prompt in prompts], run)

    def read(self) -> bool:
        """Have the drafter read what was decided, as far as it can without drafting; return True if it has read so
        much that these rows can join others, to which what is left is padded."""
        if self.state is not None and self.updates:
            self.updates = [self.state.read(Update.join(self.updates))]
            self.pending = max(self.updates[0].counts)
            self.asked = self.pending == 1
        return self.state is None or self.asked

    def tell(self, tokens: Tensor, taps: Tensor, paths: Tensor, lists: list[list[int]]) -> None:
        """Queue the tokens that a round decided, for the drafter's next update.

        Args:
            tokens: `(rows, m)` decided tokens, right-padded.
            taps: `(rows, nodes, width)` hidden states of the tree's nodes.
            paths: `(rows, m)` index of the node before each token.
            lists: the decided tokens of every row, on the host.
        """
        if self.state is not None:
            index = paths[..., None].expand(-1, -1, taps.shape[-1])
            counts = [len(row) for row in lists]
            self.updates.append(Update(tokens, taps.gather(1, index), counts, lists))
            self.pending += max(counts)

    def trees(self, plan: Plan, roots: Tensor, rows: Sequence[Row], prefixes: Prefixes) -> Tree:
        """Build the trees of a plan below the `(rows,)` root tokens."""
        if all(plan.ngrams):
            chains = [[row.tokens[-1], *chain] for row, chain in zip(rows, plan.ngrams, strict=True)]
            return Tree.listed(chains, roots.device)
        if self.state is None or not plan.asks_drafter:
            return Tree.roots(roots)
        mixed = plan.budget is None and any(plan.ngrams)
        budget = FullDrafts([not chain for chain in plan.ngrams]) if mixed else plan.budget
        context = RowContext(prefixes, [row.warper for row in rows], [row.chance for row in rows], budget)
        update, self.updates, self.pending, self.asked = Update.join(self.updates), [], 0, True
        tree = self.state.propose(update, plan.shape, context)
        if plan.budget is not None and max(tree.counts) > 1:
            self.heeds_budget = plan.budget.asked
        return spliced(tree, plan.ngrams) if mixed else tree

    def judge(self, drafted: Sequence[bool]) -> None:
        """Count the drafter's drafts of a round, and warn once if hardly any has begun right.

        Args:
            drafted: for each row that the drafter drafted for, True if its first candidate was accepted.
        """
        drafter = self.drafter
        if not drafted or drafter is None or drafter.first_drafts >= FIRST_DRAFTS or not drafter.num_parameters:
            return
        drafter.first_drafts += len(drafted)
        drafter.first_right += sum(drafted)
        if drafter.first_drafts >= FIRST_DRAFTS and drafter.first_right < POOR * drafter.first_drafts:
            warnings.warn(
                f"{drafter.first_right} of the drafter's first {drafter.first_drafts} drafts began right; "
                "`outdraft doctor --model M --draft-model D` says whether it is read wrong or for another target",
                stacklevel=2,
            )

    def join(self, other: Drafts) -> None:
        """Append the rows of another batch that has the same drafter."""
        if self.state is not None and other.state is not None:
            self.state.join(other.state)
            self.updates = [Update.beside(Update.join(self.updates), Update.join(other.updates))]
            self.pending = max(self.updates[0].counts)

    def select_rows(self, rows: Sequence[int]) -> None:
        """Keep only these rows, in this order."""
        if self.updates:  # there may be one of every round since the drafter was asked
            self.updates = [Update.join(self.updates).select_rows(rows)]
            self.pending = max(self.updates[0].counts)
        if self.state is not None:
            self.state.select_rows(rows)
