"""Thompson sampling that listens to the drafter: its confidence c, mapped to m(c), what such confidence was worth.

The survival so far is the product of m over the levels kept. For the next level, of which nothing is known yet,
theta ~ Beta(a + k m(c), b + k (1 - m(c))), where c is the confidence in the last one kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from outdraft.control.adaptive import Outcome
from outdraft.control.calibration import CALIBRATIONS
from outdraft.control.thompson import ThompsonController, draw_beta


class CalibratedController(ThompsonController):
    """Survival from calibrated confidences, theta from the posterior and the last confidence.

    Args:
        calibration: `platt` or `isotonic`.
        weight: k, observations that the calibrated confidence counts for in theta.
    """

    def __init__(self, *given: Any, calibration: str, weight: float, **thompson: Any):
        super().__init__(*given, **thompson)
        kind = CALIBRATIONS[calibration]
        self.calibration = kind(self.evidence(calibration, kind.prior()))
        self.weight = weight
        self._survival = [1.0]  # of this round's levels, one after another

    def draw_theta(self, confidences: Sequence[float]) -> float:
        a, b = self.counts[0], self.counts[1]
        if confidences:
            m = self.calibration.probability(confidences[-1])
            a, b = a + self.weight * m, b + self.weight * (1 - m)
        return draw_beta(a, b, self.generator)

    def survivals(self, confidences: Sequence[float]) -> list[float]:
        del self._survival[len(confidences) + 1 :]
        for confidence in confidences[len(self._survival) - 1 :]:
            self._survival.append(self._survival[-1] * self.calibration.probability(confidence))
        return self._survival

    def learn(self, outcome: Outcome) -> None:
        super().learn(outcome)
        del self._survival[1:]
        confidences, accepted = outcome.confidences, outcome.accepted
        judged = min(len(confidences), accepted + 1)  # nothing below a rejection is known
        for level in range(judged):
            self.calibration.observe(confidences[level], level < accepted)
