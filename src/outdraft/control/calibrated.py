"""Thompson sampling that listens to the drafter: its confidence, mapped to what such confidence turned out to be worth.

Two maps are fitted, for two questions. `own`: is the level that was drafted with this confidence accepted? `ahead`: if
it is, is the next one, of which nothing is known yet? The first gives the survival so far, the second is the m(c) of
theta ~ Beta(a + k m(c), b + k (1 - m(c))).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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
        self.own = kind(self.evidence(f"{calibration} own", kind.prior()))
        self.ahead = kind(self.evidence(f"{calibration} ahead", kind.prior()))
        self.weight = weight
        self._survival = [1.0]  # of this round's levels, one after another

    def draw_theta(self, confidences: Sequence[float]) -> float:
        a, b = self.counts[0], self.counts[1]
        if confidences:
            m = self.ahead.probability(confidences[-1])
            a, b = a + self.weight * m, b + self.weight * (1 - m)
        return draw_beta(a, b, self.generator)

    def survival(self, confidences: Sequence[float]) -> float:
        del self._survival[max(1, len(confidences)) :]
        for confidence in confidences[len(self._survival) - 1 :]:
            self._survival.append(self._survival[-1] * self.own.probability(confidence))
        return self._survival[-1]

    def learn(self, confidences: Sequence[float], accepted: int, tokens: int, seconds: float) -> None:
        super().learn(confidences, accepted, tokens, seconds)
        del self._survival[1:]
        judged = min(len(confidences), accepted + 1)  # nothing below a rejection is known
        for level in range(judged):
            self.own.observe(confidences[level], level < accepted)
            if level > 0:
                self.ahead.observe(confidences[level - 1], level < accepted)
