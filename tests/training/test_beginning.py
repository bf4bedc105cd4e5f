"""A run that begins with another drafter's weights."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from outdraft.drafters.checkpoint import load_drafter
from outdraft.errors import UserError
from outdraft.training.config import TrainingConfig
from outdraft.training.objective import new_drafter
from outdraft.training.train import train

from .tiny import tiny_target, write_chats


def config(folder: Path, name: str, **values: Any) -> TrainingConfig:
    data = folder / "chats.jsonl"
    if not data.exists():
        write_chats(data, 12)
    fixed = {"max_steps": 3, "batch_size": 4, "precision": "fp32", "report_to": ["none"], "learning_rate": 1e-2}
    return TrainingConfig(data=data, output_dir=folder / name, **{**fixed, **values})


@pytest.mark.parametrize("method", ["fspad", "eagle"])
def test_the_first_weights_are_the_other_drafters(tmp_path: Path, method: str) -> None:
    target, console = tiny_target(), Console(file=io.StringIO())
    first = train(target, config(tmp_path, "first", method=method), console=console)
    on = config(tmp_path, "second", method=method, seed=5, init_from=str(first.folder))
    begun, other = new_drafter(target, on), new_drafter(target, config(tmp_path, "third", method=method, seed=5))
    before = load_file(first.folder / "model.safetensors")
    assert all(torch.equal(weight, before[name]) for name, weight in begun.state_dict().items())
    assert not all(torch.equal(weight, before[name]) for name, weight in other.state_dict().items())
    second = train(target, on, console=console)
    after = load_drafter(second.folder)
    assert after.training["config"]["init_from"] == str(first.folder)
    assert any(not torch.equal(weight, before[name]) for name, weight in after.head.state_dict().items())


def test_a_drafter_of_another_shape_is_refused(tmp_path: Path) -> None:
    target = tiny_target()
    first = train(target, config(tmp_path, "first"), console=Console(file=io.StringIO()))
    for values, field in (
        ({"intermediate_size": 12}, "intermediate_size"),
        ({"method": "eagle"}, "feature_sampling"),
        ({"state_norm": True}, "state_norm"),
    ):
        with pytest.raises(UserError, match=field):
            new_drafter(target, config(tmp_path, "second", init_from=str(first.folder), **values))


def test_what_is_no_drafter_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere"):
        new_drafter(tiny_target(), config(tmp_path, "second", init_from=str(tmp_path / "nowhere")))
    with pytest.raises(UserError, match="init_from"):
        config(tmp_path, "second", method="medusa", init_from="reference")
