"""What controllers learn: sums that start from a prior and fade, what finished rows hand to new ones, and a credit that
bounds the price of drafting in vain.

Everything learned is a short vector of sums (successes and failures, or the moments of a fit), so rows add up by adding
sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

HORIZON = 8
"""Experience keeps so many times the rounds that it hands to a row, so that the last row alone does not make it."""
START = 2.0
"""A row's credit at first, in plain rounds: 1.6% of an answer of 128 tokens."""
FIRST_PROBE = 1.0
"""Plain rounds that may be spent at first on trying what does not look worthwhile."""
MOST = 10.0
"""Credit at most: what somebody who has earned more may lose of it before he must stop."""
RATE = 0.02
"""Share of the time that trying in vain may cost in the long run."""
BACKOFF = 4
"""Failed probes in a row that each double the wait for the next; more do not."""


class Evidence:
    """Sums of one row: a start that stays, and the row's own observations, which fade.

    Args:
        prior: the sums before anything was seen.
        inherited: what finished rows found, added to it.
    """

    def __init__(self, prior: Sequence[float], inherited: Sequence[float] | None = None):
        self.start = [a + b for a, b in zip(prior, inherited or [0.0] * len(prior), strict=True)]
        self.own = [0.0] * len(self.start)

    def fade(self, discount: float) -> None:
        """Once a round: what was seen counts `discount` times as much from now on."""
        if discount < 1:
            self.own = [discount * amount for amount in self.own]

    def add(self, index: int, amount: float) -> None:
        self.own[index] += amount

    def __getitem__(self, index: int) -> float:
        return self.start[index] + self.own[index]

    def __len__(self) -> int:
        return len(self.start)


class Experience:
    """What finished rows of one model found, for new rows to start from; rows share nothing while they run."""

    def __init__(self) -> None:
        self.rounds = 0.0
        self._sums: dict[str, list[float]] = {}

    def inherit(self, name: str, memory: float) -> list[float] | None:
        """The sums of this name, worth at most `memory` rounds; None if there are none."""
        if memory <= 0 or name not in self._sums:
            return None
        scale = min(1.0, memory / self.rounds)
        return [scale * amount for amount in self._sums[name]]

    def merge(self, learned: dict[str, Evidence], rounds: float, memory: float) -> None:
        """A row of so many rounds has ended; older rows fade so that about HORIZON * `memory` rounds are kept."""
        if memory <= 0 or rounds <= 0:
            return
        keep = min(1.0, max(0.0, HORIZON * memory - rounds) / self.rounds) if self.rounds else 1.0
        for name, evidence in learned.items():
            before = self._sums.get(name, [0.0] * len(evidence))
            self._sums[name] = [keep * old + new for old, new in zip(before, evidence.own, strict=True)]
        self.rounds = keep * self.rounds + rounds


@dataclass
class Safeguard:
    """A row's credit, counted in plain rounds, and when to probe.

    A drafted round spends what drafting and the larger target pass cost and earns what was accepted; every round earns
    a little. A level that the credit would not survive, should nothing be accepted, is not drafted. So whatever a
    controller believes, n rounds of nothing take at most n * (1 + RATE) + START plain ones.

    Attributes:
        credit: plain rounds that may be lost.
        waited: earned since the last draft.
        failures: rounds in a row that did not earn what they cost, nor a token.
    """

    credit: float = START
    waited: float = FIRST_PROBE
    failures: int = 0

    def allows(self, wanted: bool, loss: float, starting: bool) -> bool:
        """Whether to draft a level that is wanted, or that probing is due for.

        Args:
            wanted: by the controller.
            loss: what the round, this level included, costs beyond a plain one if nothing is accepted, in plain rounds.
            starting: whether it is the round's first level.
        """
        return (wanted or (starting and self.probe_is_due(loss))) and loss <= self.credit

    def probe_is_due(self, loss: float) -> bool:
        """Whether the rounds since the last draft have earned a try that costs `loss`."""
        return self.waited >= loss * 2.0 ** min(BACKOFF, max(0, self.failures - 1))

    def observe(self, drafted: bool, accepted: float, loss: float) -> None:
        """A round ended.

        Args:
            drafted: whether anything was.
            accepted: candidates.
            loss: as above, of the whole round.
        """
        self.credit += RATE
        self.waited += RATE
        if drafted:
            self.credit += accepted - loss
            self.waited = 0.0
            self.failures = 0 if accepted >= min(1.0, loss) else self.failures + 1
        self.credit = min(MOST, self.credit)
