"""A lane: rows that share their rounds, and how they draft."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from outdraft.control.settings import Pacer
from outdraft.core.shape import TreeShape
from outdraft.drafting.base import Drafter
from outdraft.drafting.ngrams import NgramSettings
from outdraft.engine.continuous import Decoder
from outdraft.target.target import Target


@dataclass(frozen=True)
class Drafting:
    """How to draft: with what, and how far.

    Attributes:
        drafter: None decodes plainly.
        greedy: the tree while every running row is greedy, for `rows` of them.
        sampling: the tree as soon as one row draws, where rows throw dice for what is drafted; None where they share
            noise with the target (`coupling.py`), so that no text depends on what is drafted.
        pacer: makes a controller for every row; None drafts as far as the trees go.
        ngrams: when what a row's text repeats is drafted in the drafter's place; None never.
    """

    drafter: Drafter | None
    greedy: Callable[[int], TreeShape]
    sampling: TreeShape | None
    pacer: Pacer | None = None
    ngrams: NgramSettings | None = None

    @classmethod
    def none(cls) -> Drafting:
        return cls(None, lambda rows: TreeShape(0, 1, 1), None)

    @property
    def largest(self) -> TreeShape:
        """The tree that takes more slots of the cache."""
        return max(self.greedy(1), self.sampling or self.greedy(1), key=self._slots)

    @property
    def slots(self) -> int:
        """Slots of the cache that a round takes at most, beside what was decided."""
        return self._slots(self.largest) + (0 if self.ngrams is None else self.ngrams.most)

    def _slots(self, shape: TreeShape) -> int:
        return shape.size if self.drafter is None else self.drafter.slots(shape)

    @property
    def levels(self) -> int:
        """That a draft can have."""
        return max(self.greedy(1).depth, (self.sampling or self.greedy(1)).depth) + 1


class Lane:
    """Rows that share their rounds."""

    def __init__(self, target: Target, drafting: Drafting):
        self.target, self.drafting = target, drafting
        self.reset()

    def reset(self) -> None:
        costs = self.drafting.pacer.costs if self.drafting.pacer is not None else None
        self.decoder = Decoder(self.target, self.drafting.drafter, self.drafting.largest, costs)
