"""From controllers, one a row, to the pace of a whole batch; and what of them outlives a row.

`Pacer` belongs to a target and a drafter: measured costs and what finished rows found. `RoundPace` is one round of one
batch: it asks every row's controller, or all of them together where they weigh tokens against seconds, times the levels
as they come, and tells the controllers the verdict. Knows confidences, counts and clocks; nothing of trees, tokens or
models.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from outdraft.control.base import Controller
from outdraft.control.costs import Costs
from outdraft.control.experience import Experience
from outdraft.control.settings import ControlSettings
from outdraft.control.thompson import ThompsonController
from outdraft.control.together import Together
from outdraft.core.shape import TreeShape


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
        return self.settings.make(self.costs, limit, self.generator(seed), self.experience)

    def tuner(self, bounds: TreeShape, rows: int) -> Any:
        """What chooses whole shapes for batches of so many rows, within these bounds; None where controllers decide
        level by level."""
        return None

    @staticmethod
    def generator(seed: int | None) -> torch.Generator:
        """Of a controller's own draws."""
        generator = torch.Generator()
        if seed is None:
            generator.seed()
        else:
            generator.manual_seed(seed)
        return generator


class RoundPace:
    """How far each row of a batch drafts in one round (a `Pace`, as drafters know it).

    Args:
        controllers: of the rows.
        costs: to be told what the round cost.
        levels: that a draft can have in this round.
        nodes: of its first level.
        intake: tokens of a row, at most, that the drafter takes in before it.
        now: a clock in seconds that has waited for the device.
    """

    def __init__(
        self,
        controllers: Sequence[Controller],
        costs: Costs,
        levels: int,
        nodes: int = 1,
        intake: int = 0,
        now: Callable[[], float] = time.perf_counter,
    ):
        self.controllers, self.costs, self.levels, self.now = controllers, costs, levels, now
        for controller in controllers:
            controller.rows = len(controllers)
        self.together: Together | None = None
        if len(controllers) > 1:
            weighing = [one for one in controllers if isinstance(one, ThompsonController) and one.weighs]
            self.together = Together(weighing, costs) if len(weighing) == len(controllers) else None
        self.confidences: list[list[float]] = [[] for _ in controllers]
        self.going = [levels > 0 and not costs.plain_is_due(len(controllers))] * len(controllers)
        self._laps: list[float] = []
        # Who takes in a prompt, or a stretch of plain rounds, does work of other rounds.
        self._usual = intake <= levels + 1
        self._last = now()
        self.wants(nodes)

    def wants(self, nodes: int) -> list[bool]:
        """As `Pace.wants`; the first level was asked for when this was made."""
        self.going = [
            going and len(kept) < self.levels for going, kept in zip(self.going, self.confidences, strict=True)
        ]
        rows = zip(self.going, self.confidences, self.controllers, strict=True)
        if self.together is None:
            self.going = [going and controller.decide(kept, nodes) for going, kept, controller in rows]
        else:
            able = [going and len(kept) < controller.limit for going, kept, controller in rows]
            goes = any(able) and self.together.decide(self.confidences, able, nodes)
            self.going = [goes and may for may in able]
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
        levels = [own[: len(row)] for own, row in zip(levels, gains, strict=True)]
        if self.together is not None:
            size = self.together.size(self.confidences, gains, levels) if any(gains) else 0
            return [min(size, len(row)) for row in gains]
        rows = zip(self.controllers, self.confidences, gains, levels, strict=True)
        return [controller.size(kept, row, own) if len(row) else 0 for controller, kept, row, own in rows]

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
            self.costs.observe_draft(self._laps[0] if self._usual else None, self._laps[1:], rows)
        self.costs.observe_round(max(nodes), verify_seconds, rest_seconds, rows)
        drafted = [own[:depth] for own, depth in zip(self.confidences, depths, strict=True)]
        measured = sum(self._laps) + verify_seconds + rest_seconds
        if self.together is not None:
            made = [len(own) for own in self.confidences]
            if self.costs.given:
                measured = self.costs.round(max(made), max(nodes), rows)
            self.together.observe(made, max(nodes) - 1, drafted, accepted, emitted, measured)
            return
        for row, controller in enumerate(self.controllers):
            # Given costs know no other rows, so that a row which decides for itself is the row alone.
            levels = len(self.confidences[row])
            seconds = self.costs.round(levels, nodes[row], rows) if self.costs.given else measured
            controller.observe(drafted[row], accepted[row], emitted[row], seconds)
