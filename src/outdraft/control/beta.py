"""Thompson sampling on verdicts alone: theta ~ Beta(a, b), whatever the drafter thinks of its draft."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from outdraft.control.thompson import ThompsonController, draw_beta


class BetaController(ThompsonController):
    """One draw of theta a round; every level survives with it."""

    def __init__(self, *given: Any, **thompson: Any):
        super().__init__(*given, **thompson)
        self._theta = 0.0

    def draw_theta(self, confidences: Sequence[float]) -> float:
        if not confidences:
            self._theta = draw_beta(self.counts[0], self.counts[1], self.generator)
        return self._theta

    def survival(self, confidences: Sequence[float]) -> float:
        return self._theta ** len(confidences)
