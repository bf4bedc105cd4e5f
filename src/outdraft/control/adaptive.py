"""What all adaptive controllers share: the safeguard that bounds what drafting in vain may cost, and the probing.

A row has a credit, counted in plain rounds. A drafted round spends what drafting and the larger target pass cost and
earns what was accepted; every round earns a little. A level that the credit would not survive, should nothing be
accepted, is not drafted. So whatever a controller believes, n tokens take at most n * (1 + RATE) + START plain rounds.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch

from outdraft.control.base import Controller
from outdraft.control.costs import Costs
from outdraft.control.experience import Evidence, Experience

START = 2.0
"""Credit at first, in plain rounds: 1.6% of an answer of 128 tokens."""
MOST = 10.0
"""Credit at most: what a row that has earned more may lose of it before it must stop."""
RATE = 0.02
"""Share of the time that drafting in vain may cost in the long run."""
BACKOFF = 4
"""Failed probes in a row that each double the wait for the next; more do not."""


class Adaptive(Controller):
    """A controller that drafts while it wants to and can afford to, and probes now and then while it does not want to.

    Subclasses say what they want and how they learn.

    Args:
        costs, limit, generator: as for every controller.
        discount: what an observation is worth after a further round; 1 forgets nothing.
        experience: of finished rows, to start from and to add to.
        memory: rounds that such experience counts for at most; 0 uses none.
    """

    def __init__(
        self,
        costs: Costs,
        limit: int,
        generator: torch.Generator,
        discount: float = 1.0,
        experience: Experience | None = None,
        memory: float = 0.0,
    ):
        super().__init__(costs, limit, generator)
        self.discount, self.experience, self.memory = discount, experience, memory
        self.credit = START
        self._learned: dict[str, Evidence] = {}
        self._rounds = 0.0  # drafted, fading as the evidence does
        self._nodes = 0  # of this round's draft
        self._waited = 0.0  # earned since the last draft
        self._failures = 0  # rounds in a row that accepted nothing

    @abstractmethod
    def wants(self, confidences: Sequence[float], nodes: int) -> bool:
        """As `decide`, credit and probing aside."""

    @abstractmethod
    def learn(self, confidences: Sequence[float], accepted: int, tokens: int, seconds: float) -> None:
        """As `observe`; called for every round."""

    def decide(self, confidences: Sequence[float], nodes: int) -> bool:
        levels = len(confidences)
        if levels == 0:
            self._nodes = 0
        if levels >= self.limit:
            return False
        loss = self._loss(levels + 1, self._nodes + nodes)
        drafts = self.wants(confidences, nodes) or (levels == 0 and self._probe_is_due(loss))
        if drafts and loss <= self.credit:
            self._nodes += nodes
            return True
        return False

    def observe(self, confidences: Sequence[float], accepted: int, tokens: int, seconds: float) -> None:
        levels = len(confidences)
        self.credit += RATE
        self._waited += RATE
        if levels:
            self.credit += accepted - self._loss(levels, self._nodes)
            self._waited = 0.0
            self._failures = 0 if accepted else self._failures + 1
            self._rounds = self.discount * self._rounds + 1
            for evidence in self._learned.values():
                evidence.fade(self.discount)
        self.credit = min(MOST, self.credit)
        self.learn(confidences, accepted, tokens, seconds)
        self._nodes = 0

    def finish(self) -> None:
        if self.experience is not None:
            self.experience.merge(self._learned, self._rounds, self.memory)
            self.experience = None

    def evidence(self, name: str, prior: Sequence[float]) -> Evidence:
        """Sums that fade with the rounds, start from experience and end there."""
        inherited = self.experience.inherit(name, self.memory) if self.experience is not None else None
        self._learned[name] = Evidence(prior, inherited)
        return self._learned[name]

    def _probe_is_due(self, loss: float) -> bool:
        """Whether the rounds since the last draft have earned a try that costs `loss`."""
        return self._waited >= loss * 2 ** min(BACKOFF, max(0, self._failures - 1))

    def _loss(self, levels: int, nodes: int) -> float:
        """What a round costs beyond a plain one if nothing is accepted, in plain rounds."""
        costs, rows = self.costs, self.rows
        seconds = costs.begin(rows) + (levels - 1) * costs.step(rows) + costs.added(nodes, rows)
        return seconds / costs.plain(rows)
