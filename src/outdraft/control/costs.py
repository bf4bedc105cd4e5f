"""Seconds of drafting and verifying on this machine, learned from timed rounds.

A target and its drafter share one `Costs` for all rows and calls. A pass costs by all nodes that go through it
together, padding included: rows x nodes of the largest tree. Numbers of rows fall into power-of-two buckets that learn
separately and lend each other estimates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from outdraft.control.averages import AFRESH, NODE_SHARE, Average, Line

VERIFY = 0.02
"""Seconds of a one-node pass before any was measured; only ratios matter then."""
DRAFT_SHARE = 0.08
"""Seconds of begin and step relative to a one-node pass, before any was measured."""
PLAIN_EVERY = 100
"""Rounds after which a plain round is due, so that drafting is compared with a measured, not extrapolated, time."""
DOUBTED = 32
"""Rounds without a draft in which what drafts cost becomes half as certain: the machine may have been busy then."""


@dataclass(frozen=True)
class Fixed:
    """Given costs, in seconds, which never change."""

    begin: float
    step: float
    verify_base: float
    verify_per_node: float
    rest: float


class Costs:
    """Seconds of the parts of a round.

    Args:
        practice: first drafts that controllers do not cut, so that they decide by measured costs and acceptance.
    """

    def __init__(self, practice: int = 0) -> None:
        self.practice = practice
        self._fixed: Fixed | None = None
        self._begin: dict[int, Average] = {}
        self._step: dict[int, Average] = {}
        self._rest: dict[int, Average] = {}
        self._verify: dict[int, Line] = {}
        # Plain rounds by themselves: on weights of few bits the second token of a pass costs more than later ones.
        self._single: dict[int, Average] = {}
        self._plain_rest: dict[int, Average] = {}
        self._plain: dict[int, int] = {}  # rounds since the last plain one
        self._undrafted: dict[int, int] = {}  # rounds since the last draft

    @classmethod
    def fixed(
        cls,
        begin: float,
        step: float,
        verify_base: float,
        verify_per_node: float,
        rest: float = 0.0,
    ) -> Costs:
        """Make costs that observations do not change: for tests, simulation and reproducible draft lengths.

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

    def observe_draft(
        self, begin_seconds: float, step_seconds: Sequence[float], rows: int = 1, usual: bool = True
    ) -> None:
        """Learn from a draft.

        Args:
            begin_seconds: seconds to catch up and draft the first level.
            step_seconds: seconds of each further level.
            rows: number of rows drafted for together.
            usual: False if `begin_seconds` include work of other rounds, so that they are an upper bound.
        """
        if self._fixed is not None:
            return
        key = bucket(rows)
        self.practice = max(0, self.practice - 1)
        for parts in (self._begin, self._step, self._rest, self._verify):
            if key in parts:
                parts[key].forget(self.certainty(rows))
        self._undrafted[key] = 0
        before = self.begin(rows)
        if usual or begin_seconds < before:
            self._begin.setdefault(key, Average()).observe(begin_seconds)
        if self.begin(rows) < before / AFRESH:  # the machine was busy; what else was measured then is no better
            self._plain[key] = PLAIN_EVERY
            if key in self._step and not step_seconds:
                self._step[key].value *= self.begin(rows) / before
        for seconds in step_seconds:
            self._step.setdefault(key, Average()).observe(seconds)

    def observe_round(self, nodes: int, verify_seconds: float, rest_seconds: float, rows: int = 1) -> None:
        """Learn from a round in which the target ran over `nodes` nodes per row, the root included."""
        if self._fixed is not None:
            return
        key = bucket(rows)
        if nodes == 1:
            self._single.setdefault(key, Average()).observe(verify_seconds)
            self._plain_rest.setdefault(key, Average()).observe(rest_seconds)
        else:
            self._verify.setdefault(key, Line(1 << key)).observe(rows * nodes, verify_seconds)
            self._rest.setdefault(key, Average()).observe(rest_seconds)
        self._plain[key] = 0 if nodes == 1 else self._plain.get(key, PLAIN_EVERY) + 1
        self.count_undrafted(rows)

    def count_undrafted(self, rows: int = 1) -> None:
        """Count a round without a draft of which `observe_round` is not told."""
        if self._fixed is None:
            self._undrafted[bucket(rows)] = self._undrafted.get(bucket(rows), 0) + 1

    def certainty(self, rows: int = 1) -> float:
        """Return how far what drafts cost is still trusted: 1 after a draft, half after DOUBTED rounds without."""
        return 0.5 ** (max(0, self._undrafted.get(bucket(rows), 0) - 1) / DOUBTED)

    def plain_is_due(self, rows: int = 1) -> bool:
        """Return True if the last plain round of so many rows is long ago, or never was."""
        return self._fixed is None and self._plain.get(bucket(rows), PLAIN_EVERY) >= PLAIN_EVERY

    def begin(self, rows: int = 1) -> float:
        """Return the seconds until a draft's first level is there."""
        if self._fixed is not None:
            return self._fixed.begin
        known = nearest(self._begin, rows)
        return known.value if known else self._first_step(rows)

    def step(self, rows: int = 1) -> float:
        """Return the seconds of each further level."""
        if self._fixed is not None:
            return self._fixed.step
        known = nearest(self._step, rows)
        begin = nearest(self._begin, rows)
        return known.value if known else begin.value if begin else self._first_step(rows)

    def _first_step(self, rows: int) -> float:
        known = nearest(self._step, rows)
        return known.value if known else DRAFT_SHARE * self.verify(1, rows)

    def verify(self, nodes: float, rows: int = 1) -> float:
        """Return the seconds of the target's pass over so many nodes per row, the root included."""
        return self._verifying(rows)(nodes)

    def _verifying(self, rows: int) -> Callable[[float], float]:
        """Return `verify` for so many rows."""
        if (fixed := self._fixed) is not None:
            return lambda nodes: fixed.verify_base + fixed.verify_per_node * (nodes - 1)
        own, known = self._single.get(bucket(rows)), nearest(self._verify, rows)
        single = own.value if own is not None else 0.0
        if known is not None:
            return lambda nodes: single if single and nodes <= 1 else max(known.at(rows * nodes), single)
        least = 1 << min(self._single, key=lambda key: abs(key - bucket(rows)), default=0)
        near = nearest(self._single, rows)
        first = near.value if near else VERIFY
        return lambda nodes: single if single and nodes <= 1 else first * (1 + NODE_SHARE * (rows * nodes - least))

    def rest(self, rows: int = 1, plain: bool = False) -> float:
        """Return the seconds of everything else in a round, or in one that drafts nothing."""
        if self._fixed is not None:
            return self._fixed.rest
        own, other = (self._plain_rest, self._rest) if plain else (self._rest, self._plain_rest)
        known = nearest(own, rows) or nearest(other, rows)
        return known.value if known else 0.0

    @property
    def given(self) -> bool:
        """True if these costs are fixed, so that decisions by them are repeatable."""
        return self._fixed is not None

    def round(self, levels: int, nodes: float, rows: int = 1) -> float:
        """Return the seconds of a round with so many levels and so many nodes per row, the root included."""
        drafting = self.begin(rows) + (levels - 1) * self.step(rows) if levels else 0.0
        return drafting + self.verify(nodes, rows) + self.rest(rows, plain=nodes <= 1)

    def plain(self, rows: int = 1) -> float:
        """Return the seconds of a round that drafts nothing, which is the cost of a token without drafting."""
        return self.verify(1, rows) + self.rest(rows, plain=True)

    def drafted(self, levels: int, nodes: float, rows: int = 1) -> float:
        """Return the seconds beyond a plain round for drafting `levels` (at least one) and verifying `nodes`."""
        return self.begin(rows) + (levels - 1) * self.step(rows) + self.added(nodes, rows)

    def added(self, nodes: float, rows: int = 1) -> float:
        """Return the seconds that so many drafted nodes add to a round that drafts nothing, beside drafting."""
        return self.adding(rows)(nodes)

    def adding(self, rows: int = 1) -> Callable[[float], float]:
        """Return `added` for so many rows, where it is asked many times."""
        verify = self._verifying(rows)
        beside = max(0.0, self.rest(rows) - self.rest(rows, plain=True)) - verify(1)
        return lambda nodes: verify(1 + nodes) + beside if nodes > 0 else 0.0

    def further(self, nodes: float, rows: int = 1) -> float:
        """Return the seconds that so many nodes add to a pass over several."""
        return self.verify(2 + nodes, rows) - self.verify(2, rows)


def bucket(rows: int) -> int:
    """Return the power-of-two bucket that holds so many rows: 1, 2, 3-4, 5-8, ..."""
    return max(0, rows - 1).bit_length()


Part = TypeVar("Part")


def nearest(parts: dict[int, Part], rows: int) -> Part | None:
    """Return the part learned for so many rows, else for the nearest other number, else None."""
    key = bucket(rows)
    if not parts:
        return None
    return parts[key] if key in parts else parts[min(parts, key=lambda other: (abs(other - key), other))]
