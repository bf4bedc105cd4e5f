"""The plan of one round: which rows draft how much, from which source, and who observes the result.

The first rule that applies decides:

1. If every row's text continues a repetition, the n-grams are the drafts, and the drafter is not asked.
2. If a tuner chooses whole shapes, or rows have controllers that decide level by level (`DraftBudget`), only the
   drafter drafts, as far as they say. They measure what the drafter's rounds bring. Where controllers of greedy rows
   let the drafter rest, shorter repetitions are drafted.
3. Otherwise, or if the tuner's shape does not fit the cache, the drafter drafts trees of the batch's shape. In rows
   that sample and whose text repeats itself, n-gram drafts override those trees.

A plan depends only on earlier rounds, and is made before anything of its own round is drawn. So it changes no row's
output distribution.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from outdraft.control.base import Controller
from outdraft.control.costs import Costs
from outdraft.control.shape_grid import PLAIN
from outdraft.control.tuner import ShapeChoice, ShapeTuner
from outdraft.core.shape import TreeShape
from outdraft.core.tensors import now
from outdraft.core.tree import Tree
from outdraft.core.verify import Verdict
from outdraft.engine.rows import Row
from outdraft.target.ranks import said_by_first

if TYPE_CHECKING:
    from outdraft.engine.round import Batch


Seconds = TypeVar("Seconds", float, list[float])

MOST_NODES = 256
"""Largest sum of nodes over all rows that n-gram drafts may be padded to; compiled forwards take no more."""

USUAL = 64
"""Tokens that an answer is expected to gain yet; once it has more, as many as it has."""
MOST_PENDING = 64
"""Most pending tokens per row before the drafter is asked again, even if texts repeat. The drafter reads pending tokens
in one go, padded to the row that has most."""


@dataclass
class Plan:
    """The drafts of one round.

    Attributes:
        shape: largest shape of the drafter's trees.
        ngrams: n-gram candidates of every row; empty where the drafter drafts for the row.
        budget: decides level by level how far each row drafts; None drafts as far as the shape allows.
        choice: the tuner's choice, which observes what its shape brought.
        idle: True if the n-grams are short ones, drafted as the drafter rests.
    """

    shape: TreeShape
    ngrams: Sequence[list[int]]
    budget: DraftBudget | None = None
    choice: ShapeChoice | None = None
    idle: bool = False

    @property
    def asks_drafter(self) -> bool:
        """True if the drafter drafts for at least one row."""
        return not all(self.ngrams) and self.shape.size > 1 and (self.budget is None or any(self.budget.going))

    @property
    def weighed(self) -> bool:
        """True if a budget or a tuner needs the seconds of this round."""
        return self.budget is not None or self.choice is not None

    def observe(self, rows: Sequence[Row], tree: Tree, verdicts: Sequence[Verdict], laps: Sequence[float]) -> None:
        """Report what the round brought and cost to the tuner's choice and the budget.

        Args:
            rows: the rows of the round, after their statistics were counted.
            tree: the tree that was verified.
            verdicts: one verdict per row.
            laps: seconds of drafting, of verifying and of the rest.
        """
        accepted = [len(verdict.path) - 1 for verdict in verdicts]
        if self.choice is not None:
            self.choice.observe(accepted, sum(laps))
        if self.budget is not None:
            depths = [row.statistics.depths[-1] for row in rows]
            emitted = [len(verdict.tokens) for verdict in verdicts]
            drafting, verifying, rest = laps
            rest += max(0.0, drafting - self.budget.seconds)  # what is done before and after the levels
            self.budget.observe(depths, accepted, emitted, tree.counts, verifying, rest)


def plan_round(batch: Batch) -> Plan:
    """Make the plan of a batch's next round, by the rules above."""
    nothing: list[list[int]] = [[]] * len(batch.rows)
    controllers = [row.controller for row in batch.rows if row.controller is not None]
    tuner = tuner_of(batch, len(batch.rows))
    ngrams = _ngrams(batch, unread=tuner is not None and tuner.best(len(batch.rows)) == PLAIN)
    if all(ngrams) or not batch.drafts.able:
        return Plan(batch.shape, ngrams)
    shape = _fitting(batch, batch.shape)
    if tuner is not None:
        choice = tuner.choose(len(batch.rows), batch.drafts.pending, fmean(map(_left, batch.rows)))
        shape = _fitting(batch, choice.shape)
        if shape == choice.shape:
            arbitrary = [[row.tokens[-1]] for row in batch.rows]
            return Plan(shape, arbitrary if choice.gauges else nothing, choice=choice)
    if tuner is None and controllers:
        if all(controller.resting for controller in controllers):
            for controller in controllers:
                controller.rest()
            batch.costs.count_undrafted(len(controllers))
            return _idle(batch, None)
        levels, nodes = (0 if shape.size == 1 else shape.depth + 1), min(shape.top_k, shape.size - 1)
        budget = DraftBudget(controllers, batch.costs, levels, nodes, batch.drafts.pending, batch.clock.now)
        return Plan(shape, nothing, budget) if any(budget.going) or budget.measures_plain else _idle(batch, budget)
    return Plan(shape, ngrams)


def tuner_of(batch: Batch, rows: int) -> ShapeTuner | None:
    """Return the tuner that chooses the shapes of a batch once it has so many rows, if one does."""
    pacer = batch.rows[0].controller.pacer if batch.rows and batch.rows[0].controller is not None else None
    # A drafter that asks no budget is not stopped by one: only whole shapes can be chosen for it, as for a batch.
    return None if pacer is None else pacer.tuner(batch.shape, rows if batch.drafts.heeds_budget else max(2, rows))


def _left(row: Row) -> float:
    """Return the tokens that a row is expected to gain yet."""
    return min(row.max_new_tokens - len(row.tokens), max(USUAL, len(row.tokens)))


def _idle(batch: Batch, budget: DraftBudget | None) -> Plan:
    """Return the plan of a round in which the drafter rests: shorter n-grams in greedy rows if they pay, else plain."""
    greedy = all(row.warper.greedy for row in batch.rows)
    ngrams = _ngrams(batch, idle=greedy, unread=True)
    if all(ngrams):
        rows = len(batch.rows)
        cost = batch.costs.added(max(map(len, ngrams)), rows) / batch.costs.plain(rows)
        if all(history.luck.worth(cost) for history in batch.histories):
            return Plan(batch.shape, ngrams, budget, idle=True)
    return Plan(PLAIN, [[]] * len(batch.rows), budget)


def _ngrams(batch: Batch, idle: bool = False, unread: bool = False) -> list[list[int]]:
    """Return the n-gram candidates of every row, empty where its text repeats nothing.

    In a batch, greedy rows wait until all rows repeat themselves: all pay for the longest draft, and padding the
    drafter's trees to it was slower in every batch. Sampled rows do not wait, and have no more candidates than the
    tree, so that a seed's text does not depend on the batch. The drafter drafts every row's first round, wherever the
    row is by then, so that it has read the prompts.

    Args:
        idle: True if shorter repetitions are enough, as the drafter rests.
        unread: True if it does not matter how much the drafter has not read, as it is not asked either way.
    """
    drafts = batch.drafts
    late = not unread and (not drafts.asked or drafts.pending > MOST_PENDING)
    if batch.shape.size == 1 or late:
        return [[]] * len(batch.rows)
    greedy = [row.warper.greedy for row in batch.rows]
    limit = max(1, MOST_NODES // len(greedy) - 1) if all(greedy) else batch.shape.size - 1
    if batch.target.slot_limit is not None:
        left = batch.target.slot_limit - max(batch.cache.lengths) - drafts.slots(batch.shape) - drafts.pending
        limit = max(0, min(limit, left))
    found: list[list[int]] = []
    for history, row in zip(batch.histories, batch.rows, strict=True):
        found.append(history.repeated(limit, idle) if row.statistics.rounds else [])
        if not found[-1] and all(greedy):
            return [[]] * len(greedy)  # others need not be searched
    return found if all(found) else [[] if waits else chain for chain, waits in zip(found, greedy, strict=True)]


def _fitting(batch: Batch, shape: TreeShape) -> TreeShape:
    """Shrink the shape until it fits, where a model family's attention limits the slots."""
    limit = batch.target.slot_limit
    if limit is None:
        return shape
    left = limit - max(batch.cache.lengths)
    while shape.size > 1 and batch.drafts.slots(shape) > left:
        shape = shape.at_most(max(1, shape.depth), shape.size - 1)
    return shape


class DraftBudget:
    """Decides how far each row of a batch drafts in one round, by the rows' controllers (a `Budget` for drafters).

    Args:
        costs: learns what the round cost.
        levels: largest number of levels in this round.
        nodes: nodes of the first level.
        pending: largest number of tokens per row that the drafter catches up on first.
        now: a clock in seconds that has waited for the device.
    """

    def __init__(
        self,
        controllers: Sequence[Controller],
        costs: Costs,
        levels: int,
        nodes: int = 1,
        pending: int = 0,
        now: Callable[[], float] = time.perf_counter,
    ):
        self.controllers, self.costs, self.levels, self.now = controllers, costs, levels, now
        for controller in controllers:
            controller.rows = len(controllers)
        self.confidences: list[list[float]] = [[] for _ in controllers]
        self.resting = [bool(controller.resting) for controller in controllers]
        self.measures_plain = costs.plain_is_due(len(controllers))
        """True if this round is plain to be timed."""
        able = levels > 0 and not self.measures_plain
        self.going = [able and not rests for rests in self.resting]
        self._laps: list[float] = []
        # If the drafter catches up on a prompt or on many plain rounds, this round's time includes work of others.
        self._usual = pending <= levels + 1
        self._last = now()
        self.wants(nodes)

    @property
    def seconds(self) -> float:
        """Seconds of the levels that were drafted."""
        return sum(self._laps)

    @property
    def asked(self) -> bool:
        """Whether the drafter told it of any level that it drafted."""
        return bool(self._laps)

    def wants(self, nodes: int) -> list[bool]:
        """Implement `Budget.wants`; the constructor asks for the first level."""
        rows = zip(self.going, self.confidences, self.controllers, strict=True)
        self.going = [
            going and len(kept) < self.levels and controller.decide(kept, nodes) for going, kept, controller in rows
        ]
        return self.going

    def drafted(self, confidences: Sequence[float | None]) -> None:
        """Implement `Budget.drafted`; the seconds since the last level count for this one."""
        for row, confidence in enumerate(confidences):
            if self.going[row] and confidence is not None:
                self.confidences[row].append(confidence)
        self.going = [going and sure is not None for going, sure in zip(self.going, confidences, strict=True)]
        now = self.now()
        self._laps.append(now - self._last)
        self._last = now

    def sizes(self, gains: Sequence[Sequence[float]], levels: Sequence[Sequence[int]]) -> list[int]:
        """Implement `Budget.sizes`."""
        rows = zip(self.controllers, self.confidences, gains, levels, strict=True)
        return [controller.size(kept, row, own[: len(row)]) if len(row) else 0 for controller, kept, row, own in rows]

    def observe(
        self,
        depths: Sequence[int],
        accepted: Sequence[int],
        emitted: Sequence[int],
        nodes: Sequence[int],
        verify_seconds: float,
        rest_seconds: float,
    ) -> None:
        """Report the round to costs and controllers.

        Args:
            depths: final number of levels of each row's tree.
            accepted: candidates accepted in each row.
            emitted: tokens that each row gained.
            nodes: nodes of each row's tree, the root included.
            verify_seconds: seconds of the target's pass over the trees.
            rest_seconds: seconds of everything but drafting and that pass.
        """
        rows = len(self.controllers)
        if self._laps:
            self.costs.observe_draft(self._laps[0], self._laps[1:], rows, self._usual)
        self.costs.observe_round(max(nodes), verify_seconds, rest_seconds, rows)
        measured = self.seconds + verify_seconds + rest_seconds
        for row, controller in enumerate(self.controllers):
            if self.resting[row]:
                controller.rest()
                continue
            kept = self.confidences[row]
            # Given costs ignore other rows, so that the row decides as if it were not batched.
            seconds = self.costs.round(len(kept), nodes[row], rows) if self.costs.given else measured
            controller.observe(kept[: depths[row]], accepted[row], emitted[row], seconds)


class Clock:
    """The marks set during one round, and the seconds between them.

    Args:
        shared: True if several processes make the same rounds, so that the first one's clock decides.
    """

    def __init__(self, device: torch.device, shared: bool = False):
        self.device, self.shared = device, shared
        self.marks: list[Any] = []

    def now(self) -> float:
        """Return the time as `core.tensors.now` does."""
        return self.agreed(now(self.device))

    def agreed(self, seconds: Seconds) -> Seconds:
        """Return the seconds by which decisions are made, which are the same in every process."""
        return said_by_first(seconds) if self.shared else seconds

    def start(self) -> None:
        """Forget all marks and set the first."""
        self.marks = []
        self.mark()

    def mark(self) -> None:
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self.device))
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def laps(self, marks: list[Any] | None = None) -> list[float]:
        """Return the seconds between consecutive marks (default: since the start), once the last one is reached."""
        marks = self.marks if marks is None else marks
        pairs = list(pairwise(marks))
        if self.device.type == "cuda":
            marks[-1].synchronize()
            return [before.elapsed_time(after) / 1000 for before, after in pairs]
        return [after - before for before, after in pairs]
