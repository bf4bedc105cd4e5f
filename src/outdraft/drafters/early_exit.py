"""Decoding with EESD (arXiv 2406.03853): the target's own first layers and a trained exit layer draft.

A candidate runs through the first layers once, in the target's own cache; verification takes that over (`CutRun`). The
exit layer keeps a cache of its own, one entry for every decided token. It does not know how candidates are chosen
(`growth.py`) nor how the target is cut (`layers.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from outdraft.backends import count_parameters
from outdraft.cache import SlotCache
from outdraft.drafters.base import Drafter, DraftState, RowContext, TreeShape, Update
from outdraft.drafters.exit_layer import ExitLayer
from outdraft.drafters.growth import RunAhead, grow
from outdraft.drafters.intake import take_in
from outdraft.layers import Cut
from outdraft.run import CutRun, TargetRun
from outdraft.target import Target
from outdraft.tree import Tree


class EarlyExit(Drafter):
    """A trained `ExitLayer` on its target's first layers.

    Args:
        exit_layer: the network, on the target's device and in its precision.
        target: the model it was trained for.

    Raises:
        UserError: the target has no such layer.
    """

    method = "eesd"

    def __init__(self, exit_layer: ExitLayer, target: Target):
        self.exit_layer, self.target = exit_layer, target
        self.cut = Cut(target.model, exit_layer.config.exit_layer)
        self.exit = exit_layer.bind(target)

    def start(self, target: Target, cache: SlotCache) -> CutRun:
        return CutRun(target, self.cut, cache)

    def begin(self, prompts: Sequence[Tensor], run: TargetRun) -> EarlyExitState:
        assert isinstance(run, CutRun)  # `start` made it
        return EarlyExitState(self, run)

    def slots(self, shape: TreeShape) -> int:
        """The root, what may be expanded of every level, and at most the whole tree for what was not."""
        return 1 + shape.depth * shape.top_k + shape.size

    @property
    def num_parameters(self) -> int:
        return count_parameters(self.exit_layer)


class EarlyExitState(DraftState):
    """The exit layer's cache, which holds every decided token up to the root of the last tree."""

    def __init__(self, drafter: EarlyExit, run: CutRun):
        self.drafter, self.run = drafter, run
        self.cache = SlotCache(run.cache.rows, 1, run.cache.capacity)
        self.last_position = drafter.target.context_length - 1
        self.taken = 0  # of the next update, taps that the exit layer has read already: its last root's

    def propose(self, update: Update, shape: TreeShape, rows: RowContext) -> Tree:
        roots = update.roots
        lower, upper = RunAhead(self.run.cache, self.last_position), RunAhead(self.cache, self.last_position)
        none = torch.zeros_like(roots)[:, None]
        hidden = self.run.ahead(roots[:, None], none, *lower.place(roots[:, None], none))
        newest = self._take_in(update, hidden)

        def step(tokens: Tensor, parents: Tensor) -> Tensor:
            level = self.run.ahead(tokens, parents, *lower.place(tokens, parents))
            return self.drafter.exit.head(self._features(level, *upper.place(tokens, parents)))

        tree = grow(roots, self.drafter.exit.head(newest), step, shape, rows)
        self.cache.rollback()
        return tree

    def select_rows(self, rows: Sequence[int]) -> None:
        self.cache.select_rows(rows)

    def _take_in(self, update: Update, hidden: Tensor) -> Tensor:
        """Run the exit layer over what was decided, whose taps are known, and the root; `(rows, hidden)` after that."""
        taps = torch.cat([update.taps[:, self.taken :], torch.zeros_like(hidden)], dim=1)
        counts = [count - self.taken for count in update.counts]
        taps[range(len(counts)), counts] = hidden[:, 0]
        self.taken = 1

        def forward(piece: slice, positions: Tensor, seen: Tensor, slots: Tensor) -> tuple[Tensor]:
            return (self._features(taps[:, piece], positions, seen, slots),)

        (newest,) = take_in(self.cache, [count + 1 for count in counts], self.last_position, taps.device, forward)
        return newest

    def _features(self, hidden: Tensor, positions: Tensor, seen: Tensor, slots: Tensor) -> Tensor:
        inputs = self.drafter.target.inputs(positions, seen, slots, self.cache)
        return self.drafter.exit.features(hidden, **inputs)
