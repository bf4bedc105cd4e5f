"""The protocol of controllers, which decide how far to draft for one row, the two simplest, and what all share.

A controller sees confidences, counts and seconds, never tokens. It decides on a level before anything of that level is
drawn, so it cannot change the distribution of the output. Its own random decisions come from the generator that callers
pass. Everything learned is a short vector of sums (successes and failures, or the moments of a fit), so rows are
combined by adding sums.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from outdraft.control.costs import Costs

if TYPE_CHECKING:
    from outdraft.control.settings import Pacer


HORIZON = 8
"""Experience keeps so many times the rounds that it gives to a row, so that the last row alone does not make it."""
START = 2.0
"""First credit after loading, in plain rounds: 1.6% of an answer of 128 tokens."""
LEAST_START, MOST_START = 1.0, 4.0
"""Bounds of a row's first credit, which it has of the row before: about two and eight drafts in vain."""
FIRST_PROBE = 1.0
"""First credit, in plain rounds, for drafts that do not look worthwhile."""
MOST = 10.0
"""Largest credit: the most that a row can lose of what it earned before drafting stops."""
RATE = 0.02
"""Share of the time that unsuccessful trials may cost in the long run."""
BACKOFF = 4
"""Failed probes in a row that each double the wait for the next; further ones do not."""


MOST_REST = 8
"""Most rounds in which a controller that keeps refusing is not asked, so that it costs no time."""


class Evidence:
    """Sums of one row: a constant start, and the row's own observations, which fade.

    Args:
        prior: the sums before any observation.
        inherited: sums of finished rows, added to the prior.
    """

    def __init__(self, prior: Sequence[float], inherited: Sequence[float] | None = None):
        self.start = [a + b for a, b in zip(prior, inherited or [0.0] * len(prior), strict=True)]
        self.own = [0.0] * len(self.start)

    def fade(self, discount: float) -> None:
        """Multiply the row's own observations by `discount`; called once per round."""
        if discount < 1:
            self.own = [discount * amount for amount in self.own]

    def add(self, index: int, amount: float) -> None:
        self.own[index] += amount

    def __getitem__(self, index: int) -> float:
        return self.start[index] + self.own[index]

    def __len__(self) -> int:
        return len(self.start)


class Experience:
    """Evidence of finished rows of one model, for new rows to start from; running rows share nothing."""

    def __init__(self) -> None:
        self.rounds = 0.0
        self.credit = START
        """The credit with which the next row begins (`Safeguard`): that of the row before, within bounds."""
        self._sums: dict[str, list[float]] = {}

    def inherit(self, name: str, memory: float) -> list[float] | None:
        """Return the sums of this name, worth at most `memory` rounds; None if there are none."""
        if memory <= 0 or name not in self._sums:
            return None
        scale = min(1.0, memory / self.rounds)
        return [scale * amount for amount in self._sums[name]]

    def merge(self, learned: dict[str, Evidence], rounds: float, memory: float) -> None:
        """Add a finished row of `rounds` rounds; older rows fade so that about HORIZON * `memory` rounds are kept."""
        if memory <= 0 or rounds <= 0:
            return
        keep = min(1.0, max(0.0, HORIZON * memory - rounds) / self.rounds) if self.rounds else 1.0
        for name, evidence in learned.items():
            before = self._sums.get(name, [0.0] * len(evidence))
            self._sums[name] = [keep * old + new for old, new in zip(before, evidence.own, strict=True)]
        self.rounds = keep * self.rounds + rounds


@dataclass
class Safeguard:
    """A row's credit, counted in plain rounds, and the schedule of probes.

    A drafted round spends the cost of drafting and of the larger target pass, and earns what was accepted; every round
    earns a little. A level is not drafted if its loss, with nothing accepted, would exceed the credit. So whatever a
    controller believes, n rounds without acceptance cost at most n * (1 + RATE) plain rounds and the credit before.
    A row begins with the credit of the one before it: a drafter that earned may lose more than one that did not.

    Attributes:
        credit: plain rounds that may be lost.
        waited: credit earned since the last draft.
        failures: consecutive drafted rounds that earned neither their cost nor a token.
    """

    credit: float = START
    waited: float = FIRST_PROBE
    failures: int = 0

    def allows(self, wanted: bool, loss: float, starting: bool) -> bool:
        """Return True if a level that is wanted, or due for a probe, may be drafted.

        Args:
            wanted: True if the controller wants it.
            loss: cost of the round, this level included, beyond a plain one if nothing is accepted, in plain rounds.
            starting: True if it is the round's first level.
        """
        return (wanted or (starting and self.probe_is_due(loss))) and loss <= self.credit

    def probe_is_due(self, loss: float) -> bool:
        """Return True if the rounds since the last draft have earned a probe that costs `loss`."""
        return self.waited >= loss * 2.0 ** min(BACKOFF, max(0, self.failures - 1))

    def observe(self, drafted: bool, accepted: float, loss: float) -> None:
        """Update the credit after a round.

        Args:
            drafted: True if anything was drafted.
            accepted: candidates accepted.
            loss: loss of the whole round, as in `allows`.
        """
        self.credit += RATE
        self.waited += RATE
        if drafted:
            self.credit += accepted - loss
            self.waited = 0.0
            self.failures = 0 if accepted >= min(1.0, loss) else self.failures + 1
        self.credit = min(MOST, self.credit)


class Controller(ABC):
    """Decides how far to draft for one row.

    Args:
        costs: costs of drafting and verifying, shared with other rows.
        limit: largest number of levels of a draft.
        generator: the row's own random generator, on the CPU.
    """

    resting = 0
    """Coming rounds in which the row drafts nothing, unasked; the caller counts them by `rest`."""

    pacer: Pacer | None = None
    """The pacer that made the controller, which may have a tuner for the whole batch; None if it was made by hand."""

    def __init__(self, costs: Costs, limit: int, generator: torch.Generator):
        self.costs, self.limit, self.generator = costs, limit, generator
        self.rows = 1
        """Number of rows decoded together; the caller sets it, and costs are asked for that many."""

    @abstractmethod
    def decide(self, confidences: Sequence[float], nodes: int) -> bool:
        """Return True to draft another level; called before anything of it is drawn.

        Args:
            confidences: at index i, the drafter's confidence in level i + 1, which is drafted and kept. For a chain it
                is the probability of the chain's token. For a tree it is the probability of the level's candidates
                relative to that of the level above. With no entry, the question is whether to draft in this round at
                all.
            nodes: nodes that the level adds to the target's verification; 1 for a chain.
        """

    def size(self, confidences: Sequence[float], gains: Sequence[float], levels: Sequence[int]) -> int:
        """Return how many candidates to verify, for trees of deterministic candidates; all of them unless overridden.

        Args:
            confidences: confidences of the drafted levels, as in `decide`.
            gains: for every candidate, the drafter's own estimate that its whole path is accepted, largest first.
            levels: the level of each candidate, from 0.
        """
        return len(gains)

    @abstractmethod
    def observe(self, confidences: Sequence[float], accepted: int, tokens: int, seconds: float) -> None:
        """Learn from a finished round.

        Args:
            confidences: confidences of the drafted levels; empty if none was drafted.
            accepted: number of levels accepted.
            tokens: tokens emitted, the bonus token included.
            seconds: seconds of the whole round.
        """

    def rest(self) -> None:  # noqa: B027
        """Take note of a round of `resting`, in place of `decide` and `observe`."""

    def finish(self) -> None:  # noqa: B027
        """Pass on what was learned, if anything, after the row has ended."""


class FixedController(Controller):
    """The baseline: always drafts `limit` levels."""

    def decide(self, confidences: Sequence[float], nodes: int) -> bool:
        return len(confidences) < self.limit

    def observe(self, confidences: Sequence[float], accepted: int, tokens: int, seconds: float) -> None:
        pass


class Adaptive(Controller):
    """A controller that drafts while it wants to and can afford to, and sometimes probes while it does not want to.

    Subclasses define what they want and how they learn.

    Args:
        costs, limit, generator: as for every controller.
        discount: weight of an observation after one more round; 1 forgets nothing.
        experience: experience of finished rows, to start from and to add to.
        memory: largest number of rounds that this experience counts for; 0 uses none.
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
        self.safeguard = Safeguard(START if experience is None else experience.credit)
        self.nodes = 0.0
        """Drafted nodes in this round's target pass; the expected number while levels are decided."""
        self.levels = 0
        """Drafted levels of this round, including those of which no candidate is verified."""
        self._learned: dict[str, Evidence] = {}
        self._refused = 0  # refusals since the last draft
        self._rounds = 0.0  # drafted rounds, which fade as the evidence does
        self.practising = False
        """True in a round whose draft is one of the first, which are not cut and cost no credit."""

    @abstractmethod
    def wants(self, confidences: Sequence[float], nodes: float) -> bool:
        """Return True if another level is wanted, regardless of safeguard and probing; arguments as in `decide`."""

    def learn(self, confidences: Sequence[float], accepted: int, tokens: int, seconds: float) -> None:
        """Learn from a round as `observe`, after older evidence has faded; `nodes` and `levels` are this round's."""

    def decide(self, confidences: Sequence[float], nodes: int) -> bool:
        levels = len(confidences)
        if levels == 0:
            self.nodes, self.levels, self.practising = 0.0, 0, bool(self.costs.practice)
        if levels >= self.limit:
            return False
        added = self.expected_nodes(nodes)
        if self.practising:
            self.nodes += added
            return True
        loss = self.loss(levels + 1, self.nodes + added)
        if self.safeguard.allows(self.wants(confidences, added), loss, levels == 0):
            self.nodes += added
            self._refused = 0
            return True
        if levels == 0:
            self._refused += 1
            self.resting = min(MOST_REST, 2**self._refused - 2)
        return False

    def rest(self) -> None:
        self.resting -= 1
        self.safeguard.observe(False, 0, 0.0)

    def observe(self, confidences: Sequence[float], accepted: int, tokens: int, seconds: float) -> None:
        levels = len(confidences)
        self.levels = max(levels, self.levels)
        if levels:
            self._rounds = self.discount * self._rounds + 1
            for evidence in self._learned.values():
                evidence.fade(self.discount)
        else:
            self.nodes = 0.0
        loss = self.loss(levels, self.nodes) if levels and not self.practising else 0.0
        self.safeguard.observe(levels > 0, accepted, loss)
        self.learn(confidences, accepted, tokens, seconds)
        self.nodes, self.levels = 0.0, 0

    def expected_nodes(self, nodes: int) -> float:
        """Return how many of the nodes that a level offers will be verified."""
        return nodes

    def finish(self) -> None:
        if self.experience is not None:
            self.experience.merge(self._learned, self._rounds, self.memory)
            self.experience.credit = min(MOST_START, max(LEAST_START, self.safeguard.credit))
            self.experience = None

    def evidence(self, name: str, prior: Sequence[float]) -> Evidence:
        """Make sums that fade with the rounds, start from experience and are added to it at the end."""
        inherited = self.experience.inherit(name, self.memory) if self.experience is not None else None
        self._learned[name] = Evidence(prior, inherited)
        return self._learned[name]

    def loss(self, levels: int, nodes: float) -> float:
        """Return what a round costs beyond a plain one if nothing is accepted, in plain rounds.

        After rounds without a draft a cost of more than one plain round counts for less and less, down to one.
        Otherwise a drafter that was timed in a busy minute might never be timed again.
        """
        loss = self.costs.drafted(levels, nodes, self.rows) / self.costs.plain(self.rows)
        return max(min(loss, 1.0), loss * self.costs.certainty(self.rows))


class ConfidenceController(Adaptive):
    """Drafts while the product of confidences is at least `threshold`; learns only in its safeguard.

    Args:
        threshold: 0 always drafts on.
    """

    def __init__(self, *given: Any, threshold: float, **adaptive: Any):
        super().__init__(*given, **adaptive)
        self.threshold = threshold

    def wants(self, confidences: Sequence[float], nodes: float) -> bool:
        return math.prod(confidences) >= self.threshold
