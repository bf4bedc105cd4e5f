"""What is learned in sums: evidence that starts from a prior and fades, and what finished rows hand to new ones.

Everything a controller learns is a short vector of sums (successes and failures, or the moments of a fit), so rows add
up by adding sums. Knows nothing of what the sums mean.
"""

from __future__ import annotations

from collections.abc import Sequence

HORIZON = 8
"""Experience keeps so many times the rounds that it hands to a row, so that the last row alone does not make it."""


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
