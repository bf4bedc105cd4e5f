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


def worth_starting(price: float, theta: float, nodes: int, limit: int, costs: Costs, rows: int) -> bool:
    """Whether some draft of up to `limit` levels earns more than it costs.

    Args:
        price: of a token, in seconds.
        theta: probability that a level is accepted if the one above was.
        nodes: that each level adds to the target's pass.
    """
    begin, step, node = costs.begin(rows), costs.step(rows), costs.added(nodes, rows)
    earned = spent = 0.0
    survival = 1.0
    for level in range(limit):
        survival *= theta
        earned += price * survival
        spent += (step if level else begin) + node
        if earned > spent:
            return True
    return False


def worth_going_on(price: float, chance: float, nodes: int, costs: Costs, rows: int) -> bool:
    """Whether one more level, accepted with this chance (all levels above included), earns more than it costs."""
    return price * chance > costs.step(rows) + costs.added(nodes, rows)


def worth_verifying(price: float, gains: Sequence[float], costs: Costs, rows: int) -> int:
    """How many of the candidates to verify, given the chances of acceptance in the order in which they are offered; at
    least one."""
    earned, best, size = 0.0, float("-inf"), 1
    for nodes, gain in enumerate(gains, start=1):
        earned += price * gain
        net = earned - costs.added(nodes, rows)
        if net > best:
            best, size = net, nodes
    return min(size, len(gains))
