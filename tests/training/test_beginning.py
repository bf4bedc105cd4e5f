"""A run that begins with another drafter's weights."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from outdraft.errors import UserError
from outdraft.methods.fspad.beginning import scale_of
from outdraft.methods.fspad.folder import load_drafter
from outdraft.training.config import DrafterConfig
from outdraft.training.preparation import new_drafter, objective_for
from outdraft.training.train import train

from .tiny import tiny_target, write_chats


def config(folder: Path, name: str, **values: Any) -> DrafterConfig:
    data = folder / "chats.jsonl"
    if not data.exists():
        write_chats(data, 12)
    fixed = {"max_steps": 3, "batch_size": 4, "precision": "fp32", "report_to": ["none"], "learning_rate": 1e-2}
    return DrafterConfig(data=data, output_dir=folder / name, **{**fixed, **values})


@pytest.mark.parametrize("method", ["fspad", "eagle"])
def test_the_first_weights_are_the_other_drafters(tmp_path: Path, method: str) -> None:
    target, console = tiny_target(), Console(file=io.StringIO())
    first = train(target, config(tmp_path, "first", method=method), console=console)
    on = config(tmp_path, "second", method=method, seed=5, init_from=str(first.folder))
    begun, other = new_drafter(target, on), new_drafter(target, config(tmp_path, "third", method=method, seed=5))
    before = load_file(first.folder / "model.safetensors")
    decoding = objective_for(target, on, begun).finished()
    assert all(torch.equal(weight, before[name]) for name, weight in decoding.state_dict().items())
    assert not all(torch.equal(weight, before[name]) for name, weight in other.state_dict().items())
    second = train(target, on, console=console)
    after = load_drafter(second.folder)
    assert after.training["config"]["init_from"] == first.folder.name
    assert any(not torch.equal(weight, before[name]) for name, weight in after.head.state_dict().items())


@pytest.mark.parametrize("method", ["fspad", "eagle"])
def test_a_finished_drafter_makes_of_embeddings_what_the_trained_one_makes_of_larger_ones(
    tmp_path: Path, method: str
) -> None:
    target = tiny_target()
    settings = config(tmp_path, "run", method=method, embedding_scale=4.0)
    trained = new_drafter(target, settings)
    finished = objective_for(target, settings, trained).finished()
    embeddings, features = torch.randn(2, 3, 5, target.hidden_size)
    for one, other in zip(trained(4 * embeddings, features), finished(embeddings, features), strict=True):
        torch.testing.assert_close(one, other)
    assert not torch.allclose(trained(embeddings, features).r, finished(embeddings, features).r)


def test_embeddings_are_brought_to_the_size_of_features_by_a_power_of_two() -> None:
    target = tiny_target()
    with torch.no_grad():
        target.model.get_input_embeddings().weight *= 0.01
    scale = scale_of(target)
    ids = torch.linspace(0, target.vocab_size - 1, 64).long()[None]
    ratio = target.features(ids).square().mean().sqrt() / target.embed(ids).square().mean().sqrt()
    assert scale == 2.0 ** round(math.log2(scale)) and scale <= ratio < 2 * scale and scale > 2
    with torch.no_grad():
        target.model.get_input_embeddings().weight *= 1e6
    assert scale_of(target) == 1


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
