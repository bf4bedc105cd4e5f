"""`outdraft train` between the settings that came in and the trainer that does it all. Knows neither flags nor YAML."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from outdraft.drafter_trainer import DrafterTrainer
from outdraft.drafting.run_folder import begun_with
from outdraft.errors import UserError
from outdraft.training.config import DrafterConfig

AROUND = {"model": "model", "dtype": "dtype", "device": "device", "eval_data": "eval_dataset", "hold_out": "hold_out"}
"""Settings of a run that are not of `DrafterConfig`, and the trainer's arguments for them."""


def trainer_of(settings: dict[str, Any], resume: bool, remarks: Console) -> DrafterTrainer:
    """The trainer for the settings of a run.

    Args:
        settings: of `DrafterConfig`, and those of `AROUND`.
        resume: take from the run's folder what is not set.
        remarks: where progress goes.

    Raises:
        UserError: settings that cannot work.
    """
    if resume and "output_dir" in settings:
        begun = begun_with(settings["output_dir"])
        if begun is None and not {"model", "data"} <= settings.keys():
            raise UserError(
                f"{settings['output_dir']} keeps no settings of a run to go on with; give --model and --data"
            )
        settings = {**(begun or {}), **settings}
    around = {argument: settings[name] for name, argument in AROUND.items() if settings.get(name) is not None}
    config = DrafterConfig(**{name: value for name, value in settings.items() if name not in AROUND})
    if "model" not in around:
        raise UserError("no target to train for; give --model a folder or hub id")
    return DrafterTrainer(**around, config=config, console=remarks)
