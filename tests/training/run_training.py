"""Run by the tests as a program of its own, alone or under torchrun: one training, killed where it is told to.

Usage: run_training.py SETTINGS_JSON [resume]. With `"kill": "save:N"` the process kills itself (SIGKILL) when half of
checkpoint N is written, with `"kill": "step:N"` in the middle of step N.
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

from outdraft.training import trainer as trainer_module
from outdraft.training.config import DrafterConfig
from outdraft.training.train import train


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arrange_death(kind: str, step: int) -> None:
    trainer = trainer_module.ObjectiveTrainer
    if kind == "step":
        compute = trainer.compute_loss

        def dying_loss(self: Any, *args: Any, **settings: Any) -> Any:
            if self.state.global_step == step:
                kill()
            return compute(self, *args, **settings)

        trainer.compute_loss = dying_loss  # type: ignore[method-assign]
    else:
        save = trainer._save_optimizer_and_scheduler

        def dying_save(self: Any, folder: str) -> None:
            if self.state.global_step == step:
                (Path(folder) / "optimizer.pt").write_bytes(b"half")
                kill()
            save(self, folder)

        trainer._save_optimizer_and_scheduler = dying_save  # type: ignore[method-assign]


if __name__ == "__main__":
    torch.set_num_threads(1)
    settings = json.loads(sys.argv[1])
    if where := settings.pop("kill", None):
        kind, _, step = where.partition(":")
        arrange_death(kind, int(step))
    train(tiny_target(layers=settings.pop("layers", 2)), DrafterConfig(**settings), resume="resume" in sys.argv)
