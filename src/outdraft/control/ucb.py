"""UCB1 over draft lengths: every length is an arm, its reward the round's tokens per second.

Knows costs and verdicts; looks at no confidence.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from outdraft.control.adaptive import Adaptive, Outcome

IMAGINED = 0.1
"""Rounds that each length is thought to have been tried with full success before it was tried at all."""


class UcbController(Adaptive):
    """Chooses the length of largest mean reward plus `exploration` * sqrt(ln rounds / times seen).

    The reward is in units of plain decoding's tokens per second. A round shows what every shorter draft would have
    earned too, so all of them learn from it.

    Args:
        exploration: weight of the bonus for lengths that were seen rarely.
    """

    def __init__(self, *given: Any, exploration: float, **adaptive: Any):
        super().__init__(*given, **adaptive)
        self.exploration = exploration
        # A tenth of an imagined round for each length, with everything accepted: what was never tried looks good.
        best = [IMAGINED * self._reward(length, length, length) for length in range(self.limit + 1)]
        self.times = self.evidence(f"ucb times {self.limit}", [IMAGINED] * (self.limit + 1))
        self.rewards = self.evidence(f"ucb rewards {self.limit}", best)
        self._length = 0

    def wants(self, confidences: Sequence[float], nodes: float) -> bool:
        if not confidences:
            self._length = self._best()
        return len(confidences) < self._length

    def learn(self, outcome: Outcome) -> None:
        levels, nodes, accepted = len(outcome.confidences), outcome.nodes, outcome.accepted
        self._earn(0, 1.0)
        for length in range(1, levels + 1):
            self._earn(length, self._reward(length, nodes * length // levels, min(accepted, length)))

    def _reward(self, length: int, nodes: float, accepted: int) -> float:
        """Tokens per second of such a round, in units of plain decoding's."""
        return (1 + accepted) / (1 + (self.loss(length, nodes) if length else 0.0))

    def _earn(self, length: int, reward: float) -> None:
        self.times.add(length, 1.0)
        self.rewards.add(length, reward)

    def _best(self) -> int:
        rounds = math.log(max(self.times[length] for length in range(self.limit + 1)) + 1)

        def index(length: int) -> float:
            times = self.times[length]
            return self.rewards[length] / times + self.exploration * math.sqrt(rounds / times)

        return max(reversed(range(self.limit + 1)), key=index)  # of equals the longest, which teaches most
