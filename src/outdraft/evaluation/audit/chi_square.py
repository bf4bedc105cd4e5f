"""The chi-square law, central and not, and the sample size that finds an error of a stated size.

Written on torch's incomplete gamma function, so that the audit needs no further package. Knows nothing of models.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

LEAST_EXPECTED = 5.0
"""Cells that expect fewer are pooled, as Pearson's approximation asks."""

MOST_SAMPLES = 10_000_000


def survival(x: float, freedom: float, noncentrality: float = 0.0) -> float:
    """P(chi-square > x); with a noncentrality, the Poisson mixture of central ones."""
    if x <= 0:
        return 1.0
    half = noncentrality / 2
    if half == 0:
        return float(torch.special.gammaincc(_double(freedom / 2), _double(x / 2)))
    reach = 12 * math.sqrt(half) + 40
    counts = torch.arange(max(0, math.floor(half - reach)), math.ceil(half + reach), dtype=torch.float64)
    weights = torch.exp(counts * math.log(half) - half - torch.lgamma(counts + 1))
    tails = torch.special.gammaincc(freedom / 2 + counts, _double(x / 2).expand_as(counts))
    return min(1.0, float((weights * tails).sum() / weights.sum()))


def critical(alpha: float, freedom: float, noncentrality: float = 0.0) -> float:
    """The x that is exceeded with probability alpha."""
    low, high = 0.0, freedom + noncentrality + 10.0
    while survival(high, freedom, noncentrality) > alpha:
        low, high = high, 2 * high
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if survival(middle, freedom, noncentrality) > alpha else (low, middle)
    return high


def power_of(samples: float, distance: float, freedom: float, alpha: float, allowed: float = 0.0) -> float:
    """Probability that so many samples show an error of this total variation, whatever its direction.

    A law off by d has noncentrality n sum(d^2 / p) >= n (sum |d|)^2 = 4 n TV^2 (Cauchy-Schwarz), which is the least
    favourable case.

    Args:
        samples: drawn.
        distance: the error, in total variation over the cells.
        freedom: degrees of freedom.
        alpha: level of the test.
        allowed: noncentrality a sample that rounding may cause and the test forgives.
    """
    return survival(critical(alpha, freedom, samples * allowed), freedom, 4 * samples * distance**2)


def needed_samples(distance: float, freedom: float, alpha: float, power: float, allowed: float = 0.0) -> int | None:
    """The fewest samples with this power; None where rounding hides such an error from any number."""
    high = 64
    while power_of(high, distance, freedom, alpha, allowed) < power:
        high *= 2
        if high > MOST_SAMPLES:
            return None
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if power_of(middle, distance, freedom, alpha, allowed) >= power else (middle, high)
    return high


def found_distance(samples: float, freedom: float, alpha: float, power: float, allowed: float = 0.0) -> float:
    """The smallest error in total variation that so many samples find with this power."""
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if power_of(samples, middle, freedom, alpha, allowed) >= power else (middle, high)
    return high


@dataclass(frozen=True)
class Fit:
    """Pearson's statistic of counts against expectations."""

    statistic: float
    freedom: int

    def p_value(self, noncentrality: float = 0.0) -> float:
        """1 where there is nothing to compare."""
        return survival(self.statistic, self.freedom, noncentrality) if self.freedom > 0 else 1.0

    def __add__(self, other: Fit) -> Fit:
        """Of independent samples together."""
        return Fit(self.statistic + other.statistic, self.freedom + other.freedom)


def fit(observed: Sequence[float], expected: Sequence[float]) -> Fit:
    """Cells that expect too few are pooled, smallest first; what is pooled depends on the expectations alone."""
    groups = pooled(expected)
    statistic = 0.0
    for group in groups:
        hoped = sum(expected[i] for i in group)
        statistic += (sum(observed[i] for i in group) - hoped) ** 2 / hoped
    return Fit(statistic, len(groups) - 1)


def pooled(expected: Sequence[float]) -> list[list[int]]:
    """Indices of the cells in groups that expect enough each."""
    order = sorted(range(len(expected)), key=lambda i: expected[i])
    groups: list[list[int]] = []
    small: list[int] = []
    for place in order:
        small.append(place)
        if sum(expected[i] for i in small) >= LEAST_EXPECTED:
            groups.append(small)
            small = []
    if small:  # only where all cells together expect too few
        groups.append(small)
    return groups


def _double(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)
