"""What bounds the price of drafting in vain, and when to probe: a credit, counted in plain rounds.

A drafted round spends what drafting and the larger target pass cost and earns what was accepted; every round earns a
little. A level that the credit would not survive, should nothing be accepted, is not drafted. So whatever a controller
believes, n rounds of nothing take at most n * (1 + RATE) + START plain ones. Rows that decide together pool theirs.
Knows nothing of who drafts, or why.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

START = 2.0
"""Credit at first, in plain rounds: 1.6% of an answer of 128 tokens."""
FIRST_PROBE = 1.0
"""Plain rounds that may be spent on a first try unasked: rows that decide together average their doubts, and where none
of them wants to begin, none would find out."""
MOST = 10.0
"""Credit at most: what a row that has earned more may lose of it before it must stop."""
RATE = 0.02
"""Share of the time that drafting in vain may cost in the long run."""
BACKOFF = 4
"""Failed probes in a row that each double the wait for the next; more do not."""


@dataclass
class Safeguard:
    """Of one row, or of rows that draft as one.

    Attributes:
        credit: plain rounds that may be lost.
        waited: earned since the last draft.
        failures: rounds in a row that did not earn what they cost, nor a token; a mean where rows were pooled.
    """

    credit: float = START
    waited: float = FIRST_PROBE
    failures: float = 0.0

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
        return self.waited >= loss * 2.0 ** min(BACKOFF, max(0.0, self.failures - 1))

    def observe(self, drafted: bool, accepted: float, loss: float) -> None:
        """A round ended.

        Args:
            drafted: whether anything was.
            accepted: candidates, the mean over the rows.
            loss: as above, of the whole round.
        """
        self.credit += RATE
        self.waited += RATE
        if drafted:
            self.credit += accepted - loss
            self.waited = 0.0
            self.failures = 0.0 if accepted >= min(1.0, loss) else self.failures + 1
        self.credit = min(MOST, self.credit)

    @classmethod
    def pooled(cls, parts: Sequence[Safeguard]) -> Safeguard:
        """What rows that draft as one have on average."""
        return cls(
            fmean(part.credit for part in parts),
            fmean(part.waited for part in parts),
            fmean(part.failures for part in parts),
        )
