"""Draws against the laws they are said to come from: the randomised probability-integral transform.

With a law's outcomes put in order of their probability, the largest first, u = P(more probable than x) + V P(as
probable as x), V uniform, is uniform if x was drawn from that law. Draws of any number of different laws so become one
sample of a uniform number. Too soft a law, too sharp a one and missing rare outcomes all show. Knows no model.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from outdraft.evaluation.audit.chi_square import LEAST_EXPECTED, Fit, fit

BINS = 20


def ranks(laws: Tensor, drawn: Tensor, uniform: Tensor) -> Tensor:
    """u of every draw.

    Args:
        laws: `(draws, outcomes)`, which need not be normalised.
        drawn: `(draws,)` outcomes.
        uniform: `(draws,)` the V of each.
    """
    laws = laws.double()
    own = laws.gather(1, drawn[:, None])
    above = (laws * (laws > own)).sum(1)
    level = (laws * (laws == own)).sum(1)
    total = laws.sum(1)
    # An outcome that its law rules out has nothing below it: u = 1, the last bin's very end.
    return torch.where(own[:, 0] > 0, (above + uniform.to(laws) * level) / total, 1.0)


@dataclass
class Ranks:
    """Ranks collected draw by draw, with a generator of their own."""

    seed: int = 0
    values: list[float] = field(default_factory=list)
    impossible: int = 0
    """Draws that their law gives no probability."""

    def __post_init__(self) -> None:
        self._generator = torch.Generator().manual_seed(self.seed)

    def add(self, laws: Tensor, drawn: Tensor) -> None:
        """`(draws, outcomes)` laws and what was drawn from each."""
        uniform = torch.rand(len(drawn), dtype=torch.float64, generator=self._generator)
        laws = laws.cpu()
        self.impossible += int((laws.gather(1, drawn.cpu()[:, None]) <= 0).sum())
        self.values += ranks(laws, drawn.cpu(), uniform).tolist()

    @property
    def bins(self) -> int:
        return max(2, min(BINS, int(len(self.values) / LEAST_EXPECTED)))

    def histogram(self) -> list[int]:
        """Draws in every bin of equal width."""
        counts = [0] * self.bins
        for value in self.values:
            counts[min(self.bins - 1, int(value * self.bins))] += 1
        return counts

    def fit(self) -> Fit:
        """Pearson's test of uniformity."""
        if len(self.values) < 2 * LEAST_EXPECTED:
            return Fit(0.0, 0)
        counts = self.histogram()
        return fit(counts, [len(self.values) / len(counts)] * len(counts))
