"""The memory of each of several devices is counted from a configuration alone, and is what a loaded model takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from outdraft.cli import app
from outdraft.errors import UserError
from outdraft.target.target import Target
from outdraft.training.config import DrafterConfig
from outdraft.training.plan import CACHED, device_memory
from outdraft.training.preparation import new_drafter

SEVENTY: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
}
PARAMETERS = 70_553_706_496
EMBEDDING = 128256 * 8192
NORMS = (2 * 80 + 1) * 8192


@pytest.fixture
def described(tmp_path: Path) -> Path:
    """A folder with a configuration of 70B parameters, and no weights."""
    folder = tmp_path / "seventy"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(SEVENTY))
    return folder


def test_a_model_of_70b_is_counted_without_loading(described: Path, tmp_path: Path) -> None:
    counted = device_memory(described, DrafterConfig(output_dir=tmp_path / "run"))
    assert [one.devices for one in counted] == [1, 2, 4, 8]
    for one in counted:
        shared = PARAMETERS - EMBEDDING - NORMS  # the plan leaves the embedding and the norms whole
        assert one.weights == 2 * (EMBEDDING + NORMS) + 2 * shared // one.devices
        assert one.cache == CACHED * 2 * 2 * 80 * 8 * 128 // one.devices
        assert one.drafter == counted[0].drafter
        # Beside the target with a whole head: float32 weights with gradients and two moments.
        assert one.training > one.weights + 2 * EMBEDDING * (1 - 1 / one.devices) + 8 * one.drafter
    assert counted[0].weights == 2 * PARAMETERS
    assert counted[0].training > counted[1].training > counted[2].training > counted[3].training


def test_a_dry_run_without_weights_prints_the_memory_and_leaves_nothing(described: Path, tmp_path: Path) -> None:
    flags = ["train", "--model", str(described), "--data", "x", "--output-dir", str(tmp_path / "run"), "--dry-run"]
    done = CliRunner().invoke(app, [*flags, "--method", "eesd", "--exit-layer", "20", "--dtype", "bfloat16", "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)["devices"]
    layer = 2 * 8192 * 8192 + 2 * 8192 * 1024 + 3 * 8192 * 28672 + 2 * 8192
    assert [one["drafter"] for one in found] == [2 * layer] * 4
    assert not (tmp_path / "run").exists()
    said = CliRunner().invoke(app, ["info", str(described)])
    assert said.exit_code == 0 and "19.48" in said.output, said.output


def test_what_is_counted_is_what_the_loaded_model_takes(target: Target, tmp_path: Path) -> None:
    target.model.save_pretrained(tmp_path / "model")
    config = DrafterConfig(output_dir=tmp_path / "run", data=tmp_path)
    one, two = device_memory(tmp_path / "model", config, torch.float32)  # two key-value heads: no more can share it
    assert (one.devices, two.devices) == (1, 2)
    assert one.weights == sum(weight.nbytes for weight in target.model.parameters())
    drafter = new_drafter(target, config.with_preset(target.num_parameters))
    assert one.drafter == sum(weight.nbytes for weight in drafter.parameters())
    cache = target.new_cache(1, CACHED)
    slots = cache.reserve(1, "cpu")
    mask = torch.ones(1, 1, 1, dtype=torch.bool)
    with torch.no_grad():
        target.forward(torch.tensor([[3]]), slots, mask, slots, cache)
    assert one.cache == cache.nbytes


def test_a_configuration_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        device_memory(tmp_path, DrafterConfig(output_dir=tmp_path / "run"))
