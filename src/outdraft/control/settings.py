"""The kind of controller and its options, checked once, and the pacer that makes controllers for rows and tuners for
batches from them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

import torch

from outdraft.control.base import Adaptive, ConfidenceController, Controller, Experience, FixedController
from outdraft.control.costs import Costs
from outdraft.control.thompson import BetaController, CalibratedController
from outdraft.control.tuner import ShapeTuner
from outdraft.core.shape import TreeShape
from outdraft.errors import UserError, meant

AUTO = "auto"
"""The kind that autotunes: the tuner chooses every round's whole shape, whatever the number of rows."""
LEARNED = ("prior_accepted", "prior_rejected", "discount", "memory")
KINDS: dict[str, tuple[type[Controller], tuple[str, ...]]] = {
    "fixed": (FixedController, ()),
    "confidence": (ConfidenceController, ("threshold",)),
    "beta": (BetaController, LEARNED),
    "calibrated": (CalibratedController, ("confidence_weight", *LEARNED)),
    AUTO: (FixedController, ()),
}
"""Name -> the class of a row's controller, and the settings that it reads."""
CONTROLLERS = tuple(name for name in KINDS if name != AUTO)
WEIGHING = ("beta", "calibrated")
"""Names of controllers that weigh tokens against seconds."""


PRACTICE = 4
"""Drafts after loading that run to their limit: a first answer is short, and guesses of what a draft costs are poor."""


@dataclass
class ControlSettings:
    """The kind of controller and its options; options of other controllers than the named one are ignored."""

    name: str = "fixed"
    """`fixed` drafts to the limit; `confidence` while the drafter is confident; `beta` and `calibrated` learn by
    Thompson sampling, the second from the drafter's confidence too, and choose whole shapes in a batch; `auto` always
    does. Options follow after commas: `calibrated,discount=0.95`."""
    threshold: float = 0.1
    """confidence: draft on while the product of the confidences so far is at least this; 0 always does."""
    prior_accepted: float = 1.0
    """beta, calibrated: a of the Beta prior, imagined accepted levels."""
    prior_rejected: float = 1.0
    """beta, calibrated: b of the Beta prior, imagined rejected levels."""
    confidence_weight: float = 4.0
    """calibrated: k, how many observed levels the drafter's calibrated confidence counts for."""
    discount: float = 0.98
    """beta, calibrated: weight of an observation after one more drafted round, in (0, 1]; 1 forgets nothing."""
    memory: float = 8.0
    """beta, calibrated: most rounds that experience of finished rows counts for; 0 starts every row afresh."""

    def __post_init__(self) -> None:
        if self.name not in KINDS:
            raise UserError(f"controller must be one of {', '.join(KINDS)}, not {self.name!r}")
        for option in fields(self)[1:]:
            setattr(self, option.name, _finite(option.name, getattr(self, option.name)))
        bounds = [
            (0 <= self.threshold <= 1, "threshold must be in [0, 1]; 0 always drafts on"),
            (self.prior_accepted > 0, "prior_accepted must be more than 0; 1 is the uniform prior"),
            (self.prior_rejected > 0, "prior_rejected must be more than 0; 1 is the uniform prior"),
            (self.confidence_weight >= 0, "confidence_weight must be 0 (off) or more"),
            (0 < self.discount <= 1, "discount must be in (0, 1]; 1 forgets nothing"),
            (self.memory >= 0, "memory must be 0 (every row starts afresh) or more"),
        ]
        for holds, message in bounds:
            if not holds:
                raise UserError(message)

    @classmethod
    def parse(cls, text: str) -> ControlSettings:
        """Parse `NAME` or `NAME,option=value,...`, as `--controller` takes them.

        Raises:
            UserError: no such controller, an option that it does not read, or an impossible value.
        """
        name, *rest = (part.strip() for part in text.split(","))
        given: dict[str, Any] = {}
        for part in rest:
            option, equals, value = (piece.strip() for piece in part.partition("="))
            if not equals:
                raise UserError(f"options of a controller are option=value with commas between them, not '{part}'")
            known = KINDS[cls(name).name][1]
            if option not in known:
                there_are = f"; it reads {', '.join(known)}" if known else "; it reads none"
                raise UserError(f"controller {name} has no option '{option}'{meant(option, known) or there_are}")
            given[option] = value
        return cls(name, **given)

    def make(
        self,
        costs: Costs,
        limit: int,
        generator: torch.Generator,
        experience: Experience | None = None,
        kind: type[Controller] | None = None,
    ) -> Controller:
        """Make a controller for one row.

        Args:
            costs: costs of this target and drafter on this machine, shared by all rows.
            limit: largest number of levels of a draft.
            generator: the row's own random generator, on the CPU.
            experience: experience of finished rows of the same model and settings.
            kind: a class of your own that takes the named controller's options.
        """
        if limit < 0:
            raise UserError(f"the limit of a draft must be 0 (draft nothing) or more levels, not {limit}")
        default, options = KINDS[self.name]
        kind = kind or default
        given: dict[str, Any] = {name: getattr(self, name) for name in options}
        if issubclass(kind, Adaptive):
            given["experience"] = experience
        return kind(costs, limit, generator, **given)


def _finite(name: str, value: object) -> float:
    """Return the value as a float, or raise the UserError that names the setting."""
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"{name} must be a finite number, not {value!r}")
    return number


class Pacer:
    """Makes controllers for rows, and tuners for batches, of one target and one drafter.

    Args:
        settings: the kind of controller and its options.
        costs: given costs make draft lengths repeatable; None measures them.
    """

    def __init__(self, settings: ControlSettings, costs: Costs | None = None):
        self.settings, self.costs, self.experience = settings, costs or Costs(PRACTICE), Experience()
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
