"""The demo's training: an FSPAD drafter for the reference target in a given time, with data and steps chosen to fit."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from outdraft.data.records import split_lines
from outdraft.reference import DATA
from outdraft.target.target import Target
from outdraft.training.config import DrafterConfig
from outdraft.training.plan import TrainPlan, plan
from outdraft.training.train import train

CONVERSATIONS = DATA / "train_conversations.jsonl"
"""The file of training prompts with the target's own answers."""

BATCH = 8

RECIPE: dict[str, Any] = {
    "max_length": 384,
    "batch_size": BATCH,
    "learning_rate": 3e-3,
    "lr_schedule": "cosine",
    "features": "cached",
}
"""The settings for a minute or two: high peak rate, small batches, and a single run of the target, the costly part."""

PASSES = 5
"""The number of passes over the conversations. In equal time, 420 steps over 600 reached tau 3.4, single passes over
more 2.8."""

SHARE_FOR_STEPS = 0.9
"""The share of the time spent on features and steps; the rest is for saving and for slower steps than the timed one."""

FEWEST = 10
"""The fewest steps, and the fewest conversations."""


def train_drafter(target: Target, folder: Path, seconds: float, remarks: Console) -> dict[str, Any]:
    """Train an FSPAD drafter in about `seconds`; return the run's figures.

    Args:
        target: the target on the plain backend, since gradients pass through its head.
    """
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        aside = Path(name)
        config = DrafterConfig(
            **RECIPE,
            data=CONVERSATIONS,
            output_dir=folder,
            feature_cache_dir=aside / "features",
            report_to=["none"],
            save_steps=10**6,
            max_steps=1,
        )
        trial = plan(target, config)
        count, steps = fitting(trial, SHARE_FOR_STEPS * (seconds - (time.perf_counter() - began)))
        remarks.print(f"training an FSPAD drafter: {steps} steps on {count} conversations", highlight=False)
        chosen = aside / "chosen.jsonl"
        kept = split_lines(CONVERSATIONS.read_text(encoding="utf-8"))[:count]
        chosen.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        changes = {"data": chosen, "max_steps": steps, "logging_steps": max(1, steps // 10)}
        result = train(target, config.model_copy(update=changes), console=remarks)
    return {"conversations": count, "steps": result.steps, "seconds": time.perf_counter() - began, **result.metrics}


def fitting(trial: TrainPlan, seconds: float) -> tuple[int, int]:
    """Return the conversations, and the steps over them, that take about `seconds`.

    Args:
        trial: plan of a run of one step over all conversations, with cached features.
        seconds: time for features and steps.
    """
    each = (trial.seconds - trial.step_seconds) / trial.examples
    count = int(seconds / (each + PASSES * trial.step_seconds / BATCH))
    count = max(min(FEWEST, trial.examples), min(count, trial.examples))
    return count, max(FEWEST, int((seconds - count * each) / trial.step_seconds))
