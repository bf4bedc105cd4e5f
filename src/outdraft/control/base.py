"""The protocol that every controller keeps: how far to draft, for one row being decoded.

A controller is asked before each level and told what became of a round. It sees confidences, counts and seconds; it
knows nothing of models, trees or tokens, and every random decision comes from the generator that it was handed. A
level is decided on before anything of it is drawn, so no controller can change the law of the output.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch

from outdraft.control.costs import Costs


class Controller(ABC):
    """How far to draft, for one row.

    Args:
        costs: of drafting and verifying, shared with other rows.
        limit: levels that a draft may have at most.
        generator: on the CPU; the row's own.
    """

    def __init__(self, costs: Costs, limit: int, generator: torch.Generator):
        self.costs, self.limit, self.generator = costs, limit, generator
        self.pacer: Any = None
        """The `Pacer` that made it, which may choose whole shapes for a batch of its rows."""
        self.rows = 1
        """Rows decoded together; the caller sets it, and costs are asked for that many."""

    @property
    def weighs(self) -> bool:
        """Whether it can say what a level is worth, so that rows of a batch may decide together (`together.py`)."""
        return False

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
