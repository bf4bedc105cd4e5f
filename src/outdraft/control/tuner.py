"""Autotuning: every round of a batch has the shape that brings the most tokens per second, the same for all rows.

Whole rounds are timed by shape, separately for every power of two of rows. Costs of levels, nodes or rows are not
modelled, so nothing is extrapolated from one size to another. The search is a hill climb: the best shape so far is
drafted, and a small share of the time goes to its neighbours. A choice depends only on earlier rounds and is made
before anything of its round is drawn, so it changes no row's distribution.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from math import log2
from operator import mul

from outdraft.control.base import FIRST_PROBE, MOST, RATE
from outdraft.control.costs import OUTLIER, Average, Costs, believable, bucket
from outdraft.core.shape import TreeShape

PLAIN = TreeShape(0, 1, 1)
"""The shape that drafts nothing."""
AGAIN = 12
"""Rounds after which a neighbour of the best shape is tried again."""
PLAIN_AGAIN = 50
"""Rounds after which plain decoding is timed again: what it was in a busier minute must not make drafts look good."""
ENOUGH = 2
"""Timed rounds of a shape before they are used."""
MEMORY = 10
"""Rounds that a shape's average covers; averages of single costs cover more, which was 1% slower here."""
APART = 0.06
"""Relative gain over plain decoding that drafting must promise, for every doubling of the rows. Drafted rows end at
different times, and a batch takes as long as its slowest row, which the mean over rows does not show."""
BATCH = 4
"""Rows from which a batch begins with short chains: on two cores so many nodes cost
(docs/reference/draft-shapes.md)."""
STEP_BY_STEP = 6
"""Number of levels up to which the grid has every number; beyond, each is about a quarter larger than the last."""
WIDE = 4
"""Candidates per level above which trees have narrower ones between themselves and chains."""
FIRST_CHANCE = 0.6
"""Prior probability that a first level is accepted."""
FIRM = 4.0
"""Weight, in observations, of a level's prior, which comes from other widths or from the level above."""


class ShapeGrid:
    """The shapes within some bounds, and the expected tokens per round of each.

    A grid has shapes by number of levels and candidates per level, from chains up to the bounds, and plain decoding.
    Acceptance is counted level by level, separately for every width, so that a round of one shape informs about all
    shapes of its width.

    Args:
        bounds: the largest shape.
        discount: weight of a round's verdict after one more round of the same width, in (0, 1].
    """

    def __init__(self, bounds: TreeShape, discount: float = 0.98):
        self.bounds, self.discount = bounds, discount
        self.most = min(bounds.depth + 1, bounds.size - 1)
        """Largest number of levels of a chain."""
        self.widths = widths(bounds.top_k)
        self.lines = [[self._shape(levels, width) for levels in lengths(self.most)] for width in self.widths]
        positions = {shape: (row, i) for row, line in enumerate(self.lines) for i, shape in enumerate(line)}
        self.positions = {shape: position for shape, position in positions.items() if shape != PLAIN}
        self.shapes = [PLAIN, *self.positions]
        self.accepted = {width: [0.0] * self.most for width in self.widths}
        self.judged = {width: [0.0] * self.most for width in self.widths}
        self._tokens: dict[TreeShape, float] = {}

    def start(self, rows: int) -> TreeShape:
        """Return the shape to begin with: a chain of half the bounds' levels, in batches a quarter.

        It is a tree only if bounds are so wide that they are meant for a device on which nodes cost little.
        """
        if not self.positions:
            return PLAIN
        wide = rows < BATCH and self.bounds.top_k > WIDE
        line, most = self.lines[-1 if wide else 0], max(1, self.most // (4 if rows >= BATCH else 2))
        return max((shape for shape in line if levels_of(shape) <= most), key=levels_of)

    def beside(self, shape: TreeShape) -> list[TreeShape]:
        """Return the neighbours to try: a length or a width more or less; next to plain, short chains."""
        if shape == PLAIN:
            return self.lines[0][:3] if self.positions else []
        row, position = self.positions[shape]
        around = [(row - 1, position), (row, position - 1), (row, position + 1), (row + 1, position)]
        inside = [(r, i) for r, i in around if 0 <= r < len(self.lines) and 0 <= i < len(self.lines[r])]
        return [self.lines[r][i] for r, i in inside] + [PLAIN] * (position == 0)

    def tokens(self, shape: TreeShape) -> float:
        """Return the expected tokens of a row in a round."""
        if not self._tokens:
            self._tokens[PLAIN] = 1.0
            for width, line in zip(self.widths, self.lines, strict=True):
                expected = list(accumulate(accumulate(self.chances(width), mul), initial=1.0))
                self._tokens |= {shape: expected[levels_of(shape)] for shape in line}
        return self._tokens[shape]

    def chances(self, width: int) -> list[float]:
        """Return, at index l, the probability that level l + 1 of this width is accepted if all above it are.

        Missing evidence of a level is taken from other widths, and beyond them from the level above.
        """
        chances, before = [], FIRST_CHANCE
        others = [other for other in self.widths if other != width]
        for level in range(self.most):
            for known in (others, [width]):
                accepted = sum(self.accepted[one][level] for one in known)
                before = (accepted + FIRM * before) / (sum(self.judged[one][level] for one in known) + FIRM)
            chances.append(before)
        return chances

    def observe(self, shape: TreeShape, accepted: Sequence[int]) -> None:
        """Learn from a round: candidates accepted in each row."""
        levels = levels_of(shape)
        if not levels:
            return
        self._tokens.clear()
        for sums in (self.accepted[shape.top_k], self.judged[shape.top_k]):
            sums[:levels] = [self.discount * amount for amount in sums[:levels]]
        for count in accepted:
            for level in range(min(count + 1, levels)):
                self.judged[shape.top_k][level] += 1
                self.accepted[shape.top_k][level] += level < count

    def _shape(self, levels: int, width: int) -> TreeShape:
        bounds = self.bounds
        if width == 1:
            return TreeShape(levels - 1, 1, levels + 1, bounds.candidates)
        share = (bounds.size - 1) / (bounds.depth + 1) * width / bounds.top_k
        nodes = levels * width if bounds.candidates != "top-k" else max(levels, width, int(levels * share))
        return TreeShape(levels - 1, width, min(bounds.size, 1 + nodes), bounds.candidates)


@dataclass
class Timings:
    """Measurements of batches of about so many rows: seconds of rounds by shape."""

    seconds: dict[TreeShape, Average] = field(default_factory=dict)
    drafted: dict[TreeShape, int] = field(default_factory=dict)
    """The round in which each shape was drafted last."""
    rounds: int = 0
    trying: TreeShape | None = None
    """A shape that is drafted until it is timed."""

    def of(self, shape: TreeShape) -> Average:
        # The first round of a size may have compiled or allocated something.
        return self.seconds.setdefault(shape, Average(ENOUGH, MEMORY))

    def time(self, shape: TreeShape, seconds: float, common: bool) -> None:
        """Record the seconds of a round.

        Args:
            common: True if a change is taken to hold for all shapes (a busier machine, a longer context). It must be
                True for the shape that is drafted all the time, or shapes not tried for a while would look fast.
        """
        # Few rounds are a biased sample, chosen because they were fast: slower ones after them are no change.
        before, steady = self.of(shape).value, self.of(shape).count >= MEMORY
        self.of(shape).observe(seconds)
        if common and steady:
            for other, average in self.seconds.items():
                if other != shape:
                    average.value *= self.of(shape).value / before


@dataclass
class ShapeChoice:
    """The shape chosen for one round, which passes the round's result to the tuner."""

    shape: TreeShape
    tuner: ShapeTuner
    rows: int
    pending: int

    def observe(self, accepted: Sequence[int], seconds: float) -> None:
        """Report the round to the tuner.

        Args:
            accepted: candidates accepted in each row.
            seconds: seconds of the whole round.
        """
        self.tuner.observe(self, accepted, seconds)


class ShapeTuner:
    """Chooses among the shapes within some bounds.

    Args:
        bounds: the largest shape.
        costs: given costs replace the clock and make choices repeatable; other costs are not used.
    """

    def __init__(self, bounds: TreeShape, costs: Costs):
        self.grid, self.costs = ShapeGrid(bounds), costs
        self.timings: dict[int, Timings] = {}
        self.credit = FIRST_PROBE
        """Rounds that trials may lose, as in `Safeguard`."""

    def choose(self, rows: int, pending: int) -> ShapeChoice:
        """Choose the shape of the next round.

        Args:
            rows: number of rows of the batch.
            pending: largest number of tokens per row that the drafter has not seen.
        """
        known = self.timings.setdefault(bucket(rows), Timings())
        known.rounds += 1
        known.trying = known.trying or self._to_try(known, rows)
        shape = known.trying or self.best(rows)
        known.drafted[shape] = known.rounds
        return ShapeChoice(shape, self, rows, pending)

    def best(self, rows: int) -> TreeShape:
        """Return the timed shape that brings the most tokens per second."""
        known = self.timings.get(bucket(rows), Timings())
        timed = [shape for shape in self.grid.shapes if self._is_timed(known, shape)]
        if not timed:
            return self._elsewhere(rows)
        apart = 1 + APART * log2(rows)

        def rate(shape: TreeShape) -> float:
            return self.grid.tokens(shape) * (apart if shape == PLAIN else 1) / self._seconds(known, shape, rows)

        return max(timed, key=rate)

    def observe(self, choice: ShapeChoice, accepted: Sequence[int], seconds: float) -> None:
        """Learn from a round, as in `ShapeChoice.observe`."""
        rows, shape, best = choice.rows, choice.shape, self.best(choice.rows)
        known = self.timings[bucket(rows)]
        self.credit = min(MOST, self.credit + RATE)
        # If the drafter catches up on a prompt or on many plain rounds, this round's time includes work of others.
        usual = levels_of(shape) == 0 or choice.pending <= self.grid.most + 2
        if self._is_timed(known, best) and shape != PLAIN:  # plain is timed when it is due, whatever that loses
            most = self._seconds(known, best, rows)
            spent = self._seconds(known, shape, rows) or believable(seconds, OUTLIER * most)
            if best == PLAIN and not usual and not self.costs.given:
                spent = max(spent, seconds)  # only the trial made it catch up
            self.credit -= max(0.0, spent / most - self.grid.tokens(shape) / self.grid.tokens(best))
        self.grid.observe(shape, accepted)
        if usual:
            known.time(shape, seconds, shape == best)
        if self._is_timed(known, shape):
            known.trying = None

    def _to_try(self, known: Timings, rows: int) -> TreeShape | None:
        """Return a shape other than the best, if a trial is due and affordable; else None."""
        best = self.best(rows)
        if not self._is_timed(known, best):
            return best
        if not self._is_timed(known, PLAIN) or known.rounds - known.drafted.get(PLAIN, 0) >= PLAIN_AGAIN:
            return PLAIN
        due = [
            shape
            for shape in self.grid.beside(best)
            if not self._is_timed(known, shape) or known.rounds - known.drafted.get(shape, 0) >= AGAIN
        ]
        able = [shape for shape in due if self._loss(known, shape, best, rows) <= self.credit]
        return min(able, key=lambda shape: (self._is_timed(known, shape), known.drafted.get(shape, 0)), default=None)

    def _is_timed(self, known: Timings, shape: TreeShape) -> bool:
        return self.costs.given or known.of(shape).count >= ENOUGH

    def _loss(self, known: Timings, shape: TreeShape, best: TreeShape, rows: int) -> float:
        """Return the expected loss of a round of this shape, in rounds of the best one."""
        least, most = (self._seconds(known, one, rows) for one in (PLAIN, best))
        node = max(0.0, most - least) / max(1, best.size - 1)
        seconds = self._seconds(known, shape, rows) or least + node * (shape.size - 1)
        return max(0.0, seconds / most - self.grid.tokens(shape) / self.grid.tokens(best))

    def _seconds(self, known: Timings, shape: TreeShape, rows: int) -> float:
        """Return the seconds of a round of this shape; 0 if unknown."""
        if self.costs.given:
            return self.costs.round(levels_of(shape), shape.size, rows)
        return known.of(shape).value

    def _elsewhere(self, rows: int) -> TreeShape:
        """Return the shape to begin with: the best one for the nearest other number of rows, else the grid's start."""
        known = [key for key, one in self.timings.items() if any(self._is_timed(one, shape) for shape in one.drafted)]
        if not known:
            return self.grid.start(rows)
        return self.best(1 << min(known, key=lambda key: (abs(key - bucket(rows)), key)))


def levels_of(shape: TreeShape) -> int:
    """Return the largest number of levels of a draft of this shape."""
    return 0 if shape.size == 1 else shape.depth + 1


def widths(most: int) -> list[int]:
    """Return the grid's numbers of candidates per level, chains first."""
    if most == 1:
        return [1]
    return [1, round(most**0.5), most] if most > WIDE else [1, most]


def lengths(most: int) -> list[int]:
    """Return the grid's numbers of levels."""
    found = list(range(1, min(most, STEP_BY_STEP) + 1))
    while found and found[-1] < most:
        found.append(min(most, found[-1] * 5 // 4 + 1))
    return found
