"""Evidence of controllers: fading sums that start from a prior, experience of finished rows, and a limit of losses.

Everything learned is a short vector of sums (successes and failures, or the moments of a fit), so rows are combined by
adding sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

HORIZON = 8
"""Experience keeps so many times the rounds that it gives to a row, so that the last row alone does not make it."""
START = 2.0
"""First credit of a row, in plain rounds: 1.6% of an answer of 128 tokens."""
FIRST_PROBE = 1.0
"""First credit, in plain rounds, for drafts that do not look worthwhile."""
MOST = 10.0
"""Largest credit: the most that a row can lose of what it earned before drafting stops."""
RATE = 0.02
"""Share of the time that unsuccessful trials may cost in the long run."""
BACKOFF = 4
"""Failed probes in a row that each double the wait for the next; further ones do not."""


class Evidence:
    """Sums of one row: a constant start, and the row's own observations, which fade.

    Args:
        prior: the sums before any observation.
        inherited: sums of finished rows, added to the prior.
    """

    def __init__(self, prior: Sequence[float], inherited: Sequence[float] | None = None):
        self.start = [a + b for a, b in zip(prior, inherited or [0.0] * len(prior), strict=True)]
        self.own = [0.0] * len(self.start)

    def fade(self, discount: float) -> None:
        """Multiply the row's own observations by `discount`; called once per round."""
        if discount < 1:
            self.own = [discount * amount for amount in self.own]

    def add(self, index: int, amount: float) -> None:
        self.own[index] += amount

    def __getitem__(self, index: int) -> float:
        return self.start[index] + self.own[index]

    def __len__(self) -> int:
        return len(self.start)


class Experience:
    """Evidence of finished rows of one model, for new rows to start from; running rows share nothing."""

    def __init__(self) -> None:
        self.rounds = 0.0
        self._sums: dict[str, list[float]] = {}

    def inherit(self, name: str, memory: float) -> list[float] | None:
        """Return the sums of this name, worth at most `memory` rounds; None if there are none."""
        if memory <= 0 or name not in self._sums:
            return None
        scale = min(1.0, memory / self.rounds)
        return [scale * amount for amount in self._sums[name]]

    def merge(self, learned: dict[str, Evidence], rounds: float, memory: float) -> None:
        """Add a finished row of `rounds` rounds; older rows fade so that about HORIZON * `memory` rounds are kept."""
        if memory <= 0 or rounds <= 0:
            return
        keep = min(1.0, max(0.0, HORIZON * memory - rounds) / self.rounds) if self.rounds else 1.0
        for name, evidence in learned.items():
            before = self._sums.get(name, [0.0] * len(evidence))
            self._sums[name] = [keep * old + new for old, new in zip(before, evidence.own, strict=True)]
        self.rounds = keep * self.rounds + rounds


@dataclass
class Safeguard:
    """A row's credit, counted in plain rounds, and the schedule of probes.

    A drafted round spends the cost of drafting and of the larger target pass, and earns what was accepted; every round
    earns a little. A level is not drafted if its loss, with nothing accepted, would exceed the credit. So whatever a
    controller believes, n rounds without acceptance cost at most n * (1 + RATE) + START plain rounds.

    Attributes:
        credit: plain rounds that may be lost.
        waited: credit earned since the last draft.
        failures: consecutive drafted rounds that earned neither their cost nor a token.
    """

    credit: float = START
    waited: float = FIRST_PROBE
    failures: int = 0

    def allows(self, wanted: bool, loss: float, starting: bool) -> bool:
        """Return True if a level that is wanted, or due for a probe, may be drafted.

        Args:
            wanted: True if the controller wants it.
            loss: cost of the round, this level included, beyond a plain one if nothing is accepted, in plain rounds.
            starting: True if it is the round's first level.
        """
        return (wanted or (starting and self.probe_is_due(loss))) and loss <= self.credit

    def probe_is_due(self, loss: float) -> bool:
        """Return True if the rounds since the last draft have earned a probe that costs `loss`."""
        return self.waited >= loss * 2.0 ** min(BACKOFF, max(0, self.failures - 1))

    def observe(self, drafted: bool, accepted: float, loss: float) -> None:
        """Update the credit after a round.

        Args:
            drafted: True if anything was drafted.
            accepted: candidates accepted.
            loss: loss of the whole round, as in `allows`.
        """
        self.credit += RATE
        self.waited += RATE
        if drafted:
            self.credit += accepted - loss
            self.waited = 0.0
            self.failures = 0 if accepted >= min(1.0, loss) else self.failures + 1
        self.credit = min(MOST, self.credit)
