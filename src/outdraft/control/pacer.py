"""What belongs to a target and a drafter and outlives their rows: measured costs, experience, and the tuners."""

from __future__ import annotations

import torch

from outdraft.control.base import Controller
from outdraft.control.costs import Costs
from outdraft.control.evidence import Experience
from outdraft.control.settings import AUTO, WEIGHING, ControlSettings
from outdraft.control.tuner import ShapeTuner
from outdraft.core.shape import TreeShape


class Pacer:
    """Makes the controllers of a target's and a drafter's rows, and the tuners of their batches.

    Args:
        settings: which controller.
        costs: given ones make the lengths of drafts repeatable; measured from here on when None.
    """

    def __init__(self, settings: ControlSettings, costs: Costs | None = None):
        self.settings, self.costs, self.experience = settings, costs or Costs(), Experience()
        self._tuners: dict[TreeShape, ShapeTuner] = {}

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
        controller = self.settings.make(self.costs, limit, generator, self.experience)
        controller.pacer = self
        return controller

    def tuner(self, bounds: TreeShape, rows: int) -> ShapeTuner | None:
        """The tuner of these bounds, where a round's whole shape is chosen; None where the rows' controllers decide.

        A draft step and the target's pass run over all rows of a batch at once, padded to the largest tree, so what a
        level costs is no single row's. Controllers that weigh tokens against seconds therefore give way to whole shapes
        as soon as there is a second row (measured: docs/reference/controllers.md).

        Args:
            bounds: the largest shape.
            rows: decoded together.
        """
        if self.settings.name != AUTO and (rows == 1 or self.settings.name not in WEIGHING):
            return None
        if bounds not in self._tuners:
            self._tuners[bounds] = ShapeTuner(bounds, self.costs)
        return self._tuners[bounds]
