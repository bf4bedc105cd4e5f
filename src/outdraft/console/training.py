"""`outdraft train` between the settings that came in and the run: target, data, held-out prompts, the run itself.

Knows neither flags nor files of settings; trains nothing itself.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from rich.console import Console

from outdraft.allocator import keep_freed_memory
from outdraft.errors import UserError
from outdraft.evaluation.held_out import HELD_OUT, beginnings, hold_out, tau_meter
from outdraft.evaluation.prompts import read_prompts
from outdraft.evaluation.training_verdict import TrainingVerdict, training_verdict
from outdraft.loading import load_target
from outdraft.target import Target
from outdraft.training.config import TrainingConfig
from outdraft.training.features import reader_of
from outdraft.training.plan import TrainPlan, plan
from outdraft.training.train import TrainResult, train

TAU_PROMPTS = 8
"""Held-out prompts that are decoded for tau; agreement is measured on all that is held out."""

AROUND = ("model", "dtype", "device", "eval_data", "hold_out")
"""Settings of a run that are not the training's own."""


def plan_training(settings: dict[str, Any]) -> TrainPlan:
    """What the run would cost.

    Raises:
        UserError: settings, target or data that cannot work.
    """
    keep_freed_memory()
    around, config = _divided(settings)
    return plan(_target(around), config)


def run_training(
    settings: dict[str, Any], resume: bool, remarks: Console
) -> tuple[TrainResult, TrainingVerdict | None]:
    """The run, with tau measured on prompts that are not trained on, and what it is worth on this machine.

    Args:
        settings: of `TrainingConfig`, and those of `AROUND`.
        resume: go on from the last checkpoint.
        remarks: where progress goes.

    Raises:
        UserError: settings, target or data that cannot work.
    """
    keep_freed_memory()
    around, config = _divided(settings)
    count = HELD_OUT if around.get("hold_out") is None else around["hold_out"]
    if not isinstance(count, int) or count < 0:
        raise UserError(f"--hold-out must be 0 or more conversations, not {count}")
    given = around.get("eval_data")
    split = None if given is not None else hold_out(config.data, count, config.on_bad_line)
    prompts = split.prompts if split is not None else read_prompts(str(given), max(count, 1))
    target = _target(around)
    beginning = beginnings(prompts, target)
    if not is_main_process():
        remarks = Console(quiet=True)
    if split is not None:
        for note in split.notes:
            remarks.print(note, markup=False)
        config = config.model_copy(update={"data": split.write(config.output_dir / "data")})
    held_out = split.held_out if split is not None else []
    reader: Any = reader_of(target)  # tau is measured where it is decoded, on the fast layers
    decoded = beginning[:TAU_PROMPTS]
    result = train(target, config, resume, tau_meter(reader, decoded), remarks, held_out)
    if not is_main_process():
        return result, None
    tau = (result.tau or {}).get("tau")
    return result, training_verdict(reader, result.folder, tau, result.best_step, len(decoded))


def is_main_process() -> bool:
    """Whether this is the one of torchrun's or accelerate's processes that reports."""
    return os.environ.get("RANK", "0") == "0"


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
    return load_target(str(around["model"]), dtype=around.get("dtype"), device=device, backend="eager")
