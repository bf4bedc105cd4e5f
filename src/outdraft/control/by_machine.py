"""Trees by the machine: every round has the shape that brings the most tokens a second, all rows of a batch alike.

Whole rounds are timed, shape by shape and for every power of two of rows apart: what a level, a node or a row costs is
never asked, so nothing is extrapolated from sizes that were measured to others. The choice climbs: the best shape so
far is drafted, and from a small share of the time those beside it are tried. It is made before anything of the round is
drawn and from earlier rounds alone, so it changes no row's law. Knows shapes, counts and clocks; nothing of models or
tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import log2

from outdraft.control.base import Controller
from outdraft.control.costs import OUTLIER, PLAIN_EVERY, Costs, believable, bucket
from outdraft.control.fixed import FixedController
from outdraft.control.menu import PLAIN, Menu, levels_of
from outdraft.control.pacing import Pacer
from outdraft.control.settings import ControlSettings
from outdraft.core.shape import TreeShape

START = 1.0
"""What trying may lose at first, in rounds."""
MOST = 2.0
"""What it may lose at most at once."""
RATE = 0.02
"""Share of the time that trying may lose in the long run."""
AGAIN = 12
"""Rounds after which a shape beside the best one is tried again."""
AFRESH = 3.0
"""A round so many times faster than those before shows that they were none to go by (compilation, a stall)."""
ENOUGH = 2
"""Rounds of a shape that are timed before anything is concluded from them."""
MEMORY = 10
"""Rounds that a shape's average looks back on."""
APART = 0.06
"""What drafting must promise beyond plain decoding, for every doubling of the rows: drafted rows end apart, and a batch
takes as long as its slowest row, which the mean of its rows does not show."""


@dataclass
class Timing:
    """Seconds of a round of one shape: an average that neither a first round nor a stall carries away."""

    seconds: float = 0.0
    seen: int = 0
    last: int = 0
    """The room's round in which it was drafted last."""

    def observe(self, seconds: float) -> None:
        self.seen += 1
        # The first round of a size may have compiled or allocated something.
        if self.seen <= ENOUGH or seconds < self.seconds / AFRESH:
            self.seconds = seconds if self.seen == 1 else min(self.seconds, seconds)
        else:
            self.seconds += (believable(seconds, self.seconds) - self.seconds) / min(self.seen, MEMORY)


@dataclass
class Room:
    """What is known of batches of about so many rows."""

    timings: dict[TreeShape, Timing] = field(default_factory=dict)
    rounds: int = 0
    credit: float = START
    trying: TreeShape | None = None
    """A shape that is drafted until it was timed."""

    def of(self, shape: TreeShape) -> Timing:
        return self.timings.get(shape) or Timing()

    def time(self, shape: TreeShape, seconds: float, common: bool) -> None:
        """A round took so long.

        Args:
            common: whether what changed is taken to have changed for all shapes (a busier machine, a longer context):
                so it is for the shape that is drafted all the time, or those not tried for a while would look fast.
        """
        # What is known of few rounds was chosen because they were fast: that others are not is no change.
        before, steady = self.timings[shape].seconds, self.timings[shape].seen >= MEMORY
        self.timings[shape].observe(seconds)
        if common and steady:
            for other, timing in self.timings.items():
                if other != shape:
                    timing.seconds *= self.timings[shape].seconds / before


@dataclass
class Choice:
    """One round's shape, which is told what came of it."""

    shape: TreeShape
    chooser: Chooser
    rows: int
    intake: int

    def observe(self, accepted: Sequence[int], seconds: float) -> None:
        """The verdict.

        Args:
            accepted: candidates accepted in each row.
            seconds: of the whole round.
        """
        self.chooser.observe(self, accepted, seconds)


class Chooser:
    """Chooses among the shapes within some bounds.

    Args:
        bounds: the largest shape.
        costs: given ones stand for the clock and make choices repeatable; others are not asked.
    """

    def __init__(self, bounds: TreeShape, costs: Costs):
        self.menu, self.costs = Menu(bounds), costs
        self.rooms: dict[int, Room] = {}

    def choose(self, rows: int, intake: int) -> Choice:
        """The shape of the next round.

        Args:
            rows: of the batch.
            intake: tokens of a row, at most, that the drafter has not seen yet.
        """
        room = self.rooms.setdefault(bucket(rows), Room())
        room.rounds += 1
        shape = self._shape(room, rows)
        room.timings.setdefault(shape, Timing()).last = room.rounds
        return Choice(shape, self, rows, intake)

    def best(self, rows: int) -> TreeShape:
        """Of the shapes that were timed, the one that brings the most tokens a second."""
        room = self.rooms.get(bucket(rows), Room())
        timed = [shape for shape in self.menu.shapes if self._known(room, shape)]
        if not timed:
            return self._elsewhere(rows)
        apart = 1 + APART * log2(rows)

        def rate(shape: TreeShape) -> float:
            return self.menu.tokens(shape) * (apart if shape == PLAIN else 1) / self._seconds(room, shape, rows)

        return max(timed, key=rate)

    def observe(self, choice: Choice, accepted: Sequence[int], seconds: float) -> None:
        """As `Choice.observe`."""
        room, shape, best = self.rooms[bucket(choice.rows)], choice.shape, self.best(choice.rows)
        room.credit = min(MOST, room.credit + RATE)
        if self._known(room, best) and shape != PLAIN:  # which is timed when it is due, whatever that loses
            most = self._seconds(room, best, choice.rows)
            spent = self._seconds(room, shape, choice.rows) or believable(seconds, OUTLIER * most)
            loss = spent / most - self.menu.tokens(shape) / self.menu.tokens(best)
            room.credit -= max(0.0, loss)
        self.menu.observe(shape, accepted)
        # Who takes in a prompt, or a stretch of plain rounds, does work of other rounds.
        if levels_of(shape) == 0 or choice.intake <= self.menu.most + 2:
            room.time(shape, seconds, shape == best)
        if self._known(room, shape):
            room.trying = None

    def _shape(self, room: Room, rows: int) -> TreeShape:
        if room.trying is None:
            room.trying = self._to_try(room, rows)
        return room.trying or self.best(rows)

    def _to_try(self, room: Room, rows: int) -> TreeShape | None:
        """Something else than the best, if that is due and affordable."""
        best, plain = self.best(rows), room.of(PLAIN)
        if not self._known(room, best):
            return best
        if not self._known(room, PLAIN) or room.rounds - plain.last >= PLAIN_EVERY:
            return PLAIN
        due = [shape for shape in self.menu.beside(best) if self._is_due(room, shape)]
        able = [shape for shape in due if self._loss(room, shape, best, rows) <= room.credit]
        return min(able, key=lambda shape: (self._known(room, shape), room.of(shape).last), default=None)

    def _is_due(self, room: Room, shape: TreeShape) -> bool:
        return not self._known(room, shape) or room.rounds - room.of(shape).last >= AGAIN

    def _known(self, room: Room, shape: TreeShape) -> bool:
        return self.costs.given or room.of(shape).seen >= ENOUGH

    def _loss(self, room: Room, shape: TreeShape, best: TreeShape, rows: int) -> float:
        """What a round of this shape is believed to lose, in rounds of the best one."""
        least, most = (self._seconds(room, one, rows) for one in (PLAIN, best))
        node = max(0.0, most - least) / max(1, best.size - 1)
        seconds = self._seconds(room, shape, rows) or least + node * (shape.size - 1)
        return max(0.0, seconds / most - self.menu.tokens(shape) / self.menu.tokens(best))

    def _seconds(self, room: Room, shape: TreeShape, rows: int) -> float:
        """Of a round; 0 if unknown."""
        if self.costs.given:
            return self.costs.round(levels_of(shape), shape.size, rows)
        return room.of(shape).seconds

    def _elsewhere(self, rows: int) -> TreeShape:
        """Where to begin: what is best for the nearest other number of rows, else the menu's start."""
        known = [key for key, room in self.rooms.items() if any(self._known(room, shape) for shape in room.timings)]
        if not known:
            return self.menu.start(rows)
        return self.best(1 << min(known, key=lambda key: (abs(key - bucket(rows)), key)))


class ByMachine(FixedController):
    """A row of a batch whose shapes a chooser decides on; alone it drafts to its limit."""

    def __init__(self, pacer: ShapePacer, *given: object):
        super().__init__(*given)  # type: ignore[arg-type]
        self.pacer: ShapePacer = pacer


class ShapePacer(Pacer):
    """What belongs to a target and a drafter: a chooser for every bounds that were asked for.

    Args:
        costs: as for `Chooser`.
    """

    def __init__(self, costs: Costs | None = None):
        super().__init__(ControlSettings("fixed"), costs)
        self.choosers: dict[TreeShape, Chooser] = {}

    def controller(self, limit: int, seed: int | None = None) -> Controller:
        return ByMachine(self, self.costs, limit, self.generator(seed))

    def tuner(self, bounds: TreeShape, rows: int) -> Chooser:
        return self.chooser(bounds)

    def chooser(self, bounds: TreeShape) -> Chooser:
        if bounds not in self.choosers:
            self.choosers[bounds] = Chooser(bounds, self.costs)
        return self.choosers[bounds]
