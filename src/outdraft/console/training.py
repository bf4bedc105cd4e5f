"""`outdraft train` between the settings that came in and the run: target, data, held-out prompts, the run itself.

Knows neither flags nor files of settings; trains nothing itself.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from outdraft.errors import UserError
from outdraft.evaluation.held_out import beginnings, hold_out, tau_meter
from outdraft.evaluation.prompts import read_prompts
from outdraft.loading import load_target
from outdraft.target import Target
from outdraft.training.config import TrainingConfig
from outdraft.training.plan import TrainPlan, plan
from outdraft.training.train import TrainResult, train

HELD_OUT = 8
"""Conversations to measure tau on, unless said otherwise."""

AROUND = ("model", "dtype", "device", "eval_data", "hold_out")
"""Settings of a run that are not the training's own."""


def plan_training(settings: dict[str, Any]) -> TrainPlan:
    """What the run would cost.

    Raises:
        UserError: settings, target or data that cannot work.
    """
    around, config = _divided(settings)
    return plan(_target(around), config)


def run_training(settings: dict[str, Any], resume: bool, remarks: Console) -> TrainResult:
    """The run, with tau measured on prompts that are not trained on.

    Args:
        settings: of `TrainingConfig`, and those of `AROUND`.
        resume: go on from the last checkpoint.
        remarks: where progress goes.

    Raises:
        UserError: settings, target or data that cannot work.
    """
    around, config = _divided(settings)

    def note(text: str) -> None:
        remarks.print(text, markup=False)

    if around.get("eval_data") is not None:
        prompts = read_prompts(around["eval_data"], HELD_OUT if around.get("hold_out") is None else around["hold_out"])
    else:
        count = around.get("hold_out")
        count = HELD_OUT if count is None else count
        if not isinstance(count, int) or count < 0:
            raise UserError(f"--hold-out must be 0 or more conversations, not {count}")
        data, prompts = hold_out(config.data, config.output_dir / "data", count, config.on_bad_line, note)
        config = config.model_copy(update={"data": data})
    target = _target(around)
    return train(target, config, resume, tau_meter(target, beginnings(prompts, target)), remarks)


def _divided(settings: dict[str, Any]) -> tuple[dict[str, Any], TrainingConfig]:
    """What concerns the target and the held-out prompts, and the training's own settings."""
    around = {name: settings[name] for name in AROUND if name in settings}
    config = TrainingConfig(**{name: value for name, value in settings.items() if name not in around})
    if around.get("model") is None:
        raise UserError("no target to train for; give --model a folder or hub id")
    return around, config


def _target(around: dict[str, Any]) -> Target:
    """The target on the plain backend, for gradients go through its head; one device for every process."""
    device = around.get("device")
    if device is None and torch.cuda.is_available() and "LOCAL_RANK" in os.environ:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    model = str(around["model"])
    return load_target(
        Path(model).expanduser() if Path(model).expanduser().exists() else model,
        dtype=around.get("dtype"),
        device=device,
        backend="eager",
    )
