"""What the two Thompson-sampling controllers share: the Beta posterior, its draws, and the two rules of using them.

Knows nothing of how a subclass turns the posterior and the confidences into a probability.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch

from outdraft.control.adaptive import Adaptive
from outdraft.control.worth import Pace, worth_going_on, worth_starting, worth_verifying

TINY = 1e-300
"""Where Gamma draws of very small counts are cut off."""


class ThompsonController(Adaptive):
    """Treats the acceptance of a level as a Bernoulli trial whose probability theta it learns and draws.

    Args:
        prior: (a, b) of the Beta distribution of theta.
        rule: `worth` drafts on while a draw of theta says that the level earns more than it costs; `bernoulli` drafts
            on with probability theta.
    """

    def __init__(self, *given: Any, prior: tuple[float, float], rule: str, **adaptive: Any):
        super().__init__(*given, **adaptive)
        self.rule = rule
        self.counts = self.evidence("beta", prior)
        self.pace = Pace(self.evidence("pace", Pace.PRIOR), self.costs)

    @abstractmethod
    def draw_theta(self, confidences: Sequence[float]) -> float:
        """A draw of the probability that the next level is accepted if these were."""

    @abstractmethod
    def survival(self, confidences: Sequence[float]) -> float:
        """The probability that all of these levels are accepted."""

    def wants(self, confidences: Sequence[float], nodes: int) -> bool:
        theta = self.draw_theta(confidences)
        if self.rule == "bernoulli":
            return uniform(self.generator) < theta
        price = self.pace.seconds_per_token(self.rows)
        if confidences:
            chance = self.survival(confidences) * theta
            return worth_going_on(price, chance, nodes, self.costs, self.rows)
        return worth_starting(price, theta, nodes, self.limit, self.costs, self.rows)

    def size(self, confidences: Sequence[float], gains: Sequence[float], levels: Sequence[int]) -> int:
        # A level's candidates share its chance of survival as the drafter's own estimates share its mass.
        chances, mass = [], 1.0
        for level, confidence in enumerate(confidences, start=1):
            mass *= max(confidence, TINY)
            chances.append(self.survival(confidences[:level]) / max(mass, TINY))
        price = self.pace.seconds_per_token(self.rows)
        likely = [min(1.0, gain * chances[level]) for gain, level in zip(gains, levels, strict=True)]
        self._nodes = worth_verifying(price, likely, self.costs, self.rows)
        return self._nodes

    def learn(self, confidences: Sequence[float], accepted: int, tokens: int, seconds: float) -> None:
        expected = self.costs.round(len(confidences), 1 + self._nodes, self.rows)
        self.pace.observe(tokens, seconds, expected, self.rows)
        if not confidences:
            return
        self.counts.add(0, accepted)
        self.counts.add(1, float(accepted < len(confidences)))


def draw_beta(a: float, b: float, generator: torch.Generator) -> float:
    """A draw from Beta(a, b), as a ratio of Gamma draws."""
    x, y = torch._standard_gamma(torch.tensor([a, b], dtype=torch.float64), generator=generator).tolist()
    if x + y > TINY:
        return x / (x + y)
    return float(uniform(generator) < a / (a + b))  # counts near 0: theta is near 0 or near 1


def uniform(generator: torch.Generator) -> float:
    return torch.rand((), dtype=torch.float64, generator=generator).item()
