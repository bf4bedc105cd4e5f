"""What all adaptive controllers share: they draft while they want to and the safeguard lets them, and learn in sums."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from outdraft.control.base import Controller
from outdraft.control.costs import Costs
from outdraft.control.experience import Evidence, Experience
from outdraft.control.safeguard import Safeguard


@dataclass(frozen=True)
class Outcome:
    """What became of a round, for one row.

    Attributes:
        confidences, accepted, tokens, seconds: as in `Controller.observe`.
        expected: seconds that the round should have taken.
        nodes: drafted ones that the target's pass was over.
        drafted: levels that were drafted, those counted of which no candidate was verified.
    """

    confidences: Sequence[float]
    accepted: int
    tokens: int
    seconds: float
    expected: float
    nodes: float
    drafted: int


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
        self.safeguard = Safeguard()
        self._learned: dict[str, Evidence] = {}
        self._rounds = 0.0  # drafted, fading as the evidence does
        self._nodes = 0.0  # of this round's draft
        self._levels = 0  # likewise, before candidates were cut

    @abstractmethod
    def wants(self, confidences: Sequence[float], nodes: float) -> bool:
        """As `decide`, safeguard and probing aside."""

    @abstractmethod
    def learn(self, outcome: Outcome) -> None:
        """What a round taught, drafted or not; everything seen before has faded already."""

    def decide(self, confidences: Sequence[float], nodes: int) -> bool:
        levels = len(confidences)
        if levels == 0:
            self._nodes, self._levels = 0.0, 0
        if levels >= self.limit:
            return False
        added = self.expected_nodes(nodes)
        loss = self.loss(levels + 1, self._nodes + added)
        if self.safeguard.allows(self.wants(confidences, added), loss, levels == 0):
            self._nodes += added
            return True
        return False

    def observe(self, confidences: Sequence[float], accepted: int, tokens: int, seconds: float) -> None:
        levels, nodes = len(confidences), self._nodes if confidences else 0.0
        self.safeguard.observe(levels > 0, accepted, self.loss(levels, nodes) if levels else 0.0)
        expected = self.costs.round(levels, 1 + nodes, self.rows)
        self.update(Outcome(confidences, accepted, tokens, seconds, expected, nodes, max(levels, self._levels)))
        self._nodes, self._levels = 0.0, 0

    def update(self, outcome: Outcome) -> None:
        """Take in what a round taught; the safeguard is its caller's business."""
        if outcome.confidences:
            self._rounds = self.discount * self._rounds + 1
            for evidence in self._learned.values():
                evidence.fade(self.discount)
        self.learn(outcome)

    def expected_nodes(self, nodes: int) -> float:
        """How many of the nodes that a level offers will be verified."""
        return nodes

    def finish(self) -> None:
        if self.experience is not None:
            self.experience.merge(self._learned, self._rounds, self.memory)
            self.experience = None

    def evidence(self, name: str, prior: Sequence[float]) -> Evidence:
        """Sums that fade with the rounds, start from experience and end there."""
        inherited = self.experience.inherit(name, self.memory) if self.experience is not None else None
        self._learned[name] = Evidence(prior, inherited)
        return self._learned[name]

    def loss(self, levels: int, nodes: float) -> float:
        """What a round costs beyond a plain one if nothing is accepted, in plain rounds."""
        return self.costs.drafted(levels, nodes, self.rows) / self.costs.plain(self.rows)
