"""Thompson sampling: a controller drafts a level if a draw of its acceptance probability makes it worth its cost.

The aim is the fewest seconds per token over many rounds, a ratio. As in Dinkelbach's method the current ratio prices a
token. Tokens that cost fewer seconds each lower the ratio; tokens that cost more raise it.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch

from outdraft.control.averages import believable
from outdraft.control.base import Adaptive, Evidence
from outdraft.control.costs import Costs

TINY = 1e-300
"""Lower bound of Gamma draws of very small counts."""
LEAST = 0.01
"""Smallest distance of confidences and probabilities from 0 and 1."""


class ThompsonController(Adaptive):
    """Treats the acceptance of a level as a Bernoulli trial whose probability theta it learns and draws.

    Args:
        prior_accepted: a of the Beta prior of theta.
        prior_rejected: b of the Beta prior of theta.
    """

    def __init__(self, *given: Any, prior_accepted: float, prior_rejected: float, **adaptive: Any):
        super().__init__(*given, **adaptive)
        self.counts = self.evidence("beta", (prior_accepted, prior_rejected))
        self.spent = self.evidence("spent", (1.0, 1.0))  # plain rounds spent, and the tokens that they brought
        self.verified = self.evidence("verified", (1.0, 1.0))  # candidates, and the levels that offered them
        self.kept = self.evidence("kept", (1.0, 1.0))  # last levels of which a candidate was verified, and all
        self.theta = 0.0  # the last draw of theta

    @abstractmethod
    def draw_theta(self, confidences: Sequence[float]) -> float:
        """Draw the probability that the next level is accepted if these were."""

    @abstractmethod
    def survivals(self, confidences: Sequence[float]) -> Sequence[float]:
        """Return, at index i, the probability that the first i of these levels are all accepted."""

    @property
    def price(self) -> float:
        """Price of a token, in seconds: the current seconds per token, at most those of plain decoding.

        Without that bound a bad stretch would make tokens dear, hence drafting worthwhile, and so prolong itself.
        """
        return self.costs.plain(self.rows) * min(1.0, self.spent[0] / self.spent[1])

    def wants(self, confidences: Sequence[float], nodes: float) -> bool:
        self.theta = self.draw_theta(confidences)
        if not confidences:
            chances = [self.theta ** (level + 1) for level in range(self.limit)]
            return worth_starting(self.price, chances, nodes, self.costs, self.rows)
        survival = self.survivals(confidences)[len(confidences)]
        # Candidates cut from a tree before verification earn nothing.
        chance = survival * self.theta * (self.kept[0] / self.kept[1])
        return worth_going_on(self.price, chance, nodes, self.costs, self.rows)

    def expected_nodes(self, nodes: int) -> float:
        return min(nodes, self.verified[0] / self.verified[1])

    def size(self, confidences: Sequence[float], gains: Sequence[float], levels: Sequence[int]) -> int:
        # A level's candidates share its chance of survival as the drafter's estimates share its mass.
        chances, mass = [], 1.0
        for confidence, survival in zip(confidences, self.survivals(confidences)[1:], strict=True):
            mass *= max(confidence, TINY)
            chances.append(survival / max(mass, TINY))
        likely = [min(1.0, gain * chances[level]) for gain, level in zip(gains, levels, strict=True)]
        size = worth_verifying(self.price, likely, self.costs, self.rows)
        if self.practising:
            self.nodes, self.levels = len(likely), len(confidences)
            return len(likely)
        while size > 1 and self.loss(len(confidences), size) > self.safeguard.credit:
            size -= 1
        self.nodes, self.levels = size, len(confidences)
        self.verdict_on(gains[:size], levels[:size])
        return size

    def verdict_on(self, gains: Sequence[float], levels: Sequence[int]) -> None:
        """Note which of the candidates offered to `size` are verified, and so what this round's verdict is about."""

    def rest(self) -> None:
        super().rest()
        self.spent.add(0, 1.0)
        self.spent.add(1, 1.0)

    def learn(self, confidences: Sequence[float], accepted: int, tokens: int, seconds: float) -> None:
        levels = len(confidences)
        expected = self.costs.round(levels, 1 + self.nodes, self.rows)
        self.spent.add(0, believable(seconds, expected) / self.costs.plain(self.rows))
        self.spent.add(1, tokens)
        if self.levels > 1:
            self.kept.add(0, float(levels == self.levels))
            self.kept.add(1, 1.0)
        if levels:
            self.counts.add(0, accepted)
            self.counts.add(1, float(accepted < levels))
            if not self.practising:  # nobody cut those drafts
                self.verified.add(0, self.nodes)
                self.verified.add(1, levels)


class BetaController(ThompsonController):
    """Learns from verdicts alone: it draws theta ~ Beta(a, b) once per round, and every level survives with it."""

    def draw_theta(self, confidences: Sequence[float]) -> float:
        return self.theta if confidences else draw_beta(self.counts[0], self.counts[1], self.generator)

    def survivals(self, confidences: Sequence[float]) -> list[float]:
        return [self.theta**levels for levels in range(len(confidences) + 1)]


class CalibratedController(ThompsonController):
    """Uses the drafter's confidence c, mapped to m(c), the acceptance rate that such confidence had.

    The survival so far is the product of m over the levels kept. For the next level, whose confidence is unknown, theta
    ~ Beta(a + k m(c), b + k (1 - m(c))), where c is the confidence in the last one kept.

    Args:
        confidence_weight: k, how many observations the calibrated confidence counts for in theta.
    """

    def __init__(self, *given: Any, confidence_weight: float, **thompson: Any):
        super().__init__(*given, **thompson)
        self.calibration = Platt(self.evidence("platt", Platt.PRIOR))
        self.weight = confidence_weight
        self._survival = [1.0]  # survival of this round's levels, one after another
        self._verified: list[float] = []  # confidence in each level's candidates that are verified, of cut trees

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

    def verdict_on(self, gains: Sequence[float], levels: Sequence[int]) -> None:
        masses = [1.0] + [0.0] * (max(levels) + 1)
        for gain, level in zip(gains, levels, strict=True):
            masses[level + 1] += gain
        self._verified = [mass / max(above, TINY) for above, mass in pairwise(masses)]

    def learn(self, confidences: Sequence[float], accepted: int, tokens: int, seconds: float) -> None:
        super().learn(confidences, accepted, tokens, seconds)
        judged = self._verified[: len(confidences)] or confidences
        self._verified = []
        del self._survival[1:]
        for level, confidence in enumerate(judged[: accepted + 1]):  # levels below a rejection are not judged
            self.calibration.observe(confidence, level < accepted)


class Platt:
    """Platt scaling from a drafter's confidence to the probability of acceptance, fitted while decoding.

    logit p = intercept + slope * logit(confidence), with a Gaussian prior around (0, 1). The fit is kept as the
    precision matrix and the precision-weighted mean, to which every observation adds one step of iteratively reweighted
    least squares.

    Args:
        evidence: precision (intercept, both, slope), then precision times mean (intercept, slope); `PRIOR` at first.
    """

    INTERCEPT_PRECISION, SLOPE_PRECISION = 0.25, 4.0
    PRIOR = (INTERCEPT_PRECISION, 0.0, SLOPE_PRECISION, 0.0, SLOPE_PRECISION)
    LEAST_WEIGHT = 0.1
    """Smallest weight of an observation; with less, a surprise at the far end would overturn the line."""

    def __init__(self, evidence: Evidence):
        self.evidence = evidence

    def line(self) -> tuple[float, float]:
        """Return intercept and slope; the slope is never negative."""
        p11, p12, p22, h1, h2 = (self.evidence[index] for index in range(5))
        determinant = p11 * p22 - p12 * p12
        slope = (p11 * h2 - p12 * h1) / determinant
        if slope < 0:
            return h1 / p11, 0.0
        return (p22 * h1 - p12 * h2) / determinant, slope

    def probability(self, confidence: float) -> float:
        """Return the probability that a candidate of this confidence is accepted."""
        intercept, slope = self.line()
        return expit(intercept + slope * logit(confidence))

    def observe(self, confidence: float, accepted: bool) -> None:
        """Learn whether a candidate of this confidence was accepted."""
        intercept, slope = self.line()
        x = logit(confidence)
        score = intercept + slope * x
        p = expit(score)
        weight = max(p * (1 - p), self.LEAST_WEIGHT)
        target = weight * score + (accepted - p)
        for index, amount in enumerate((weight, weight * x, weight * x * x, target, target * x)):
            self.evidence.add(index, amount)


def worth_starting(price: float, chances: Sequence[float], nodes: float, costs: Costs, rows: int) -> bool:
    """Return True if some draft earns more than it costs; later levels may pay for the beginning.

    Args:
        price: price of a token, in seconds.
        chances: at index i, the probability that level i + 1 and all above it are accepted.
        nodes: nodes that each level adds to the target's pass.
        costs: costs of drafting and verifying.
        rows: number of rows decoded together.
    """
    begin, step, added = costs.begin(rows), costs.step(rows), costs.adding(rows)
    earned = spent = 0.0
    for level, chance in enumerate(chances):
        earned += price * chance
        spent += step if level else begin
        if earned > spent + added(nodes * (level + 1)):
            return True
    return False


def worth_going_on(price: float, chance: float, nodes: float, costs: Costs, rows: int) -> bool:
    """Return True if one more level, accepted with probability `chance`, earns more than it costs."""
    return price * chance > costs.step(rows) + costs.further(nodes, rows)


def worth_verifying(price: float, gains: Sequence[float], costs: Costs, rows: int) -> int:
    """Return how many candidates to verify, at least one, given their acceptance probabilities in the order offered."""
    added = costs.adding(rows)
    earned, best, size = 0.0, float("-inf"), 1
    for nodes, gain in enumerate(gains, start=1):
        earned += price * gain
        net = earned - added(nodes)
        if net > best:
            best, size = net, nodes
    return min(size, len(gains))


def draw_beta(a: float, b: float, generator: torch.Generator) -> float:
    """Draw from Beta(a, b), as a ratio of Gamma draws."""
    x, y = torch._standard_gamma(torch.tensor([a, b], dtype=torch.float64), generator=generator).tolist()
    if x + y > TINY:
        return x / (x + y)
    uniform = torch.rand((), dtype=torch.float64, generator=generator).item()
    return float(uniform < a / (a + b))  # counts near 0: theta is near 0 or near 1


def logit(p: float) -> float:
    p = min(max(p, LEAST), 1 - LEAST)
    return math.log(p / (1 - p))


def expit(x: float) -> float:
    return 1 / (1 + math.exp(-min(max(x, -30.0), 30.0)))
