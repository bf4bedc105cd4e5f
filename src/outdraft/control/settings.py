"""Which controller, with what options: checked once, then made for every row."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from outdraft.control.base import Controller
from outdraft.control.beta import BetaController
from outdraft.control.calibrated import CalibratedController
from outdraft.control.calibration import CALIBRATIONS
from outdraft.control.confidence import ConfidenceController
from outdraft.control.costs import Costs
from outdraft.control.experience import Experience
from outdraft.control.fixed import FixedController
from outdraft.control.ucb import UcbController
from outdraft.errors import UserError

CONTROLLERS = ("fixed", "confidence", "beta", "calibrated", "ucb")
RULES = ("worth", "bernoulli")


@dataclass
class ControlSettings:
    """How the length of a draft is decided; options of other controllers than the named one are ignored."""

    name: str = "fixed"
    """`fixed` drafts to the limit; `confidence` while the drafter is confident; `beta` and `calibrated` learn by
    Thompson sampling, the second from the drafter's confidence too; `ucb` chooses among lengths by UCB1."""
    threshold: float = 0.1
    """confidence: draft on while the product of the confidences so far is at least this; 0 always does."""
    rule: str = "worth"
    """beta, calibrated: `worth` weighs tokens against seconds, `bernoulli` drafts on with probability theta."""
    prior_accepted: float = 1.0
    """beta, calibrated: a of the Beta prior, imagined accepted levels."""
    prior_rejected: float = 1.0
    """beta, calibrated: b of the Beta prior, imagined rejected levels."""
    calibration: str = "platt"
    """calibrated: `platt` (a line in the logit) or `isotonic` (any rising curve)."""
    confidence_weight: float = 4.0
    """calibrated: k, levels that the drafter's calibrated confidence counts for beside those observed."""
    exploration: float = 0.05
    """ucb: weight of the bonus for rarely tried lengths, in multiples of plain decoding's speed."""
    discount: float = 0.98
    """Adaptive controllers: what an observation is worth after one more drafted round, in (0, 1]; 1 forgets nothing."""
    memory: float = 32.0
    """Adaptive controllers: rounds that experience of finished rows counts for at most; 0 starts every row afresh."""

    def __post_init__(self) -> None:
        for name, known in (("name", CONTROLLERS), ("rule", RULES), ("calibration", tuple(CALIBRATIONS))):
            if getattr(self, name) not in known:
                label = "controller" if name == "name" else name
                raise UserError(f"{label} must be one of {', '.join(known)}, not {getattr(self, name)!r}")
        for name in _NUMBERS:
            setattr(self, name, _finite(name, getattr(self, name)))
        bounds = [
            (0 <= self.threshold <= 1, "threshold must be in [0, 1]; 0 always drafts on"),
            (self.prior_accepted > 0, "prior_accepted must be more than 0; 1 is the uniform prior"),
            (self.prior_rejected > 0, "prior_rejected must be more than 0; 1 is the uniform prior"),
            (self.confidence_weight >= 0, "confidence_weight must be 0 (off) or more"),
            (self.exploration >= 0, "exploration must be 0 (off) or more"),
            (0 < self.discount <= 1, "discount must be in (0, 1]; 1 forgets nothing"),
            (self.memory >= 0, "memory must be 0 (every row starts afresh) or more"),
        ]
        for holds, message in bounds:
            if not holds:
                raise UserError(message)

    def make(
        self, costs: Costs, limit: int, generator: torch.Generator, experience: Experience | None = None
    ) -> Controller:
        """A controller for one row.

        Args:
            costs: of this target and drafter on this machine, shared by all rows.
            limit: levels that a draft may have at most.
            generator: on the CPU; the row's own.
            experience: of finished rows of the same model and settings.
        """
        if limit < 0:
            raise UserError(f"the limit of a draft must be 0 (draft nothing) or more levels, not {limit}")
        given = (costs, limit, generator)
        if self.name == "fixed":
            return FixedController(*given)
        adaptive = {"discount": self.discount, "experience": experience, "memory": self.memory}
        if self.name == "confidence":
            return ConfidenceController(*given, threshold=self.threshold, **adaptive)
        if self.name == "ucb":
            return UcbController(*given, exploration=self.exploration, **adaptive)
        thompson: dict[str, Any] = {"prior": (self.prior_accepted, self.prior_rejected), "rule": self.rule, **adaptive}
        if self.name == "beta":
            return BetaController(*given, **thompson)
        return CalibratedController(*given, calibration=self.calibration, weight=self.confidence_weight, **thompson)


_NUMBERS = (
    "threshold",
    "prior_accepted",
    "prior_rejected",
    "confidence_weight",
    "exploration",
    "discount",
    "memory",
)


def _finite(name: str, value: object) -> float:
    """The value as a float, or the UserError that names the setting."""
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"{name} must be a finite number, not {value!r}")
    return number
