"""One round of one batch under its rows' controllers: asks each of them, times the levels as they come, and tells costs
and controllers the verdict."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from outdraft.control.base import Controller
from outdraft.control.costs import Costs


class DraftBudget:
    """How far each row of a batch drafts in one round (a `Budget`, as drafters know it).

    Args:
        controllers: of the rows; each decides for its own.
        costs: to be told what the round cost.
        levels: that a draft can have in this round.
        nodes: of its first level.
        pending: tokens of a row, at most, that the drafter takes in before it.
        now: a clock in seconds that has waited for the device.
    """

    def __init__(
        self,
        controllers: Sequence[Controller],
        costs: Costs,
        levels: int,
        nodes: int = 1,
        pending: int = 0,
        now: Callable[[], float] = time.perf_counter,
    ):
        self.controllers, self.costs, self.levels, self.now = controllers, costs, levels, now
        for controller in controllers:
            controller.rows = len(controllers)
        self.confidences: list[list[float]] = [[] for _ in controllers]
        self.going = [levels > 0 and not costs.plain_is_due(len(controllers))] * len(controllers)
        self._laps: list[float] = []
        # A round in which the drafter takes in a prompt, or a stretch of plain rounds, does work of other rounds.
        self._usual = pending <= levels + 1
        self._last = now()
        self.wants(nodes)

    @property
    def asked(self) -> bool:
        """Whether the drafter told it of any level that it drafted."""
        return bool(self._laps)

    def wants(self, nodes: int) -> list[bool]:
        """As `Budget.wants`; the first level was asked for when this was made."""
        rows = zip(self.going, self.confidences, self.controllers, strict=True)
        self.going = [
            going and len(kept) < self.levels and controller.decide(kept, nodes) for going, kept, controller in rows
        ]
        return self.going

    def drafted(self, confidences: Sequence[float | None]) -> None:
        """As `Budget.drafted`; the time since the last level is this one's."""
        for row, confidence in enumerate(confidences):
            if self.going[row] and confidence is not None:
                self.confidences[row].append(confidence)
        self.going = [going and sure is not None for going, sure in zip(self.going, confidences, strict=True)]
        now = self.now()
        self._laps.append(now - self._last)
        self._last = now

    def sizes(self, gains: Sequence[Sequence[float]], levels: Sequence[Sequence[int]]) -> list[int]:
        """As `Budget.sizes`."""
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
            verify_seconds: of the target's pass over the trees.
            rest_seconds: of everything but drafting and that pass.
        """
        rows = len(self.controllers)
        if self._laps:
            self.costs.observe_draft(self._laps[0] if self._usual else None, self._laps[1:], rows)
        self.costs.observe_round(max(nodes), verify_seconds, rest_seconds, rows)
        measured = sum(self._laps) + verify_seconds + rest_seconds
        for row, controller in enumerate(self.controllers):
            kept = self.confidences[row]
            # Given costs know no other rows, so that the row decides as it would alone.
            seconds = self.costs.round(len(kept), nodes[row], rows) if self.costs.given else measured
            controller.observe(kept[: depths[row]], accepted[row], emitted[row], seconds)
