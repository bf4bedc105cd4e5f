"""The baseline: drafts to its limit in every round. Learns nothing."""

from __future__ import annotations

from collections.abc import Sequence

from outdraft.control.base import Controller


class FixedController(Controller):
    """Drafts `limit` levels, whatever comes of it."""

    def decide(self, confidences: Sequence[float], nodes: int) -> bool:
        return len(confidences) < self.limit

    def observe(self, confidences: Sequence[float], accepted: int, tokens: int, seconds: float) -> None:
        pass
