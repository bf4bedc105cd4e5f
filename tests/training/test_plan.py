"""The plan of a run names its size and writes nothing."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from outdraft.target.target import Target
from outdraft.training import plan as plan_module
from outdraft.training.config import DrafterConfig
from outdraft.training.feature_store import feature_store
from outdraft.training.plan import plan
from outdraft.training.preparation import new_drafter, objective_for, prepare
from outdraft.training.progress import duration


def test_the_plan_counts_and_writes_nothing(target: Target, chats: Path, tmp_path: Path) -> None:
    config = DrafterConfig(data=chats, output_dir=tmp_path / "run", epochs=3, batch_size=4, precision="fp32")
    found = plan(target, config)
    assert not (tmp_path / "run").exists()
    assert (found.preset, found.steps, found.examples) == ("tiny", 21, 26)
    drafter = new_drafter(target, config)
    assert found.drafter_parameters == sum(weight.numel() for weight in drafter.parameters())
    # Features, and of every response token 64 candidates as int32 with a float16 each.
    assert found.feature_cache_bytes == found.tokens * 16 * 4 + found.response_tokens * 64 * (4 + 2)
    assert 0 < found.step_seconds < 10 and found.seconds >= found.steps * found.step_seconds
    assert found.memory_bytes > 4 * found.target_parameters + 16 * found.drafter_parameters
    said = io.StringIO()
    found.show(Console(file=said, width=150))
    assert f"{found.drafter_parameters:,} parameters" in said.getvalue() and "21 (3.2 passes" in said.getvalue()


def test_the_plan_counts_answers_that_were_cut_off_and_says_what_it_means(
    target: Target, chats: Path, tmp_path: Path
) -> None:
    lines = [json.loads(line) for line in chats.read_text().split("\n") if line]
    marked = [{**line, "finish_reason": "length" if place < 3 else "stop"} for place, line in enumerate(lines)]
    (tmp_path / "cut.jsonl").write_text("".join(json.dumps(line) + "\n" for line in marked))
    found = plan(target, DrafterConfig(data=tmp_path / "cut.jsonl", output_dir=tmp_path / "run", max_steps=1))
    assert found.cut_answers == 3
    assert any(note.startswith("3 answers were cut off") for note in found.notes)


def test_the_plan_counts_answers_of_weight_0(target: Target, chats: Path, tmp_path: Path) -> None:
    lines = [json.loads(line) for line in chats.read_text().split("\n") if line]
    for line in lines[:2]:
        for turn in line["messages"]:
            turn["weight"] = 0
    (tmp_path / "weighted.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found, whole = (
        plan(target, DrafterConfig(data=data, output_dir=tmp_path / "run", max_steps=1))
        for data in (tmp_path / "weighted.jsonl", chats)
    )
    assert found.untrained_answers >= 2 and found.response_tokens < whole.response_tokens
    assert f"{found.untrained_answers} answers have weight 0 in the data and are not learned" in found.notes


def test_the_plan_tells_what_is_kept_and_what_runs_in_every_step(
    target: Target, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a second for every example's forward, a tenth for a step and nothing for its update."""
    monkeypatch.setattr(
        plan_module, "_seconds", lambda work, _: (work(), {"forward": 4.0, "piece": 0.1}.get(work.__name__, 0.0))[1]
    )
    common = {"data": chats, "output_dir": tmp_path / "run", "max_steps": 20, "batch_size": 4, "precision": "fp32"}
    cached, online = (plan(target, DrafterConfig(**common, features=kind)) for kind in ("cached", "online"))
    assert (online.step_seconds, cached.step_seconds) == (pytest.approx(4.1), pytest.approx(0.1))
    assert online.seconds == pytest.approx(20 * 4.1) and cached.seconds == pytest.approx(20 * 0.1 + 26 * 1.0)
    assert cached.feature_cache_bytes > 0 == online.feature_cache_bytes
    said = io.StringIO()
    online.show(Console(file=said, width=150))
    assert "features" in said.getvalue() and "online" in said.getvalue()
    auto = [plan(target, DrafterConfig(**{**common, "max_steps": steps})).feature_cache_bytes for steps in (6, 7)]
    assert auto == [0, cached.feature_cache_bytes]
    bare = plan(target, DrafterConfig(**common, features="cached", teacher_top_k=0))
    assert bare.feature_cache_bytes == bare.tokens * 16 * 4


def test_a_plan_counts_no_time_for_what_is_kept_already(
    target: Target, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_module, "_seconds", lambda work, _: (work(), 4.0)[1])
    config = DrafterConfig(data=chats, output_dir=tmp_path, batch_size=4, features="cached", max_steps=2)
    before = plan(target, config)
    ready = prepare(target, config)
    store = feature_store(target, ready, objective_for(target, ready.config))
    assert store is not None
    store.build(ready.examples)
    assert before.seconds - plan(target, config).seconds == pytest.approx(26 * 1.0)


def test_durations_read_well() -> None:
    assert [duration(s) for s in (5, 75, 7300)] == ["5 s", "1 min 15 s", "2 h 1 min"]


def test_the_first_weights_come_from_the_seed_alone(target: Target, chats: Path, tmp_path: Path) -> None:
    config = DrafterConfig(data=chats, output_dir=tmp_path, seed=3)
    before = torch.random.get_rng_state()
    one = new_drafter(target, config)
    assert torch.equal(before, torch.random.get_rng_state())
    torch.rand(5)
    two, other = new_drafter(target, config), new_drafter(target, config.model_copy(update={"seed": 4}))
    assert torch.equal(one.gate_proj.weight, two.gate_proj.weight)
    assert not torch.equal(one.gate_proj.weight, other.gate_proj.weight)
