"""Drafts on while the drafter believes in its draft; learns nothing beyond the safeguard."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from outdraft.control.adaptive import Adaptive, Outcome


class ConfidenceController(Adaptive):
    """Drafts on while the product of the confidences so far is at least `threshold`.

    Args:
        threshold: 0 always drafts on.
    """

    def __init__(self, *given: Any, threshold: float, **adaptive: Any):
        super().__init__(*given, **adaptive)
        self.threshold = threshold

    def wants(self, confidences: Sequence[float], nodes: float) -> bool:
        return math.prod(confidences) >= self.threshold

    def learn(self, outcome: Outcome) -> None:
        pass
