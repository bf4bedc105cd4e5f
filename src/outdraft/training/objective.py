"""From a training configuration to the network and the objective of its method, as the registry has them."""

from __future__ import annotations

from outdraft.losses.objective import Objective
from outdraft.losses.target_like import TargetLike
from outdraft.methods.checkpoint import Network
from outdraft.methods.registry import method_called
from outdraft.training.config import DrafterConfig


def new_drafter(target: TargetLike, config: DrafterConfig) -> Network:
    """A drafter with its first float32 weights, on the target's device: of the seed, another drafter or the target.

    Args:
        target: what the drafter is for.
        config: the settings, with the preset filled in and the exit layer a number.

    Raises:
        UserError: the target cannot have such a drafter.
    """
    return method_called(config.method).new_network(target, config)


def objective_for(target: TargetLike, config: DrafterConfig, drafter: Network | None = None) -> Objective:
    """The objective of the configuration's method; arguments as in `new_drafter`, `drafter` being what to train."""
    return method_called(config.method).objective(target, config, drafter or new_drafter(target, config))
