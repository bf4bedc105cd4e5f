"""The statistics of an audit: Pearson's chi-square with its power and sample size, ranks of draws, and the energy test.

Chi-square needs scipy, the extra `verify`, which is imported only when a chi-square distribution is first needed.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from outdraft.errors import UserError
from outdraft.evaluation.audit.findings import AuditSettings, Finding

LEAST_EXPECTED = 5.0
"""The least expected count of a cell; smaller cells are pooled, as Pearson's approximation requires."""

LEAST_SAMPLES, MOST_SAMPLES = 33, 10_000_000

BINS = 20
"""The most bins of ranks."""

SEGMENTS, WIDTH = 4, 16
"""The number of parts of a text, and of random features of a part's tokens."""

PERMUTATIONS_AT_ONCE = 1000


def scipy_stats() -> Any:
    """Import the module `scipy.stats`."""
    try:
        from scipy import stats
    except ImportError:
        raise UserError(
            "the tests of sampled texts need scipy; install it with: pip install 'outdraft[verify]'"
        ) from None
    return stats


def survival(x: float, freedom: float, noncentrality: float = 0.0) -> float:
    """Return P(chi-square > x)."""
    return float(scipy_stats().ncx2.sf(x, freedom, noncentrality))


def critical(alpha: float, freedom: float, noncentrality: float = 0.0) -> float:
    """Return the x that chi-square exceeds with probability alpha."""
    return float(scipy_stats().ncx2.isf(alpha, freedom, noncentrality))


def power_of(samples: float, distance: float, freedom: float, alpha: float, allowed: float = 0.0) -> float:
    """Return the probability that `samples` detect an error of this total variation, whatever its direction.

    A distribution that is off by d has noncentrality n sum(d^2 / p) >= n (sum |d|)^2 = 4 n TV^2 (Cauchy-Schwarz), which
    is the least favourable case.

    Args:
        distance: the error, in total variation over the cells.
        allowed: noncentrality a sample that rounding may cause and the test allows.
    """
    return survival(critical(alpha, freedom, samples * allowed), freedom, 4 * samples * distance**2)


def needed_samples(distance: float, freedom: float, alpha: float, power: float, allowed: float = 0.0) -> int | None:
    """Return the fewest samples with this power; None where rounding hides such an error from any number."""
    found = bisect_left(
        range(MOST_SAMPLES), power, lo=LEAST_SAMPLES, key=lambda n: power_of(n, distance, freedom, alpha, allowed)
    )
    return found if found < MOST_SAMPLES else None


def found_distance(samples: float, freedom: float, alpha: float, power: float, allowed: float = 0.0) -> float:
    """Return the smallest total variation that `samples` detect with this power; 1 with no degree of freedom."""
    if freedom <= 0:
        return 1.0
    bound = critical(alpha, freedom, samples * allowed)
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if survival(bound, freedom, 4 * samples * middle**2) >= power else (middle, high)
    return high


@dataclass(frozen=True)
class Fit:
    """Pearson's statistic of counts against expectations."""

    statistic: float
    freedom: int

    def p_value(self, noncentrality: float = 0.0) -> float:
        """Return the p-value; 1 where there is nothing to compare."""
        return survival(self.statistic, self.freedom, noncentrality) if self.freedom > 0 else 1.0

    def __add__(self, other: Fit) -> Fit:
        return Fit(self.statistic + other.statistic, self.freedom + other.freedom)


def fit(observed: Sequence[float], expected: Sequence[float]) -> Fit:
    groups = pooled(expected)
    statistic = 0.0
    for group in groups:
        hoped = sum(expected[i] for i in group)
        statistic += (sum(observed[i] for i in group) - hoped) ** 2 / hoped
    return Fit(statistic, len(groups) - 1)


def pooled(expected: Sequence[float]) -> list[list[int]]:
    """Group the cells' indices so that each group expects enough."""
    groups: list[list[int]] = []
    small: list[int] = []
    for cell in sorted(range(len(expected)), key=lambda i: expected[i]):
        small.append(cell)
        if sum(expected[i] for i in small) >= LEAST_EXPECTED:
            groups.append(small)
            small = []
    if small:  # only where all cells together expect too few
        groups.append(small)
    return groups


def ranks(probs: Tensor, drawn: Tensor, uniform: Tensor) -> Tensor:
    """Compute the randomised probability-integral transform of every draw.

    Order the outcomes of a distribution by falling probability. Then u = P(more probable than x) + V P(as probable as
    x), V uniform, is uniform if x was drawn from that distribution. Draws from any number of different distributions so
    become one sample of a uniform number. Too soft a distribution, too sharp a one and missing rare outcomes all show.

    Args:
        probs: `(draws, outcomes)`, which need not be normalised.
        drawn: `(draws,)` outcomes drawn.
        uniform: `(draws,)` uniform V of each draw.

    Returns:
        `(draws,)` the u of each draw.
    """
    probs = probs.double()
    own = probs.gather(1, drawn[:, None])
    above = (probs * (probs > own)).sum(1)
    level = (probs * (probs == own)).sum(1)
    # An outcome without probability has nothing below it: u = 1, the last bin's very end.
    return torch.where(own[:, 0] > 0, (above + uniform.to(probs) * level) / probs.sum(1), 1.0)


@dataclass
class Ranks:
    """Ranks that are collected draw by draw, with their own generator."""

    seed: int = 0
    values: list[float] = field(default_factory=list)
    impossible: int = 0
    """The number of draws to which their distribution gives no probability."""

    def __post_init__(self) -> None:
        self._generator = torch.Generator().manual_seed(self.seed)

    def state(self) -> dict[str, Any]:
        values = torch.tensor(self.values, dtype=torch.float64)
        return {"values": values, "impossible": self.impossible, "generator": self._generator.get_state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.values, self.impossible = state["values"].tolist(), state["impossible"]
        self._generator.set_state(state["generator"])

    def add(self, probs: Tensor, drawn: Tensor) -> None:
        """Add draws, one from each row of the `(draws, outcomes)` probabilities."""
        uniform = torch.rand(len(drawn), dtype=torch.float64, generator=self._generator)
        probs, drawn = probs.cpu(), drawn.cpu()
        self.impossible += int((probs.gather(1, drawn[:, None]) <= 0).sum())
        self.values += ranks(probs, drawn, uniform).tolist()

    def histogram(self) -> list[int]:
        """Count the draws in bins of equal width."""
        counts = [0] * max(2, min(BINS, int(len(self.values) / LEAST_EXPECTED)))
        for value in self.values:
            counts[min(len(counts) - 1, int(value * len(counts)))] += 1
        return counts

    def fit(self) -> Fit:
        if len(self.values) < 2 * LEAST_EXPECTED:
            return Fit(0.0, 0)
        counts = self.histogram()
        return fit(counts, [len(self.values) / len(counts)] * len(counts))


def ranks_finding(
    name: str, question: str, noun: str, ranks: Ranks, settings: AuditSettings, alpha: float, remark: str = ""
) -> Finding:
    """Test whether ranks are uniform.

    Args:
        noun: what was ranked, in the plural.
        alpha: level that the stated power refers to.
        remark: end of the evidence.
    """
    own, count = ranks.fit(), len(ranks.values)
    found = found_distance(count, own.freedom, alpha, settings.power)
    return Finding(
        name,
        question,
        True,
        f"{count} {noun}, {own.freedom + 1} classes of rank, chi-square {own.statistic:.1f}; an error that favours "
        f"likely or unlikely {noun} by a total variation of {found:.2g} is found with probability "
        f"{settings.power:g}{remark}.",
        p_value=own.p_value(),
        figures={
            noun: count,
            "statistic": own.statistic,
            "degrees_of_freedom": own.freedom,
            "total_variation_found": found,
            "histogram": ranks.histogram(),
        },
    )


def text_features(texts: Sequence[Sequence[int]], vocab: int, length: int, seed: int) -> Tensor:
    """Compute `(texts, features)`: random signs of the tokens, summed over each part of the text, and its length.

    Texts that share tokens in the same part are near to each other, whatever the tokens are.
    """
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (vocab, WIDTH), generator=generator).double() * 2 - 1
    part = -(-length // SEGMENTS)
    rows = []
    for text in texts:
        sums = []
        for start in range(0, length, part):
            tokens = torch.tensor(list(text[start : start + part]), dtype=torch.long)
            sums += [signs[tokens].sum(0) / part, torch.tensor([4 * len(tokens) / part], dtype=torch.double)]
        rows.append(torch.cat(sums))
    return torch.stack(rows)


def energy_p_value(pairs: Sequence[tuple[Tensor, Tensor]], permutations: int, seed: int) -> tuple[float, float]:
    """Test by permutation that both samples of every pair come from one distribution.

    Args:
        pairs: `(n, features)` and `(n, features)` for every stratum; labels are exchanged within it.

    Returns:
        the statistic and its p-value, (1 + as large) / (1 + permutations).
    """
    generator = torch.Generator().manual_seed(seed)
    observed, drawn = 0.0, torch.zeros(permutations, dtype=torch.double)
    for one, other in pairs:
        distances = torch.cdist(torch.cat([one, other]), torch.cat([one, other]))
        signs = torch.cat([torch.full((len(one),), 1 / len(one)), torch.full((len(other),), -1 / len(other))]).double()
        observed += float(-(signs @ distances @ signs))
        for start in range(0, permutations, PERMUTATIONS_AT_ONCE):
            count = min(PERMUTATIONS_AT_ONCE, permutations - start)
            order = torch.rand(count, len(signs), generator=generator).argsort(1)
            shuffled = signs[order]
            drawn[start : start + count] -= ((shuffled @ distances) * shuffled).sum(1)
    as_large = int((drawn >= observed - 1e-12).sum())
    return observed, (1 + as_large) / (1 + permutations)
