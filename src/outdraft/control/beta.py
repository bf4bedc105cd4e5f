"""Thompson sampling on verdicts alone: theta ~ Beta(a, b), whatever the drafter thinks of its draft."""

from __future__ import annotations

from collections.abc import Sequence

from outdraft.control.thompson import ThompsonController, draw_beta


class BetaController(ThompsonController):
    """One draw of theta a round; every level survives with it."""

    def draw_theta(self, confidences: Sequence[float]) -> float:
        if not confidences:
            return draw_beta(self.counts[0], self.counts[1], self.generator)
        return self.theta

    def survivals(self, confidences: Sequence[float]) -> list[float]:
        return [self.theta**levels for levels in range(len(confidences) + 1)]
