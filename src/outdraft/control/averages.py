"""Averages of seconds that stalls of the machine do not spoil: of one cost, and of a pass by its nodes."""

from __future__ import annotations

OUTLIER = 2.0
"""Factor by which an observation may exceed the expected value before it is clipped: a machine may stall once."""
AFRESH = 3.0
"""Factor by which an observation must fall below the expected value to show that the expectation was an outlier."""
MEMORY = 20
"""Number of observations that an average covers."""
NODE_SHARE = 0.02
"""Seconds of a further node relative to a one-node pass, before passes of several sizes were measured."""
NODE_WEIGHT = 8.0
"""Weight of the prior NODE_SHARE: as observations whose squared distances from their mean add up to this."""


def believable(value: float, expected: float) -> float:
    """Return the value, clipped where it exceeds the expected value as an outlier."""
    return min(value, OUTLIER * expected)


class Average:
    """An exponential average that is robust to outliers.

    Seconds have a floor and no ceiling. An observation far above the average is clipped. One far below it shows that
    the average began with an outlier (compilation, cold caches), and restarts it.

    Args:
        settling: number of first observations of which the smallest counts, as first ones are often too large.
        memory: number of observations that the average covers.
    """

    def __init__(self, settling: int = 1, memory: int = MEMORY) -> None:
        self.value, self.count, self.settling, self.memory = 0.0, 0, settling, memory

    def observe(self, value: float) -> None:
        if self.value <= 0 or value < self.value / AFRESH:
            self.value, self.count = value, min(self.count + 1, self.settling)
            return
        self.count = min(self.count + 1, self.memory)
        if self.count <= self.settling:
            self.value = min(self.value, value)
        else:
            self.value += (believable(value, self.value) - self.value) / self.count

    def forget(self, share: float) -> None:
        """Let the observations so far weigh only this share, so that the next ones count for more."""
        self.count = max(min(self.count, self.settling), round(share * self.count))


class Line:
    """Exponentially weighted least squares of a pass's seconds on its nodes, with a weak prior slope.

    Means and spreads are kept separately. Spreads fade only as far as an observation brings news about the slope, so a
    long stretch of one-node passes moves the level and keeps the slope.

    Args:
        unit: nodes that count as one: the rows of a bucket, so that priors mean the same in all buckets.
    """

    def __init__(self, unit: int = 1) -> None:
        self.unit, self.count = unit, 0
        self.nodes = self.seconds = 0.0  # means
        self.spread = self.product = 0.0  # of nodes; of nodes with seconds

    def observe(self, total: int, seconds: float) -> None:
        """Learn from a pass over `total` nodes."""
        nodes = total / self.unit
        if self.seconds <= 0 or seconds < self.at(total) / AFRESH:
            self.count, self.nodes, self.seconds, self.spread, self.product = 1, nodes, seconds, 0.0, 0.0
            return
        self.count = min(self.count + 1, MEMORY)
        rate = 1 / self.count
        apart, slower = nodes - self.nodes, believable(seconds, self.at(total)) - self.seconds
        news = apart * apart
        fade = rate * min(1.0, news / self.spread) if self.spread > 0 else 0.0
        self.spread += rate * (1 - rate) * news - fade * self.spread
        self.product += rate * (1 - rate) * apart * slower - fade * self.product
        self.nodes += rate * apart
        self.seconds += rate * slower

    def forget(self, share: float) -> None:
        """Let the observations so far weigh only this share, so that the next ones count for more."""
        self.count = max(min(self.count, 1), round(share * self.count))

    @property
    def slope(self) -> float:
        """Seconds that a further unit of nodes adds, never negative."""
        # The prior slope is NODE_SHARE of a one-node pass for every node, and that pass is seconds less the others.
        share = NODE_SHARE * self.unit
        prior = self.seconds * share / (1 + share * max(0.0, self.nodes - 1 / self.unit))
        weight = NODE_WEIGHT / max(1, self.count)
        return max(0.0, (self.product + weight * prior) / (self.spread + weight))

    def at(self, total: float) -> float:
        """Return the seconds of a pass over `total` nodes."""
        # Never less than half the mean: a slope that is too steep must not make small passes free.
        return max(self.seconds / 2, self.seconds + self.slope * (total / self.unit - self.nodes))
