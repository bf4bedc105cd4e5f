"""What the two Thompson-sampling controllers share: the Beta posterior, its draws, and the two rules of using them.

Knows nothing of how a subclass turns the posterior and the confidences into a probability.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch

from outdraft.control.adaptive import Adaptive, Outcome
from outdraft.control.worth import Pace, worth_going_on, worth_starting, worth_verifying

TINY = 1e-300
"""Where Gamma draws of very small counts are cut off."""

NODES_A_LEVEL = (1.0, 1.0)
"""Candidates verified, and levels that offered them, before any was seen."""


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
        self.verified = self.evidence("verified", NODES_A_LEVEL)
        self.kept = self.evidence("kept", (1.0, 1.0))
        self.theta = 0.0  # the last one drawn

    @abstractmethod
    def draw_theta(self, confidences: Sequence[float]) -> float:
        """A draw of the probability that the next level is accepted if these were."""

    @abstractmethod
    def survivals(self, confidences: Sequence[float]) -> Sequence[float]:
        """At index i, the probability that the first i of these levels are all accepted."""

    def survival(self, confidences: Sequence[float]) -> float:
        """The probability that all of these levels are accepted."""
        return self.survivals(confidences)[len(confidences)]

    @property
    def weighs(self) -> bool:
        return self.rule == "worth"

    def wants(self, confidences: Sequence[float], nodes: float) -> bool:
        self.theta = self.draw_theta(confidences)
        if self.rule == "bernoulli":
            return uniform(self.generator) < self.theta
        if confidences:
            chance = self.survival(confidences) * self.theta * self.kept_share
            return worth_going_on(self.price, chance, nodes, self.costs, self.rows)
        return worth_starting(self.price, self.ahead(), nodes, self.costs, self.rows)

    def ahead(self) -> list[float]:
        """The chance of every level of a draft that is not begun yet, by the last draw of theta."""
        return [self.theta ** (level + 1) for level in range(self.limit)]

    @property
    def price(self) -> float:
        """Of a token of this row, in seconds."""
        return self.pace.seconds_per_token(self.rows)

    @property
    def kept_share(self) -> float:
        """Of the last levels of drafts, those of which a candidate was verified: what is cut earns nothing."""
        return self.kept[0] / self.kept[1]

    def expected_nodes(self, nodes: int) -> float:
        return min(nodes, self.verified[0] / self.verified[1])

    def size(self, confidences: Sequence[float], gains: Sequence[float], levels: Sequence[int]) -> int:
        likely = self.likely(confidences, gains, levels)
        size = worth_verifying(self.price, likely, self.costs, self.rows)
        while size > 1 and self.loss(len(confidences), size) > self.safeguard.credit:
            size -= 1
        self._nodes, self._levels = size, len(confidences)
        return size

    def likely(self, confidences: Sequence[float], gains: Sequence[float], levels: Sequence[int]) -> list[float]:
        """Of every candidate, what `gains`, the drafter's own estimate that its whole path is accepted, is worth.

        A level's candidates share its chance of survival as the drafter's estimates share its mass.
        """
        chances, mass = [], 1.0
        for confidence, survival in zip(confidences, self.survivals(confidences)[1:], strict=True):
            mass *= max(confidence, TINY)
            chances.append(survival / max(mass, TINY))
        return [min(1.0, gain * chances[level]) for gain, level in zip(gains, levels, strict=True)]

    def learn(self, outcome: Outcome) -> None:
        self.pace.observe(outcome.tokens, outcome.seconds, outcome.expected, self.rows)
        levels = len(outcome.confidences)
        if outcome.drafted > 1:
            self.kept.add(0, float(levels == outcome.drafted))
            self.kept.add(1, 1.0)
        if not levels:
            return
        self.counts.add(0, outcome.accepted)
        self.counts.add(1, float(outcome.accepted < levels))
        self.verified.add(0, outcome.nodes)
        self.verified.add(1, levels)


def draw_beta(a: float, b: float, generator: torch.Generator) -> float:
    """A draw from Beta(a, b), as a ratio of Gamma draws."""
    x, y = torch._standard_gamma(torch.tensor([a, b], dtype=torch.float64), generator=generator).tolist()
    if x + y > TINY:
        return x / (x + y)
    return float(uniform(generator) < a / (a + b))  # counts near 0: theta is near 0 or near 1


def uniform(generator: torch.Generator) -> float:
    return torch.rand((), dtype=torch.float64, generator=generator).item()
