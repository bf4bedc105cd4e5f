"""Run by the tests as a program of its own, alone or under torchrun: trainings one after the other, killed where told.

Usage: run_training.py SETTINGS_JSON..., one for each training. With `"kill": N` the process kills itself (SIGKILL) when
half of checkpoint N is written.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from tiny import tiny_target

from outdraft.target.ranks import end_in_group, in_group
from outdraft.training import trainer as trainer_module
from outdraft.training.config import DrafterConfig
from outdraft.training.train import train


def arrange_death(step: int) -> None:
    trainer = trainer_module.ObjectiveTrainer
    save = trainer._save_optimizer_and_scheduler

    def dying_save(self: Any, folder: str) -> None:
        if self.state.global_step == step:
            (Path(folder) / "optimizer.pt").write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        save(self, folder)

    trainer._save_optimizer_and_scheduler = dying_save  # type: ignore[method-assign]


if __name__ == "__main__":
    torch.set_num_threads(1)
    for settings in map(json.loads, sys.argv[1:]):
        if step := settings.pop("kill", None):
            arrange_death(step)
        train(tiny_target(layers=settings.pop("layers", 2)), DrafterConfig(**settings))
    if in_group():
        end_in_group(0)  # as the command does
