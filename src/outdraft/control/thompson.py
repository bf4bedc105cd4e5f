"""What the two Thompson-sampling controllers share: the Beta posterior, its draws, and the two rules of using them.

Knows nothing of how a subclass turns the posterior and the confidences into a probability.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch

from outdraft.control.adaptive import Adaptive
from outdraft.control.worth import Pace, worth_going_on, worth_starting, worth_verifying

PROMISES = 4.0
"""Accepted levels for which, at first, the drafter's own estimates are taken at their word."""

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
        self.promises = self.evidence("promises", [PROMISES, PROMISES])  # levels accepted, levels promised
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

    def size(self, gains: Sequence[float]) -> int:
        # The drafter's estimates are corrected by what became of its earlier ones, all by the same factor.
        kept = self.promises[0] / self.promises[1]
        price = self.pace.seconds_per_token(self.rows)
        size = worth_verifying(price, [min(1.0, kept * gain) for gain in gains], self.costs, self.rows)
        self._nodes = size
        return size

    def learn(self, confidences: Sequence[float], accepted: int, tokens: int, seconds: float) -> None:
        expected = self.costs.round(len(confidences), 1 + self._nodes, self.rows)
        self.pace.observe(tokens, seconds, expected, self.rows)
        if not confidences:
            return
        self.counts.add(0, accepted)
        self.counts.add(1, float(accepted < len(confidences)))
        self.promises.add(0, accepted)
        self.promises.add(1, sum(math.prod(confidences[:level]) for level in range(1, len(confidences) + 1)))


def draw_beta(a: float, b: float, generator: torch.Generator) -> float:
    """A draw from Beta(a, b), as a ratio of Gamma draws."""
    x, y = torch._standard_gamma(torch.tensor([a, b], dtype=torch.float64), generator=generator).tolist()
    if x + y > TINY:
        return x / (x + y)
    return float(uniform(generator) < a / (a + b))  # counts near 0: theta is near 0 or near 1


def uniform(generator: torch.Generator) -> float:
    return torch.rand((), dtype=torch.float64, generator=generator).item()
