"""Short runs of `DrafterTrainer` on a tiny model, and a callback that watches or ends them; for its tests."""

from __future__ import annotations

import io
import json
import os
import signal
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import TrainerCallback

import outdraft
from cli_fixtures import Folders

QUESTION = [{"role": "user", "content": "red blue"}]


def config(folder: Path, **values: Any) -> outdraft.DrafterConfig:
    settings = {"max_steps": 3, "batch_size": 4, "max_length": 64, "learning_rate": 1e-2, "report_to": ["none"]}
    return outdraft.DrafterConfig(output_dir=folder, **{**settings, **values})


def trainer(model: Any, folder: Path, data: Any, values: dict[str, Any] | None = None, **more: Any) -> Any:
    quiet = Console(file=io.StringIO(), width=200)
    return outdraft.DrafterTrainer(model, config(folder, **(values or {})), train_dataset=data, console=quiet, **more)


def rows_of(folders: Folders) -> list[dict[str, Any]]:
    return [json.loads(line) for line in folders.chats.read_text().splitlines()]


def record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "provenance.json").read_text())


class Seen(TrainerCallback):
    """Keeps the log, and sends itself a Ctrl-C after a step."""

    def __init__(self, stop_after: int | None = None):
        self.stop_after = stop_after
        self.entries: list[tuple[int, set[str]]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.entries.append((state.global_step, set(logs)))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.stop_after:
            os.kill(os.getpid(), signal.SIGINT)
