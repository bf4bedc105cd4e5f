"""The plan of a run names its size and writes nothing."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from rich.console import Console

from outdraft.target import Target
from outdraft.training.config import TrainingConfig
from outdraft.training.objective import new_drafter
from outdraft.training.plan import duration, plan


def test_the_plan_counts_and_writes_nothing(target: Target, chats: Path, tmp_path: Path) -> None:
    config = TrainingConfig(data=chats, output_dir=tmp_path / "run", epochs=3, batch_size=4, precision="fp32")
    found = plan(target, config)
    assert not (tmp_path / "run").exists()
    assert (found.preset, found.steps, found.examples) == ("tiny", 21, 26)
    drafter = new_drafter(target, config)
    assert found.drafter_parameters == sum(weight.numel() for weight in drafter.parameters())
    assert found.feature_cache_bytes == found.tokens * 16 * 4
    assert 0 < found.step_seconds < 10 and found.seconds >= found.steps * found.step_seconds
    assert found.memory_bytes > 4 * found.target_parameters + 16 * found.drafter_parameters
    said = io.StringIO()
    found.show(Console(file=said, width=150))
    assert f"{found.drafter_parameters:,} parameters" in said.getvalue() and "21 (3.2 passes" in said.getvalue()


def test_durations_read_well() -> None:
    assert [duration(s) for s in (5, 75, 7300)] == ["5 s", "1 min 15 s", "2 h 1 min"]


def test_the_first_weights_come_from_the_seed_alone(target: Target, chats: Path, tmp_path: Path) -> None:
    config = TrainingConfig(data=chats, output_dir=tmp_path, seed=3)
    before = torch.random.get_rng_state()
    one = new_drafter(target, config)
    assert torch.equal(before, torch.random.get_rng_state())
    torch.rand(5)
    two, other = new_drafter(target, config), new_drafter(target, config.model_copy(update={"seed": 4}))
    assert torch.equal(one.gate_proj.weight, two.gate_proj.weight)
    assert not torch.equal(one.gate_proj.weight, other.gate_proj.weight)
