"""The state of draft control that outlives rows: measured costs, experience, and tuners of a target and a drafter."""

from __future__ import annotations

import torch

from outdraft.control.base import Controller
from outdraft.control.costs import Costs
from outdraft.control.evidence import Experience
from outdraft.control.settings import AUTO, WEIGHING, ControlSettings
from outdraft.control.tuner import ShapeTuner
from outdraft.core.shape import TreeShape


class Pacer:
    """Makes controllers for rows, and tuners for batches, of one target and one drafter.

    Args:
        settings: the kind of controller and its options.
        costs: given costs make draft lengths repeatable; None measures them.
    """

    def __init__(self, settings: ControlSettings, costs: Costs | None = None):
        self.settings, self.costs, self.experience = settings, costs or Costs(), Experience()
        self._tuners: dict[TreeShape, ShapeTuner] = {}

    def controller(self, limit: int, seed: int | None = None) -> Controller:
        """Make the controller of one row.

        Args:
            limit: largest number of levels of the row's drafts.
            seed: seed of the controller's own draws; None takes a fresh one from the system.
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
        """Return the tuner of these bounds if whole shapes are chosen; None if the rows' controllers decide.

        A draft step and the target's pass run over all rows of a batch at once, padded to the largest tree, so no
        single row causes a level's cost. Controllers that weigh tokens against seconds therefore give way to whole
        shapes as soon as there is a second row (measured: docs/reference/controllers.md).

        Args:
            bounds: the largest shape.
            rows: number of rows decoded together.
        """
        if self.settings.name != AUTO and (rows == 1 or self.settings.name not in WEIGHING):
            return None
        if bounds not in self._tuners:
            self._tuners[bounds] = ShapeTuner(bounds, self.costs)
        return self._tuners[bounds]
