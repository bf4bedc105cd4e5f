"""From controllers, one a row, to the pace of a whole batch; and what of them outlives a row.

`Pacer` belongs to a target and a drafter: measured costs and what finished rows found. `RoundPace` is one round of one
batch: it asks every row's controller, times the levels as they come, and tells the controllers the verdict. Knows
confidences, counts and clocks; nothing of trees, tokens or models.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from outdraft.control.base import Controller
from outdraft.control.costs import Costs
from outdraft.control.experience import Experience
from outdraft.control.settings import ControlSettings


class Pacer:
    """Makes the controllers of a target's and a drafter's rows.

    Args:
        settings: which controller.
        costs: given ones make the lengths of drafts repeatable; measured from here on when None.
    """

    def __init__(self, settings: ControlSettings, costs: Costs | None = None):
        self.settings, self.costs, self.experience = settings, costs or Costs(), Experience()

    def controller(self, limit: int, seed: int | None = None) -> Controller:
        """For one row.

        Args:
            limit: levels that its drafts may have.
            seed: of its own draws; a fresh one from the system when None.
        """
        generator = torch.Generator()
        if seed is None:
            generator.seed()
        else:
            generator.manual_seed(seed)
        return self.settings.make(self.costs, limit, generator, self.experience)


class RoundPace:
    """How far each row of a batch drafts in one round (a `Pace`, as drafters know it).

    Args:
        controllers: of the rows.
        costs: to be told what the round cost.
        levels: that a draft can have in this round.
        nodes: of its first level.
        now: a clock in seconds that has waited for the device.
    """

    def __init__(
        self,
        controllers: Sequence[Controller],
        costs: Costs,
        levels: int,
        nodes: int = 1,
        now: Callable[[], float] = time.perf_counter,
    ):
        self.controllers, self.costs, self.levels, self.now = controllers, costs, levels, now
        for controller in controllers:
            controller.rows = len(controllers)
        self.confidences: list[list[float]] = [[] for _ in controllers]
        self.going = [levels > 0] * len(controllers)
        self._laps: list[float] = []
        self._last = now()
        self.wants(nodes)

    def wants(self, nodes: int) -> list[bool]:
        """As `Pace.wants`; the first level was asked for when this was made."""
        self.going = [
            going and len(kept) < self.levels and controller.decide(kept, nodes)
            for going, kept, controller in zip(self.going, self.confidences, self.controllers, strict=True)
        ]
        return self.going

    def drafted(self, confidences: Sequence[float | None]) -> None:
        """As `Pace.drafted`; the time since the last level is this one's."""
        for row, confidence in enumerate(confidences):
            if self.going[row] and confidence is not None:
                self.confidences[row].append(confidence)
        self.going = [going and sure is not None for going, sure in zip(self.going, confidences, strict=True)]
        now = self.now()
        self._laps.append(now - self._last)
        self._last = now

    def sizes(self, gains: Sequence[Sequence[float]], levels: Sequence[Sequence[int]]) -> list[int]:
        """As `Pace.sizes`."""
        rows = zip(self.controllers, self.confidences, gains, levels, strict=True)
        return [controller.size(kept, row, own[: len(row)]) if len(row) else 0 for controller, kept, row, own in rows]

    def observe(
        self,
        depths: Sequence[int],
        accepted: Sequence[int],
        emitted: Sequence[int],
        nodes: Sequence[int],
        verify_seconds: float,
        rest_seconds: float,
    ) -> None:
        """Tell costs and controllers what became of the round.

        Args:
            depths: levels that each row's tree had in the end.
            accepted: candidates accepted in each row.
            emitted: tokens that each row gained.
            nodes: of each row's tree, the root included.
            verify_seconds: of that run.
            rest_seconds: of everything but drafting and that run.
        """
        rows = len(self.controllers)
        if self._laps:
            self.costs.observe_draft(self._laps[0], self._laps[1:], rows)
        self.costs.observe_round(max(nodes), verify_seconds, rest_seconds, rows)
        measured = sum(self._laps) + verify_seconds + rest_seconds
        for row, controller in enumerate(self.controllers):
            drafted = self.confidences[row]
            # Given costs know no other rows, so that a row in a batch is the row alone.
            seconds = self.costs.round(len(drafted), nodes[row], rows) if self.costs.given else measured
            controller.observe(drafted[: depths[row]], accepted[row], emitted[row], seconds)
