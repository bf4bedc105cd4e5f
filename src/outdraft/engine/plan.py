"""One plan a round: who drafts how much, and who is told what came of it.

Three things can decide on a draft, in this order:

1. Where every row's text goes on as it did before, those n-grams are the drafts, and the drafter is not asked.
2. Where a tuner chooses whole shapes, or rows have controllers that decide level by level, the drafter alone drafts as
   far as they say: they weigh what its rounds bring.
3. Else the drafter drafts trees of the batch's shape, and rows whose text repeats itself have their n-grams in their
   tree's place.

A plan is made from what was decided in earlier rounds, before anything of its own round is drawn, so it changes no
row's output distribution.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from outdraft.control.budget import DraftBudget
from outdraft.control.tuner import Choice
from outdraft.core.shape import TreeShape
from outdraft.core.tree import Tree
from outdraft.core.verify import Verdict
from outdraft.engine.rows import Row

if TYPE_CHECKING:
    from outdraft.engine.round import Batch

MOST_NODES = 256
"""Nodes of all rows up to which they are padded to the longest n-gram draft: what a compiled forward takes."""

MOST_PENDING = 64
"""Tokens of a row that the drafter may be behind before it is asked again, whatever repeats: it takes them in at once,
in all rows as many as in the one that has most."""


@dataclass
class Plan:
    """What is drafted in one round.

    Attributes:
        shape: of the drafter's trees, at most.
        ngrams: of every row, the candidates that its own text gives; none where the drafter drafts for it.
        budget: decides level by level how far each row drafts; None as far as the shape allows.
        choice: the tuner's, which is told what its shape brought.
    """

    shape: TreeShape
    ngrams: Sequence[list[int]]
    budget: DraftBudget | None = None
    choice: Choice | None = None

    @property
    def asks_drafter(self) -> bool:
        """Whether the drafter drafts for any row."""
        return not all(self.ngrams) and self.shape.size > 1 and (self.budget is None or any(self.budget.going))

    @property
    def weighed(self) -> bool:
        """Whether somebody waits for the seconds of the round."""
        return self.budget is not None or self.choice is not None

    def observe(self, rows: Sequence[Row], tree: Tree, verdicts: Sequence[Verdict], laps: Sequence[float]) -> None:
        """Tell those who weigh what the round brought and cost.

        Args:
            rows: of the round, their statistics counted.
            tree: that was verified.
            verdicts: on each row.
            laps: seconds of drafting, verifying and the rest.
        """
        accepted = [len(verdict.path) - 1 for verdict in verdicts]
        if self.choice is not None:
            self.choice.observe(accepted, sum(laps))
        if self.budget is not None:
            depths = [row.statistics.depths[-1] for row in rows]
            emitted = [len(verdict.tokens) for verdict in verdicts]
            self.budget.observe(depths, accepted, emitted, tree.counts, *laps[1:])


def plan_round(batch: Batch) -> Plan:
    """The plan of a batch's next round, by the order of precedence above."""
    nothing: list[list[int]] = [[]] * len(batch.rows)
    ngrams = _ngrams(batch)
    if all(ngrams) or not batch.drafts.able:
        return Plan(batch.shape, ngrams)
    shape = _fitting(batch, batch.shape)
    controllers = [row.controller for row in batch.rows if row.controller is not None]
    pacer = controllers[0].pacer if controllers else None
    # A drafter that asks no budget is not stopped by one: only whole shapes can be chosen for it, as for a batch.
    rows = len(batch.rows) if batch.drafts.heeds_budget else max(2, len(batch.rows))
    tuner = None if pacer is None else pacer.tuner(batch.shape, rows)
    if tuner is not None:
        choice = tuner.choose(len(batch.rows), batch.drafts.pending)
        shape = _fitting(batch, choice.shape)
        if shape == choice.shape:
            return Plan(shape, nothing, choice=choice)
    if tuner is None and controllers:
        levels, nodes = (0 if shape.size == 1 else shape.depth + 1), min(shape.top_k, shape.size - 1)
        budget = DraftBudget(controllers, batch.costs, levels, nodes, batch.drafts.pending, batch.clock.now)
        return Plan(shape, nothing, budget)
    return Plan(shape, ngrams)


def _ngrams(batch: Batch) -> list[list[int]]:
    """Of every row, the candidates that its own text gives, none where it repeats nothing.

    In company a greedy row waits for all others to repeat themselves, too: all pay for the longest, and padding the
    drafter's trees to it was slower in every batch. Rows that draw do not wait, and have no more candidates than
    the tree, for a seed's text is to be the same in any company. The first round is the drafter's, which then has
    read the prompts before these rows join others.
    """
    drafts = batch.drafts
    if not drafts.asked or batch.shape.size == 1 or drafts.pending > MOST_PENDING:
        return [[]] * len(batch.rows)
    greedy = [row.warper.greedy for row in batch.rows]
    limit = max(1, MOST_NODES // len(greedy) - 1) if all(greedy) else batch.shape.size - 1
    if batch.target.slot_limit is not None:
        left = batch.target.slot_limit - max(batch.cache.lengths) - drafts.slots(batch.shape) - drafts.pending
        limit = max(0, min(limit, left))
    found = [history.repeated(limit) for history in batch.histories]
    if all(found):
        return found
    return [[] if waits else chain for chain, waits in zip(found, greedy, strict=True)]


def _fitting(batch: Batch, shape: TreeShape) -> TreeShape:
    """As much of the shape as still fits where a family's attention limits the slots."""
    limit = batch.target.slot_limit
    if limit is None:
        return shape
    left = limit - max(batch.cache.lengths)
    while shape.size > 1 and batch.drafts.slots(shape) > left:
        shape = shape.at_most(max(1, shape.depth), shape.size - 1)
    return shape
