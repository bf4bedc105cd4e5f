"""Whether drafting is worth its seconds: the one test that all controllers who think in costs share.

The aim is the fewest seconds per token over many rounds, a ratio. As in Dinkelbach's method the ratio now achieved,
lambda, prices a token: what adds tokens for fewer than lambda seconds each lowers the ratio, what costs more raises it.
Knows costs and probabilities, nothing of how they were learned.
"""

from __future__ import annotations

from collections.abc import Sequence

from outdraft.control.costs import Costs, believable
from outdraft.control.experience import Evidence


class Pace:
    """Seconds per token now achieved.

    Never more than plain decoding's, which is there for the taking: without that bound a bad stretch would make tokens
    dear and so drafting worthwhile, and prolong itself.

    Args:
        evidence: sums of seconds, in plain rounds, and of tokens; `PRIOR` before anything was seen.
    """

    PRIOR = (1.0, 1.0)  # one plain round

    def __init__(self, evidence: Evidence, costs: Costs):
        self.evidence, self.costs = evidence, costs

    def observe(self, tokens: int, seconds: float, expected: float, rows: int) -> None:
        """A round that emitted so many tokens; `expected` are the seconds it should have taken."""
        self.evidence.add(0, believable(seconds, expected) / self.costs.plain(rows))
        self.evidence.add(1, tokens)

    def seconds_per_token(self, rows: int) -> float:
        return self.costs.plain(rows) * min(1.0, self.evidence[0] / self.evidence[1])


def price_of(paces: Sequence[Pace], costs: Costs, rows: int) -> float:
    """Of a token, in seconds, where so many rows share every round; as for `Pace`, never above plain decoding's."""
    seconds, tokens = (sum(pace.evidence[index] for pace in paces) for index in (0, 1))
    return costs.plain(rows) / rows * min(1.0, seconds / tokens)


def worth_starting(price: float, chances: Sequence[float], nodes: float, costs: Costs, rows: int) -> bool:
    """Whether some draft earns more than it costs.

    Args:
        price: of a token, in seconds.
        chances: at index i, tokens expected of level i + 1: the probability that it and all above it are accepted,
            summed over the rows that draft together.
        nodes: that each level adds to every row in the target's pass.
    """
    begin, step = costs.begin(rows), costs.step(rows)
    earned = spent = 0.0
    for level, chance in enumerate(chances):
        earned += price * chance
        spent += step if level else begin
        if earned > spent + costs.added(nodes * (level + 1), rows):
            return True
    return False


def worth_going_on(price: float, chance: float, nodes: float, costs: Costs, rows: int) -> bool:
    """Whether one more level earns more than it costs.

    Args:
        chance: tokens expected of it, summed over the rows that draft together.
        nodes: that it adds to every row in the target's pass.
    """
    return price * chance > costs.step(rows) + costs.added(nodes, rows)


def worth_verifying(price: float, gains: Sequence[float], costs: Costs, rows: int) -> int:
    """How many of the candidates to verify, given the chances of acceptance in the order in which they are offered; at
    least one. Where rows are verified together, gains are sums over them."""
    earned, best, size = 0.0, float("-inf"), 1
    for nodes, gain in enumerate(gains, start=1):
        earned += price * gain
        net = earned - costs.added(nodes, rows)
        if net > best:
            best, size = net, nodes
    return min(size, len(gains))
