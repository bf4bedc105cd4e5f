"""Rows decoded group by group, in turns: the simplest decoder that the engine can work with.

Rows that were added together share their forwards; groups do not. Knows nothing of requests.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

from outdraft.control.costs import Costs
from outdraft.decoding import Row, decode
from outdraft.drafters.base import Drafter, TreeShape
from outdraft.target import Target


class Turns:
    """Groups of rows, each decoded by itself."""

    def __init__(self, target: Target, drafter: Drafter | None, shape: TreeShape, costs: Costs | None = None):
        self.target, self.drafter, self.shape, self.costs = target, drafter, shape, costs
        self._new: deque[list[Row]] = deque()
        self._running: deque[tuple[list[Row], Iterator[list[Row]]]] = deque()

    def add(self, rows: Sequence[Row]) -> None:
        self._new.append(list(rows))

    def prefill(self, tokens: int) -> list[Row]:
        while self._new:
            rows = [row for row in self._new.popleft() if row.finish_reason is None]
            if rows:
                going = decode(self.target, self.drafter, rows, self.shape, self.costs)
                gained = next(going)
                self._running.append((rows, going))
                return gained
        return []

    def round(self) -> list[Row]:
        if not self._running:
            return []
        rows, going = self._running.popleft()
        gained = next(going, None)
        if gained is None:
            return []
        if any(row.finish_reason is None for row in rows):
            self._running.append((rows, going))
        return gained

    def remove(self, row: Row, reason: str) -> None:
        row.finish_reason = reason
