"""What drafting and verifying cost on this machine, in seconds, learned from timed rounds.

One `Costs` for a target and its drafter, shared by all rows and calls. What a pass costs depends on all nodes that go
through it together, padding included: rows x nodes of the largest tree. Numbers of rows fall into power-of-two buckets
that learn apart and lend what they know.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

OUTLIER = 2.0
"""An observation counts as at most so many times what was expected: a machine may stall for once."""
AFRESH = 3.0
"""An observation so many times below what was expected shows that the expectation came from an outlier."""
MEMORY = 20
"""Observations that an average looks back on."""
VERIFY = 0.02
"""Seconds of a one-node pass before any was seen. Only ratios matter then."""
DRAFT_SHARE = 0.08
"""Begin and step as a share of a one-node pass, before any was seen."""
NODE_SHARE = 0.02
"""What a further node adds to a pass, as a share of a one-node pass, before passes of several sizes were seen."""
PLAIN_EVERY = 100
"""Rounds after which a plain one is due, so that what drafting is compared with is measured, not extrapolated."""
NODE_WEIGHT = 8.0
"""How firmly NODE_SHARE is believed: like observations whose squared distances from their mean add up to this."""


def believable(value: float, expected: float) -> float:
    """The value, or the most of it that an outlier counts for."""
    return min(value, OUTLIER * expected)


class Average:
    """An exponential average that outliers cannot carry away.

    Seconds have a floor and no ceiling: an observation far above the average is clipped, one far below it shows that
    the average began with an outlier (compilation, cold caches), and starts it afresh.

    Args:
        settling: of so many first observations the least counts, where first ones are often too large.
        memory: observations that it looks back on.
    """

    def __init__(self, settling: int = 1, memory: int = MEMORY) -> None:
        self.value, self.seen, self.settling, self.memory = 0.0, 0, settling, memory

    def observe(self, value: float) -> None:
        if self.value <= 0 or value < self.value / AFRESH:
            self.value, self.seen = value, min(self.seen + 1, self.settling)
            return
        self.seen = min(self.seen + 1, self.memory)
        if self.seen <= self.settling:
            self.value = min(self.value, value)
        else:
            self.value += (believable(value, self.value) - self.value) / self.seen


class Line:
    """Exponentially weighted least squares of a pass's seconds on its nodes, with a weak prior slope.

    Means and spreads are kept apart, and the spreads fade only as far as an observation brings something new about the
    slope: a long stretch of one-node passes moves the level and leaves the slope as it was.

    Args:
        unit: nodes are counted in so many: the rows of a bucket, so that priors mean the same in all of them.
    """

    def __init__(self, unit: int = 1) -> None:
        self.unit, self.seen = unit, 0
        self.nodes = self.seconds = 0.0  # means
        self.spread = self.product = 0.0  # of nodes; of nodes with seconds

    def observe(self, total: int, seconds: float) -> None:
        """A pass over so many nodes in all."""
        nodes = total / self.unit
        if self.seconds <= 0 or seconds < self.at(total) / AFRESH:
            self.seen, self.nodes, self.seconds, self.spread, self.product = 1, nodes, seconds, 0.0, 0.0
            return
        self.seen = min(self.seen + 1, MEMORY)
        rate = 1 / self.seen
        apart, slower = nodes - self.nodes, believable(seconds, self.at(total)) - self.seconds
        news = apart * apart
        fade = rate * min(1.0, news / self.spread) if self.spread > 0 else 0.0
        self.spread += rate * (1 - rate) * news - fade * self.spread
        self.product += rate * (1 - rate) * apart * slower - fade * self.product
        self.nodes += rate * apart
        self.seconds += rate * slower

    @property
    def slope(self) -> float:
        """Seconds that a further unit of nodes adds, never negative."""
        # The prior slope is NODE_SHARE of a one-node pass for every node, and that pass is seconds less the others.
        share = NODE_SHARE * self.unit
        prior = self.seconds * share / (1 + share * max(0.0, self.nodes - 1 / self.unit))
        weight = NODE_WEIGHT / max(1, self.seen)
        return max(0.0, (self.product + weight * prior) / (self.spread + weight))

    def at(self, total: float) -> float:
        """Seconds of a pass over so many nodes in all."""
        # Never less than half the mean: a slope that is too steep must not make small passes free.
        return max(self.seconds / 2, self.seconds + self.slope * (total / self.unit - self.nodes))


@dataclass(frozen=True)
class Fixed:
    """Costs that were given and never change, in seconds."""

    begin: float
    step: float
    verify_base: float
    verify_per_node: float
    rest: float


class Costs:
    """Seconds of the parts of a round."""

    def __init__(self) -> None:
        self._fixed: Fixed | None = None
        self._begin: dict[int, Average] = {}
        self._step: dict[int, Average] = {}
        self._rest: dict[int, Average] = {}
        self._verify: dict[int, Line] = {}
        self._plain: dict[int, int] = {}  # rounds since the last plain one

    @classmethod
    def fixed(
        cls,
        begin: float,
        step: float,
        verify_base: float,
        verify_per_node: float,
        rest: float = 0.0,
    ) -> Costs:
        """Costs that observations do not change: for tests, simulation and reproducible draft lengths.

        Args:
            begin: seconds until the first level is drafted.
            step: seconds of each further level.
            verify_base: seconds of a target pass over one node.
            verify_per_node: seconds of each further node.
            rest: seconds of everything else in a round.
        """
        costs = cls()
        costs._fixed = Fixed(begin, step, verify_base, verify_per_node, rest)
        return costs

    def observe_draft(self, begin_seconds: float | None, step_seconds: Sequence[float], rows: int = 1) -> None:
        """A draft was made.

        Args:
            begin_seconds: taking in what was decided, and the first level; None if other rounds' work was among it.
            step_seconds: of each further level.
            rows: drafted for together.
        """
        if self._fixed is not None:
            return
        key = bucket(rows)
        if begin_seconds is not None:
            self._begin.setdefault(key, Average()).observe(begin_seconds)
        for seconds in step_seconds:
            self._step.setdefault(key, Average()).observe(seconds)

    def observe_round(self, nodes: int, verify_seconds: float, rest_seconds: float, rows: int = 1) -> None:
        """A round ended: the target ran over so many nodes a row (the root included), and the rest was done."""
        if self._fixed is not None:
            return
        key = bucket(rows)
        self._verify.setdefault(key, Line(1 << key)).observe(rows * nodes, verify_seconds)
        self._rest.setdefault(key, Average()).observe(rest_seconds)
        self._plain[key] = 0 if nodes == 1 else self._plain.get(key, PLAIN_EVERY) + 1

    def plain_is_due(self, rows: int = 1) -> bool:
        """Whether it is long ago, or never was, that so many rows did a plain round."""
        return self._fixed is None and self._plain.get(bucket(rows), PLAIN_EVERY) >= PLAIN_EVERY

    def begin(self, rows: int = 1) -> float:
        """Seconds until a draft's first level is there."""
        if self._fixed is not None:
            return self._fixed.begin
        known = nearest(self._begin, rows)
        return known.value if known else self._first_step(rows)

    def step(self, rows: int = 1) -> float:
        """Seconds of each further level."""
        if self._fixed is not None:
            return self._fixed.step
        known = nearest(self._step, rows)
        begin = nearest(self._begin, rows)
        return known.value if known else begin.value if begin else self._first_step(rows)

    def _first_step(self, rows: int) -> float:
        known = nearest(self._step, rows)
        return known.value if known else DRAFT_SHARE * self.verify(1, rows)

    def verify(self, nodes: float, rows: int = 1) -> float:
        """Seconds of the target's pass over so many nodes a row, the root included."""
        if self._fixed is not None:
            return self._fixed.verify_base + self._fixed.verify_per_node * (nodes - 1)
        known = nearest(self._verify, rows)
        return known.at(rows * nodes) if known else VERIFY * (1 + NODE_SHARE * (rows * nodes - 1))

    def rest(self, rows: int = 1) -> float:
        """Seconds of everything else in a round."""
        if self._fixed is not None:
            return self._fixed.rest
        known = nearest(self._rest, rows)
        return known.value if known else 0.0

    @property
    def given(self) -> bool:
        """Whether these are fixed, so that whoever decides by them decides the same again."""
        return self._fixed is not None

    def round(self, levels: int, nodes: float, rows: int = 1) -> float:
        """Seconds of a round that drafts so many levels and verifies so many nodes a row, the root included."""
        drafting = self.begin(rows) + (levels - 1) * self.step(rows) if levels else 0.0
        return drafting + self.verify(nodes, rows) + self.rest(rows)

    def plain(self, rows: int = 1) -> float:
        """Seconds of a round that drafts nothing: what a token costs without drafting."""
        return self.verify(1, rows) + self.rest(rows)

    def drafted(self, levels: int, nodes: float, rows: int = 1) -> float:
        """Seconds of a round beyond a plain one's: of so many levels (at least one) and of verifying so many nodes."""
        return self.begin(rows) + (levels - 1) * self.step(rows) + self.added(nodes, rows)

    def added(self, nodes: float, rows: int = 1) -> float:
        """Seconds that so many drafted nodes add to the target's pass."""
        return self.verify(1 + nodes, rows) - self.verify(1, rows)


def bucket(rows: int) -> int:
    """Which power of two holds so many rows: 1, 2, 3-4, 5-8, ..."""
    return max(0, rows - 1).bit_length()


Part = TypeVar("Part")


def nearest(parts: dict[int, Part], rows: int) -> Part | None:
    """What is known for so many rows, else for the nearest other number, else nothing."""
    key = bucket(rows)
    if not parts:
        return None
    return parts[key] if key in parts else parts[min(parts, key=lambda other: (abs(other - key), other))]
