"""The protocol of controllers, which decide how far to draft for one row, and the two that learn nothing.

A controller sees confidences, counts and seconds, never tokens. It decides on a level before anything of that level is
drawn, so it cannot change the distribution of the output. Its own random decisions come from the generator that it was
handed.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from outdraft.control.costs import Costs
from outdraft.control.evidence import Evidence, Experience, Safeguard

if TYPE_CHECKING:
    from outdraft.control.pacer import Pacer


class Controller(ABC):
    """How far to draft, for one row.

    Args:
        costs: of drafting and verifying, shared with other rows.
        limit: levels that a draft may have at most.
        generator: on the CPU; the row's own.
    """

    pacer: Pacer | None = None
    """The one that made it, which may have a tuner for the whole batch; None for a controller made by hand."""

    def __init__(self, costs: Costs, limit: int, generator: torch.Generator):
        self.costs, self.limit, self.generator = costs, limit, generator
        self.rows = 1
        """Rows decoded together; the caller sets it, and costs are asked for that many."""

    @abstractmethod
    def decide(self, confidences: Sequence[float], nodes: int) -> bool:
        """Whether to draft another level, asked before anything of it is drawn.

        Args:
            confidences: at index i, the drafter's confidence in level i + 1, which is drafted and kept. A chain: the
                probability it gave its token. A tree: the probability of the level's candidates relative to that of
                the level above. Empty: whether to draft in this round at all.
            nodes: that the target will verify beyond the present ones if the level is drafted; a chain: 1.
        """

    def size(self, confidences: Sequence[float], gains: Sequence[float], levels: Sequence[int]) -> int:
        """How many candidates to verify, for trees of deterministic candidates; all of them unless overridden.

        Args:
            confidences: of the levels that were drafted, as in `decide`.
            gains: of every candidate, the drafter's own estimate that its whole path is accepted, largest first.
            levels: at which level each of them stands, the first being 0.
        """
        return len(gains)

    @abstractmethod
    def observe(self, confidences: Sequence[float], accepted: int, tokens: int, seconds: float) -> None:
        """The verdict of a round.

        Args:
            confidences: of the levels that were drafted; empty if none was.
            accepted: how many levels were.
            tokens: emitted, the bonus token included.
            seconds: of the whole round.
        """

    def finish(self) -> None:  # noqa: B027
        """The row has ended: hand on what was learned, where something was."""


class FixedController(Controller):
    """The baseline: drafts `limit` levels, whatever comes of it."""

    def decide(self, confidences: Sequence[float], nodes: int) -> bool:
        return len(confidences) < self.limit

    def observe(self, confidences: Sequence[float], accepted: int, tokens: int, seconds: float) -> None:
        pass


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
        self.nodes = 0.0
        """Drafted nodes of this round that the target's pass is over, the expected ones while levels are decided on."""
        self.levels = 0
        """Levels of this round that were drafted, those included of which no candidate is verified."""
        self._learned: dict[str, Evidence] = {}
        self._rounds = 0.0  # drafted, fading as the evidence does

    @abstractmethod
    def wants(self, confidences: Sequence[float], nodes: float) -> bool:
        """As `decide`, safeguard and probing aside."""

    def learn(self, confidences: Sequence[float], accepted: int, tokens: int, seconds: float) -> None:
        """As `observe`, once everything seen before has faded; `nodes` and `levels` are still this round's."""

    def decide(self, confidences: Sequence[float], nodes: int) -> bool:
        levels = len(confidences)
        if levels == 0:
            self.nodes, self.levels = 0.0, 0
        if levels >= self.limit:
            return False
        added = self.expected_nodes(nodes)
        loss = self.loss(levels + 1, self.nodes + added)
        if self.safeguard.allows(self.wants(confidences, added), loss, levels == 0):
            self.nodes += added
            return True
        return False

    def observe(self, confidences: Sequence[float], accepted: int, tokens: int, seconds: float) -> None:
        levels = len(confidences)
        self.levels = max(levels, self.levels)
        if levels:
            self._rounds = self.discount * self._rounds + 1
            for evidence in self._learned.values():
                evidence.fade(self.discount)
        else:
            self.nodes = 0.0
        self.safeguard.observe(levels > 0, accepted, self.loss(levels, self.nodes) if levels else 0.0)
        self.learn(confidences, accepted, tokens, seconds)
        self.nodes, self.levels = 0.0, 0

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


class ConfidenceController(Adaptive):
    """Drafts on while the product of the confidences so far is at least `threshold`; learns only in its safeguard.

    Args:
        threshold: 0 always drafts on.
    """

    def __init__(self, *given: Any, threshold: float, **adaptive: Any):
        super().__init__(*given, **adaptive)
        self.threshold = threshold

    def wants(self, confidences: Sequence[float], nodes: float) -> bool:
        return math.prod(confidences) >= self.threshold
