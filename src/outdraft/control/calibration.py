"""From a drafter's confidence to the probability of acceptance, fitted while decoding.

Two kinds on one interface: Platt's line in the logit of the confidence, and isotonic counts in bins. Both are sums
(`Evidence`), so they fade, add up over rows, and start near the identity. Know nothing of controllers.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

from outdraft.control.experience import Evidence

LEAST = 0.01
"""Confidences and probabilities stay this far from 0 and 1."""


class Calibration(ABC):
    """A map from confidence to probability.

    Args:
        evidence: the sums it is made from, `len(prior())` of them.
    """

    def __init__(self, evidence: Evidence):
        self.evidence = evidence

    @classmethod
    @abstractmethod
    def prior(cls) -> list[float]:
        """The sums before anything was seen."""

    @abstractmethod
    def probability(self, confidence: float) -> float:
        """That what the drafter was so confident in is accepted."""

    @abstractmethod
    def observe(self, confidence: float, accepted: bool) -> None:
        """What the drafter was so confident in was accepted, or not."""


class Platt(Calibration):
    """logit p = intercept + slope * logit(confidence), with a Gaussian prior around (0, 1).

    Kept as the precision matrix and the precision-weighted mean, to which every observation adds one step of
    iteratively reweighted least squares.
    """

    INTERCEPT_PRECISION = 0.25
    SLOPE_PRECISION = 4.0
    LEAST_WEIGHT = 0.1
    """Of an observation; with less, a surprise at the far end would throw the line over."""

    @classmethod
    def prior(cls) -> list[float]:
        # Precision: intercept, both, slope; precision times mean: intercept, slope.
        return [cls.INTERCEPT_PRECISION, 0.0, cls.SLOPE_PRECISION, 0.0, cls.SLOPE_PRECISION]

    def line(self) -> tuple[float, float]:
        """Intercept and slope; the slope is never negative."""
        p11, p12, p22, h1, h2 = (self.evidence[index] for index in range(5))
        determinant = p11 * p22 - p12 * p12
        slope = (p11 * h2 - p12 * h1) / determinant
        if slope < 0:
            return h1 / p11, 0.0
        return (p22 * h1 - p12 * h2) / determinant, slope

    def probability(self, confidence: float) -> float:
        intercept, slope = self.line()
        return expit(intercept + slope * logit(confidence))

    def observe(self, confidence: float, accepted: bool) -> None:
        intercept, slope = self.line()
        x = logit(confidence)
        score = intercept + slope * x
        p = expit(score)
        weight = max(p * (1 - p), self.LEAST_WEIGHT)
        target = weight * score + (accepted - p)
        for index, amount in enumerate((weight, weight * x, weight * x * x, target, target * x)):
            self.evidence.add(index, amount)


class Isotonic(Calibration):
    """Counts in bins of confidence, made non-decreasing by pooling adjacent violators; between bins interpolated."""

    BINS = 12
    WEIGHT = 1.0
    """Imagined observations in each bin, as many accepted as the identity has it."""

    @classmethod
    def prior(cls) -> list[float]:
        # Successes of each bin, then trials.
        return [cls.WEIGHT * cls._middle(k) for k in range(cls.BINS)] + [cls.WEIGHT] * cls.BINS

    @classmethod
    def _middle(cls, k: int) -> float:
        return (k + 0.5) / cls.BINS

    def levels(self) -> list[float]:
        """The probability at the middle of every bin."""
        pools: list[tuple[float, float, int]] = []  # successes, trials, bins
        for k in range(self.BINS):
            pool = (self.evidence[k], self.evidence[self.BINS + k], 1)
            while pools and pools[-1][0] * pool[1] >= pool[0] * pools[-1][1]:
                above = pools.pop()
                pool = (above[0] + pool[0], above[1] + pool[1], above[2] + pool[2])
            pools.append(pool)
        return [successes / trials for successes, trials, bins in pools for _ in range(bins)]

    def probability(self, confidence: float) -> float:
        levels = self.levels()
        place = min(max(confidence * self.BINS - 0.5, 0.0), self.BINS - 1.0)
        below = min(int(place), self.BINS - 2)
        p = levels[below] + (place - below) * (levels[below + 1] - levels[below])
        return min(max(p, LEAST), 1 - LEAST)

    def observe(self, confidence: float, accepted: bool) -> None:
        k = min(max(int(confidence * self.BINS), 0), self.BINS - 1)
        self.evidence.add(k, float(accepted))
        self.evidence.add(self.BINS + k, 1.0)


CALIBRATIONS: dict[str, type[Calibration]] = {"platt": Platt, "isotonic": Isotonic}


def logit(p: float) -> float:
    p = min(max(p, LEAST), 1 - LEAST)
    return math.log(p / (1 - p))


def expit(x: float) -> float:
    return 1 / (1 + math.exp(-min(max(x, -30.0), 30.0)))
