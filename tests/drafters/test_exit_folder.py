"""Folders of exit layers: the round trip, and one line for whatever does not fit the target."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from models import tiny
from outdraft import UserError
from outdraft.api.loading import load_drafter_for
from outdraft.methods.checkpoint import save_drafter, target_facts
from outdraft.methods.eesd.drafter import EarlyExit
from outdraft.methods.eesd.network import ExitLayer, ExitLayerConfig, load_exit_layer
from outdraft.methods.fspad.folder import load_drafter
from outdraft.target.target import Target

FAMILIES = ["llama-gqa", "llama-tied", "gpt2", "gemma2", "gpt-neox", "gpt-neo"]


def saved(folder: Path, family: str = "llama-gqa", own_head: bool = False) -> Path:
    """A folder with an exit layer of a tiny model of that family."""
    model = tiny(family)
    exit_layer = ExitLayer.beginning(model, ExitLayerConfig(1, own_head))
    return save_drafter(folder, exit_layer, target_id="some/target", training={"steps": 3}, target=target_facts(model))


def changed(folder: Path, **changes: Any) -> Path:
    """Its config with changes; None takes a key away."""
    config = {**json.loads((folder / "config.json").read_text()), **changes}
    config = {key: value for key, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("own_head", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_round_trip_is_exact(tmp_path: Path, family: str, own_head: bool) -> None:
    model = tiny(family)
    exit_layer = ExitLayer.beginning(model, ExitLayerConfig(1, own_head))
    with torch.no_grad():
        for weight in exit_layer.parameters():
            weight.add_(0.01)
    folder = save_drafter(tmp_path / "exit", exit_layer, target_id="some/target", target=target_facts(model))
    config = json.loads((folder / "config.json").read_text())
    assert (config["method"], config["exit_layer"], config["own_head"]) == ("eesd", 1, own_head)
    assert config["target"] == {"id": "some/target", **target_facts(model)}
    loaded = load_exit_layer(folder, tiny(family, seed=5))
    before, after = exit_layer.state_dict(), loaded.state_dict()
    assert loaded.config == exit_layer.config and list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)
    os.truncate(folder / "model.safetensors", 16)  # the loaded weights do not hang on the file
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("backend", ["eager", "packed"])
def test_a_folder_and_a_network_become_the_same_drafter(tmp_path: Path, backend: str) -> None:
    model = tiny("llama-gqa", dtype=torch.float32)
    target = Target(model, backend=backend)
    drafter = load_drafter_for(target, saved(tmp_path / "exit", own_head=True), backend=backend)
    network = ExitLayer.beginning(model, ExitLayerConfig(1, True))
    other = load_drafter_for(target, network, backend=backend)
    assert isinstance(drafter, EarlyExit) and isinstance(other, EarlyExit) and drafter.method == "eesd"
    assert drafter.num_parameters == other.num_parameters == sum(weight.numel() for weight in network.parameters())
    assert all(weight.requires_grad for weight in network.parameters())  # a copy was taken


def test_the_method_is_compared(tmp_path: Path) -> None:
    target = Target(tiny("llama-gqa"))
    with pytest.raises(UserError, match=r"--method fspad, but .* is a 'eesd' drafter"):
        load_drafter_for(target, saved(tmp_path / "exit"), method="fspad")
    with pytest.raises(UserError, match="method 'eesd' needs a drafter"):
        load_drafter_for(target, None, method="eesd")
    with pytest.raises(UserError, match="together with its target"):
        load_drafter(tmp_path / "exit")


@pytest.mark.parametrize(
    ("family", "changes", "says"),
    [
        ("llama-gqa", {"hidden_size": 64}, "with hidden_size 32, this one has 64"),
        ("llama-gqa", {"num_hidden_layers": 3}, "with num_hidden_layers 2, this one has 3"),
        ("llama-gqa", {"vocab_size": 40}, "with vocab_size 32, this one has 40"),
        ("llama-gqa", {"intermediate_size": 56}, "mlp.gate_proj.weight is 48x32 where this target asks for 56x32"),
        ("gpt2", {}, "with model_type llama, this one has gpt2"),
    ],
)
def test_another_target_is_refused(tmp_path: Path, family: str, changes: dict[str, int], says: str) -> None:
    refused(saved(tmp_path / "exit"), says, tiny(family, **changes))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"exit_layer": None}, "lacks exit_layer"),
        ({"exit_layer": 2}, "the exit layer must be between 1 and 1 for this model, not 2"),
        ({"exit_layer": "1"}, "exit_layer must be a positive whole number"),
        ({"own_head": 1}, "own_head must be true or false"),
        ({"own_head": True}, "lacks head.weight"),
        ({"target": {"id": "x"}}, "says nothing of its target's model_type, num_hidden_layers"),
        ({"method": "medusa"}, "holds no exit layer"),
    ],
)
def test_configs_that_cannot_be(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    refused(changed(saved(tmp_path / "exit"), **changes), says)


@pytest.mark.parametrize("left", [0, 5, 2000])
def test_truncated_weights(tmp_path: Path, left: int) -> None:
    folder = saved(tmp_path / "exit")
    os.truncate(folder / "model.safetensors", left)
    refused(folder, "copy or download it again")


def test_tensors_of_another_family_are_named(tmp_path: Path) -> None:
    folder, other = saved(tmp_path / "exit"), saved(tmp_path / "other", "gpt2")
    os.replace(other / "model.safetensors", folder / "model.safetensors")
    refused(folder, "lacks layer.")


def test_tensors_without_a_place_warn(tmp_path: Path) -> None:
    folder = saved(tmp_path / "exit")
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "layer.extra": torch.ones(2)}, folder / "model.safetensors")
    with pytest.warns(UserWarning, match=r"layer\.extra, which this drafter has no place for"):
        load_exit_layer(folder, tiny("llama-gqa"))


def refused(folder: Path, says: str, model: Any = None) -> None:
    with pytest.raises(UserError) as error:
        load_exit_layer(folder, tiny("llama-gqa") if model is None else model)
    assert says in str(error.value) and "\n" not in str(error.value), str(error.value)
