"""One decision for all rows of a batch: another level, so many candidates, or none, for everybody.

A draft step and the target's pass run over all rows at once, padded to the largest tree. So what counts is the tokens
that all rows together may expect, against the seconds of the round: a level that one row alone could not pay for may be
paid by sixteen, and one that the best row would like may cost the others more than it earns. Knows the rows'
controllers, which must weigh tokens against seconds, and costs; nothing of trees, tokens or models.

A row's share in a decision is what its own controller expects of it. Decisions hold for levels of which nothing is
drawn yet in any row, so they may depend on everything drawn before, in all rows, and change no row's law.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean

from outdraft.control.adaptive import Outcome
from outdraft.control.costs import Costs
from outdraft.control.safeguard import Safeguard
from outdraft.control.thompson import ThompsonController
from outdraft.control.worth import price_of, worth_going_on, worth_starting, worth_verifying


class Together:
    """One round of a batch.

    Args:
        controllers: of the rows, told before how many these are.
        costs: of the round.
    """

    def __init__(self, controllers: Sequence[ThompsonController], costs: Costs):
        self.controllers, self.costs, self.rows = controllers, costs, len(controllers)
        self.safeguard = Safeguard.pooled([controller.safeguard for controller in controllers])
        self.price = price_of([controller.pace for controller in controllers], costs, self.rows)
        self._nodes = 0.0

    def decide(self, confidences: Sequence[Sequence[float]], able: Sequence[bool], nodes: int) -> bool:
        """Whether all rows that are able to draft another level do.

        Args:
            confidences: of every row, as in `Controller.decide`.
            able: of every row, whether it has drafted so far and may go on; at least one.
            nodes: as in `Controller.decide`.
        """
        levels = max(len(kept) for kept in confidences)
        added = fmean(controller.expected_nodes(nodes) for controller in self.controllers)
        ahead = [0.0] * max(controller.limit for controller in self.controllers)
        chance = 0.0
        for controller, kept, may in zip(self.controllers, confidences, able, strict=True):
            if not may:
                continue
            controller.theta = controller.draw_theta(kept)
            chance += controller.survival(kept) * controller.theta * controller.kept_share
            if levels == 0:
                ahead = [sum(pair) for pair in zip(ahead, controller.ahead(), strict=True)]
        if levels == 0:
            wanted = worth_starting(self.price, ahead, added, self.costs, self.rows)
        else:
            wanted = worth_going_on(self.price, chance, added, self.costs, self.rows)
        loss = self._loss(levels + 1, self._nodes + added)
        if not self.safeguard.allows(wanted, loss, levels == 0):
            return False
        self._nodes += added
        return True

    def size(
        self,
        confidences: Sequence[Sequence[float]],
        gains: Sequence[Sequence[float]],
        levels: Sequence[Sequence[int]],
    ) -> int:
        """How many candidates of every row to verify; where one has more than another, both are padded to as many."""
        rows = zip(self.controllers, confidences, gains, levels, strict=True)
        likely = [controller.likely(kept, row, own) for controller, kept, row, own in rows]
        size = worth_verifying(self.price, summed(likely), self.costs, self.rows)
        drafted = max(len(kept) for kept in confidences)
        while size > 1 and self._loss(drafted, size) > self.safeguard.credit:
            size -= 1
        return size

    def observe(
        self,
        drafted: Sequence[int],
        nodes: int,
        confidences: Sequence[Sequence[float]],
        accepted: Sequence[int],
        tokens: Sequence[int],
        seconds: float,
    ) -> None:
        """The verdict of the round.

        Args:
            drafted: levels of every row's draft, those counted of which no candidate was verified.
            nodes: drafted ones of the largest tree.
            confidences, accepted, tokens: of every row, as in `Controller.observe`.
            seconds: of the whole round.
        """
        levels = max(drafted)
        self.safeguard.observe(levels > 0, fmean(accepted), self._loss(levels, nodes) if levels else 0.0)
        expected = self.costs.round(levels, 1 + nodes, self.rows)
        for row, controller in enumerate(self.controllers):
            controller.safeguard = replace(self.safeguard)
            outcome = Outcome(confidences[row], accepted[row], tokens[row], seconds, expected, nodes, drafted[row])
            controller.update(outcome)

    def _loss(self, levels: int, nodes: float) -> float:
        """What the round costs beyond a plain one if nothing is accepted, in plain rounds."""
        return self.costs.drafted(levels, nodes, self.rows) / self.costs.plain(self.rows)


def summed(rows: Sequence[Sequence[float]]) -> list[float]:
    """Column by column, over rows of any lengths."""
    return [sum(row[column] for row in rows if column < len(row)) for column in range(max(map(len, rows)))]
