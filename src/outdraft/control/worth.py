"""Whether drafting is worth its seconds: the one test that all controllers who think in costs share.

The aim is the fewest seconds per token over many rounds, a ratio. As in Dinkelbach's method the ratio now achieved,
lambda, prices a token: what adds tokens for fewer than lambda seconds each lowers the ratio, what costs more raises it.
Knows costs and probabilities, nothing of how they were learned.
"""

from __future__ import annotations

from collections.abc import Sequence

from outdraft.control.costs import Costs, believable

MEMORY = 20
"""Rounds that the pace looks back on."""


class Pace:
    """Seconds per token now achieved, an exponential average of a row's rounds.

    Never more than plain decoding's, which is there for the taking: without that bound a bad stretch would make tokens
    dear and so drafting worthwhile, and prolong itself.
    """

    def __init__(self, costs: Costs):
        self.costs = costs
        self.seconds = self.tokens = 0.0
        self.rounds = 0

    def observe(self, tokens: int, seconds: float) -> None:
        """A round that emitted so many tokens."""
        if self.rounds:
            seconds = believable(seconds, self.seconds)
        self.rounds = min(self.rounds + 1, MEMORY)
        # The first rounds share the average with one imagined plain round.
        rate = 1 / min(self.rounds + 1, MEMORY)
        before = self.seconds, self.tokens
        if self.rounds == 1:
            before = seconds, 1.0
        self.seconds = before[0] + rate * (seconds - before[0])
        self.tokens = before[1] + rate * (tokens - before[1])

    def seconds_per_token(self, rows: int) -> float:
        plain = self.costs.plain(rows)
        return min(plain, self.seconds / self.tokens) if self.tokens > 0 else plain


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
    """How many of the candidates to verify, given the chances of acceptance in falling order; at least one."""
    earned, best, size = 0.0, float("-inf"), 1
    for nodes, gain in enumerate(gains, start=1):
        earned += price * gain
        net = earned - costs.added(nodes, rows)
        if net > best:
            best, size = net, nodes
    return min(size, len(gains))
