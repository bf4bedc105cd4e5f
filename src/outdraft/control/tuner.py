"""Autotuning: every round of a batch has the shape that brings the most tokens per second, the same for all rows.

Whole rounds are timed by shape, separately for every power of two of rows. Costs of levels, nodes or rows are not
modelled, so nothing is extrapolated from one size to another. The search is a hill climb: the best shape so far is
drafted, and a small share of the time goes to its neighbours. A choice depends only on earlier rounds and is made
before anything of its round is drawn, so it changes no row's distribution.

A drafter must read what it has missed before it drafts, at first all prompts. Whether that can pay is gauged before: a
round with one arbitrary candidate a row shows what the target's pass over candidates takes here. Once reading has been
timed, it must also be regained in what is left of the answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf, log2

from outdraft.control.averages import OUTLIER, Average, believable
from outdraft.control.base import FIRST_PROBE, RATE
from outdraft.control.costs import Costs, bucket
from outdraft.control.shape_grid import BATCH, PLAIN, ShapeGrid, levels_of
from outdraft.core.shape import TreeShape

AGAIN = 12
"""Rounds after which a neighbour of the best shape is tried again."""
MOST_BACKOFF = 4
"""Trials in a row that each double the wait for the next, if the drafter has to catch up first and it did not pay."""
PLAIN_AGAIN = 50
"""Rounds after which plain decoding is timed again: what it was in a busier minute must not make drafts look good."""
ENOUGH = 2
"""Timed rounds of a shape before they are used."""
MEMORY = 10
"""Rounds that a shape's average covers; averages of single costs cover more, which was 1% slower here."""
APART = 0.06
"""Relative gain over plain decoding that drafting must promise, for every doubling of the rows. Drafted rows end at
different times, and a batch takes as long as its slowest row, which the mean over rows does not show."""
MOST = 3.0
"""Largest credit, in rounds: what an answer may lose by trials, however long nothing was tried before it."""
HOPE = 1.2
"""What a shape on trial is taken to bring over plain decoding, where the drafter must read much before the trial."""
REGAINED = 2
"""How many times reading must be regained in what is left: a shape that looks best does so by luck, too."""
DOUBTED = 0.999
"""What is left of the measured cost of reading after a round in which it prevented a draft: the machine may have been
busy then."""
NEARLY = 0.2
"""Relative shortfall from paying up to which a trial is not put off for longer and longer: the next may pay."""


@dataclass
class Timings:
    """Measurements of batches of about so many rows: seconds of rounds by shape."""

    seconds: dict[TreeShape, Average] = field(default_factory=dict)
    drafted: dict[TreeShape, int] = field(default_factory=dict)
    """The round in which each shape was drafted last."""
    rounds: int = 0
    trying: TreeShape | None = None
    """A shape that is drafted until it is timed."""
    gauge: Average = field(default_factory=lambda: Average(ENOUGH, MEMORY))
    """Seconds of rounds with one candidate a row that nobody drafted."""
    failures: int = 0
    """Trials in a row that did not pay and for which the drafter had to catch up."""
    resumes: int = 0
    """The round from which on such a trial may be made again."""
    leap: tuple[float, int] | None = None
    """Seconds of the newest round that made the drafter catch up on a trial, and the tokens that it read."""

    def fail(self) -> None:
        """Put off the next trial for which the drafter has to catch up."""
        self.failures = min(MOST_BACKOFF, self.failures + 1)
        self.resumes = self.rounds + (2 * AGAIN << self.failures)
        self.gauge = Average(ENOUGH, MEMORY)  # by then contexts are longer, and the machine busier or not

    def of(self, shape: TreeShape) -> Average:
        if shape not in self.seconds:
            # The first round of a size may have compiled or allocated something.
            self.seconds[shape] = Average(ENOUGH, MEMORY)
        return self.seconds[shape]

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
    """The shape chosen for one round, which passes the round's result to the tuner.

    Attributes:
        shape: the shape of the round's trees.
        gauges: True if the candidates are to be arbitrary ones, for the time that the target takes to verify them.
        leaps: True if the drafter has to catch up for a shape that is not known to pay.
    """

    shape: TreeShape
    tuner: ShapeTuner
    rows: int
    pending: int
    gauges: bool = False
    leaps: bool = False

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
        self.reading = Average(ENOUGH, MEMORY)
        """Seconds for each token of each row that the drafter catches up on."""
        self._bests: dict[int, TreeShape] = {}

    def choose(self, rows: int, pending: int, left: float = inf) -> ShapeChoice:
        """Choose the shape of the next round.

        Args:
            rows: number of rows of the batch.
            pending: largest number of tokens per row that the drafter has not seen.
            left: tokens that each row is expected to gain yet, on average.
        """
        known = self.timings.setdefault(bucket(rows), Timings())
        known.rounds += 1
        known.trying = known.trying or self._to_try(known, rows, pending)
        shape = known.trying or self.best(rows)
        leaps = self._is_leap(known, shape, rows, pending)
        early = known.rounds < known.resumes or (rows >= BATCH and not self._is_timed(known, PLAIN))
        dear = leaps and not early and not self._is_regained(known, shape, rows, pending, left)
        if dear:
            self.reading.value *= DOUBTED
        if leaps and (early or dear):
            shape, leaps = PLAIN, False
        elif leaps and rows >= BATCH and known.gauge.count < ENOUGH:
            return ShapeChoice(self.grid.lines[0][0], self, rows, pending, gauges=True)
        known.drafted[shape] = known.rounds
        return ShapeChoice(shape, self, rows, pending, leaps=leaps)

    def best(self, rows: int) -> TreeShape:
        """Return the timed shape that brings the most tokens per second."""
        if rows not in self._bests:  # asked several times a round
            known = self.timings.get(bucket(rows), Timings())
            timed = [shape for shape in self.grid.shapes if self._is_timed(known, shape)]
            best = max(timed, key=lambda shape: self._gain(known, shape, rows)) if timed else self._elsewhere(rows)
            self._bests[rows] = best
        return self._bests[rows]

    def rests(self, rows: int) -> bool:
        """Return True if no shape that was timed pays for so many rows."""
        known = self.timings.get(bucket(rows))
        return known is not None and self._is_timed(known, PLAIN) and self.best(rows) == PLAIN

    def observe(self, choice: ShapeChoice, accepted: Sequence[int], seconds: float) -> None:
        """Learn from a round, as in `ShapeChoice.observe`."""
        rows, shape, best = choice.rows, choice.shape, self.best(choice.rows)
        known = self.timings[bucket(rows)]
        self._bests.clear()
        self.credit = min(MOST, self.credit + RATE)
        if choice.gauges:
            self._gauge(known, rows, seconds)
            return
        # If the drafter catches up on a prompt or on many plain rounds, this round's time includes work of others.
        usual = levels_of(shape) == 0 or not self._catches_up(choice.pending)
        if choice.leaps:
            known.leap = seconds, rows * choice.pending
        if self._is_timed(known, best) and shape != PLAIN:  # plain is timed when it is due, whatever that loses
            most = self._seconds(known, best, rows)
            spent = self._seconds(known, shape, rows) or believable(seconds, OUTLIER * most)
            if best == PLAIN and not usual:
                spent = max(spent, seconds)  # only the trial made it catch up
            self.credit -= max(0.0, spent / most - self.grid.tokens(shape) / self.grid.tokens(best))
        self.grid.observe(shape, accepted)
        if usual:
            known.time(shape, seconds, shape == best)
        if usual and self._is_timed(known, shape):
            known.trying = None if shape == known.trying else known.trying
            if shape != PLAIN and known.leap is not None:
                self._land(known, shape, rows)

    def _gain(self, known: Timings, shape: TreeShape, rows: int) -> float:
        """Return the tokens per second of a timed shape, divided by what drafting must reach: 1 for plain decoding if
        that is timed too, and less for shapes that do not pay."""
        least = self._seconds(known, PLAIN, rows) / (1 + APART * log2(rows)) or 1.0
        return 1.0 if shape == PLAIN else self.grid.tokens(shape) * least / self._seconds(known, shape, rows)

    def _gauge(self, known: Timings, rows: int, seconds: float) -> None:
        """Learn from a round that gauges; if even a free draft would not pay, give the trial up."""
        plain = self._seconds(known, PLAIN, rows)
        known.gauge.observe(seconds)
        self.credit -= max(0.0, believable(seconds, OUTLIER * plain) / plain - 1)
        one = 1 + self.grid.hoped()
        if known.gauge.count >= ENOUGH and one * plain < (1 + APART * log2(rows)) * known.gauge.value:
            known.trying = None
            known.fail()

    def _land(self, known: Timings, shape: TreeShape, rows: int) -> None:
        """Judge a trial for which the drafter had to catch up, now that its shape is timed."""
        assert known.leap is not None
        seconds, tokens = known.leap
        known.leap = None
        self.reading.observe(max(0.0, seconds - self._seconds(known, shape, rows)) / tokens)
        if self._gain(known, shape, rows) < 1 - NEARLY:
            known.fail()
        else:
            known.failures, known.resumes = 0, known.rounds + AGAIN

    def _catches_up(self, pending: int) -> bool:
        """Return True if the drafter has missed so much that reading it takes a part of a round worth mentioning."""
        return not self.costs.given and pending > self.grid.most + 2

    def _is_leap(self, known: Timings, shape: TreeShape, rows: int, pending: int) -> bool:
        """Return True if the drafter has to catch up for a shape that is not known to pay, or not lately."""
        if shape == PLAIN or not self._catches_up(pending):
            return False
        best = self.best(rows)
        return best == PLAIN or not self._is_timed(known, best) or known.rounds - known.drafted.get(best, 0) > AGAIN

    def _is_regained(self, known: Timings, shape: TreeShape, rows: int, pending: int, left: float) -> bool:
        """Return True if drafting may save, in what is left, the seconds in which the drafter catches up."""
        if not self._is_timed(known, PLAIN):
            return True  # what drafting saves is not known
        gain = self._gain(known, shape, rows) if self._is_timed(known, shape) else HOPE
        gain = gain if shape == self.best(rows) else max(HOPE, gain)
        saved = left * self._seconds(known, PLAIN, rows) * (1 - 1 / gain)
        return REGAINED * self.reading.value * rows * pending <= saved

    def _to_try(self, known: Timings, rows: int, pending: int) -> TreeShape | None:
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
        able = [shape for shape in due if self._loss(known, shape, best, rows, pending) <= self.credit]
        return min(able, key=lambda shape: (self._is_timed(known, shape), known.drafted.get(shape, 0)), default=None)

    def _is_timed(self, known: Timings, shape: TreeShape) -> bool:
        return self.costs.given or known.of(shape).count >= ENOUGH

    def _loss(self, known: Timings, shape: TreeShape, best: TreeShape, rows: int, pending: int) -> float:
        """Return the expected loss of a round of this shape, in rounds of the best one; at most the largest credit."""
        least, most = (self._seconds(known, one, rows) for one in (PLAIN, best))
        node = max(0.0, most - least) / max(1, best.size - 1)
        seconds = self._seconds(known, shape, rows) or least + node * (shape.size - 1)
        if self._is_leap(known, shape, rows, pending):
            seconds += self.reading.value * rows * pending
        return min(MOST, max(0.0, seconds / most - self.grid.tokens(shape) / self.grid.tokens(best)))

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
