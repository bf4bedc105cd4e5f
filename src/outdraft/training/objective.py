"""The network and the objective of a training configuration, from the registry of methods."""

from __future__ import annotations

from outdraft.losses.objective import Objective
from outdraft.losses.target_like import TargetLike
from outdraft.methods.checkpoint import Network
from outdraft.methods.registry import method_called
from outdraft.training.config import DrafterConfig


def new_drafter(target: TargetLike, config: DrafterConfig) -> Network:
    """Build a drafter with initial float32 weights (of the seed, another drafter or the target) on the target's device.

    Args:
        target: the model that the drafter is for.
        config: the settings, with the preset filled in and the exit layer a number.

    Raises:
        UserError: the target cannot have such a drafter.
    """
    return method_called(config.method).new_network(target, config)


def objective_for(target: TargetLike, config: DrafterConfig, drafter: Network | None = None) -> Objective:
    """Return the objective of the configuration's method; arguments as in `new_drafter`, `drafter` is to be trained."""
    return method_called(config.method).objective(target, config, drafter or new_drafter(target, config))
