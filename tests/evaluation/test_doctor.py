"""`outdraft doctor` finds planted mistakes in drafters that are right by construction, and its fixes mend them."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from simple_targets import (
    LAYERS,
    SIZES,
    VOCAB,
    WIDTH,
    counting_medusa,
    periodic_dflash,
    periodic_eagle3,
    periodic_fspad,
    simple_target,
    some_prompts,
)
from transformers import PreTrainedModel
from typer.testing import CliRunner

import outdraft
from outdraft.cli import app
from outdraft.console.measuring import show
from outdraft.evaluation.doctor import Diagnosis, diagnose
from outdraft.methods.checkpoint import save_drafter
from outdraft.reference import SHIPPED, reference_drafter_path
from outdraft.target.target import Target
from outdraft.training.held_out import tau_meter

TAPS = (2, 4, 5)
NOTED = {"tau": {"acceptance_at_1": 0.97, "tau": 4.2}}


def eagle3_folder(folder: Path, theta: float = 10000.0, **config: Any) -> Path:
    """SpecForge's layout: outputs of layers, counted from 0."""
    head = periodic_eagle3(TAPS)
    inside = ("self_attn", "input_layernorm", "hidden_norm", "post_attention_layernorm")
    tensors = {}
    for name, tensor in head.state_dict().items():
        part = "mlp." if name.startswith(("gate_proj", "up_proj", "down_proj")) else ""
        tensors[f"midlayer.{part}{name}" if part or name.startswith(inside) else name] = tensor
    ids = {"eagle_aux_hidden_state_layer_ids": [tap - 1 for tap in TAPS], "use_aux_hidden_state": True}
    written = {**SIZES, "architectures": ["LlamaForCausalLMEagle3"], "num_hidden_layers": 1, "rope_theta": theta}
    written |= {"draft_vocab_size": VOCAB, "norm_before_residual": True, "eagle_config": ids}
    return written_folder(folder, {**written, **config}, tensors)


def dflash_folder(folder: Path, anchor_first: bool = False, theta: float = 10000.0, **inner: Any) -> Path:
    """z-lab's layout, which says nothing of what the anchor's slot predicts."""
    network = periodic_dflash(TAPS, anchor_first)
    written = {**SIZES, "architectures": ["DFlashDraftModel"], "model_type": "qwen3", "num_hidden_layers": 1}
    written |= {"block_size": 4, "num_target_layers": LAYERS, "rope_theta": theta}
    ids = {"mask_token_id": VOCAB - 1, "target_layer_ids": [tap - 1 for tap in TAPS]}
    return written_folder(folder, {**written, "dflash_config": ids | inner}, network.state_dict())


def written_folder(folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def examined(folder: Path, model: PreTrainedModel | None = None) -> Diagnosis:
    return diagnose(Target(model or simple_target()), folder, some_prompts())


def mend(folder: Path, setting: dict[str, Any]) -> None:
    """Do what the fix says: write keys where they stand, or else at the top."""
    config = json.loads((folder / "config.json").read_text())
    places = [config, *(part for part in config.values() if isinstance(part, dict))]
    for key, value in setting.items():
        next((place for place in places if key in place), config)[key] = value
    (folder / "config.json").write_text(json.dumps(config))


RIGHT: dict[str, Callable[[Path], Path]] = {
    "eagle3": eagle3_folder,
    "dflash": dflash_folder,
    "dflash, anchor first": lambda folder: dflash_folder(folder, True, sample_from_anchor=True),
    "fspad": lambda folder: save_drafter(folder, periodic_fspad(), target_id="periodic", training=NOTED),
}


@pytest.mark.parametrize("kind", RIGHT)
def test_a_right_folder_is_right(tmp_path: Path, kind: str) -> None:
    found = examined(RIGHT[kind](tmp_path / "drafter"))
    assert found.right and found.fix == "" and found.drafts.by_position == [1.0] * found.drafts.depth
    assert all(sum(one.accepted) <= sum(found.drafts.accepted) for one in found.tried)
    assert kind == "fspad" or any(one.by_position[0] < 0.2 for one in found.tried)


IDS = "eagle_aux_hidden_state_layer_ids"
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
LAYOUTS: dict[str, tuple[Callable[[Path], Path], dict[str, Any]]] = {
    "eagle3, layers too far on": (
        lambda folder: eagle3_folder(folder, eagle_config={IDS: [2, 4, 5]}),
        {IDS: [1, 3, 4]},
    ),
    "eagle3, the ids at the top, where they count inputs": (
        lambda folder: eagle3_folder(folder, eagle_config={}, **{IDS: [1, 3, 4]}),
        {IDS: [2, 4, 5]},
    ),
    "dflash, layers too near": (
        lambda folder: dflash_folder(folder, target_layer_ids=[0, 2, 3]),
        {"target_layer_ids": [1, 3, 4]},
    ),
    "dflash, anchor-first read as fill-in": (
        lambda folder: dflash_folder(folder, anchor_first=True),
        {"sample_from_anchor": True},
    ),
    "dflash, fill-in read as anchor-first": (
        lambda folder: dflash_folder(folder, sample_from_anchor=True),
        {"sample_from_anchor": False},
    ),
    "eagle3, dropped norm flag": (
        lambda folder: eagle3_folder(folder, norm_before_residual=None),
        {"norm_before_residual": True},
    ),
    "eagle3, wrong rope": (
        lambda folder: eagle3_folder(folder, theta=500.0),
        {"rope_parameters": ROPE, "rope_scaling": None},
    ),
    "eagle3, rope scaled": (
        lambda folder: eagle3_folder(folder, rope_scaling={"rope_type": "linear", "factor": 4.0}),
        {"rope_parameters": ROPE, "rope_scaling": None},
    ),
    "dflash, wrong rope": (
        lambda folder: dflash_folder(folder, theta=1e6),
        {"rope_parameters": ROPE, "rope_scaling": None},
    ),
}


@pytest.mark.parametrize("mistake", LAYOUTS)
def test_a_wrong_layout_is_found_and_the_fix_mends_it(tmp_path: Path, mistake: str) -> None:
    make, setting = LAYOUTS[mistake]
    folder = make(tmp_path / "drafter")
    found = examined(folder)
    assert found.verdict == "wrong layout" and found.setting == setting
    assert found.drafts.by_position[0] < 0.2 and all(f'"{key}"' in found.fix for key in setting)
    mend(folder, found.setting)
    assert examined(folder).right


def test_fspads_wrong_rope_is_found(tmp_path: Path) -> None:
    folder = save_drafter(tmp_path / "drafter", periodic_fspad(), target_id="periodic", training=NOTED)
    mend(folder, {"rope_theta": 1e6})
    found = examined(folder)
    assert found.verdict == "wrong layout" and found.setting == {"rope_theta": 10000.0}
    mend(folder, found.setting)
    assert examined(folder).right


def test_another_targets_drafter_is_found(tmp_path: Path) -> None:
    """By what its training noted, or by its confidence where nothing is noted."""
    fspad = save_drafter(tmp_path / "fspad", periodic_fspad(), target_id="periodic", training=NOTED)
    medusa = save_drafter(tmp_path / "medusa", counting_medusa(), target_id="counting", training=NOTED)
    eagle3 = eagle3_folder(tmp_path / "eagle3")
    for folder in (fspad, eagle3):
        found = examined(folder, simple_target(seed=5))
        assert found.verdict == "wrong target" and not found.setting, found
    counting, other = (simple_target(seed, by=0, step=1) for seed in (0, 5))
    assert examined(medusa, counting).right
    found = examined(medusa, other)
    assert found.verdict == "wrong target" and "counting" in found.fix and "noted 97%" in found.reason


def test_an_overwritten_head_is_found(tmp_path: Path) -> None:
    folder, model = eagle3_folder(tmp_path / "eagle3"), simple_target()
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, "lm_head.weight": model.lm_head.weight.detach().clone()}, folder / "model.safetensors")
    counting, medusa = simple_target(by=0, step=1), counting_medusa()
    for layer in medusa.outputs:
        layer.load_state_dict(counting.lm_head.state_dict())
    heads = save_drafter(tmp_path / "medusa", medusa, target_id="counting", training=NOTED)
    for found in (examined(folder, model), examined(heads, counting)):
        assert found.verdict == "wrong layout" and "overwritten" in found.reason and "lm_head.weight" in found.fix


def test_an_untrained_drafter_is_told_from_another_targets(tmp_path: Path) -> None:
    folder = eagle3_folder(tmp_path / "eagle3")
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, "lm_head.weight": torch.zeros(VOCAB, WIDTH)}, folder / "model.safetensors")
    assert examined(folder).verdict == "undertrained"
    noted = {"tau": {"acceptance_at_1": 0.07}}  # as after a few steps: no other model would make it a good one
    few = save_drafter(tmp_path / "few", periodic_fspad(), target_id="periodic", training=noted)
    found = examined(few, simple_target(seed=5))
    assert found.verdict == "undertrained"
    show(found, Console(file=(shown := io.StringIO()), width=60, soft_wrap=True))
    assert "noted 7%" in shown.getvalue() and "answers" in shown.getvalue(), "the verdict is folded, not cut"


@pytest.mark.parametrize("method", SHIPPED)
def test_shipped_drafters_are_right(method: str) -> None:
    outcome = CliRunner().invoke(app, ["doctor", "--draft-model", str(reference_drafter_path(method)), "--json"])
    assert outcome.exit_code == 0
    found = json.loads(outcome.stdout)
    assert found["verdict"] == "right" and found["drafter"]["method"] == method
    shares = found["acceptance_by_position"]
    assert len(shares) == 4 and 1 > shares[0] > shares[1] > shares[3] > 0.2 and found["positions"] > 100


def test_the_command_says_the_fix_and_is_exit_code_1(tmp_path: Path) -> None:
    folder, target = dflash_folder(tmp_path / "drafter", anchor_first=True), tmp_path / "target"
    simple_target().save_pretrained(target)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "hello"}\n')
    asked = ["doctor", "--model", str(target), "--draft-model", str(folder), "--data", str(prompts)]
    outcome = CliRunner().invoke(app, asked)
    assert outcome.exit_code == 2  # no tokenizer is there to read prompts with
    outcome = CliRunner().invoke(app, ["doctor", "--model", str(target)])
    assert outcome.exit_code == 2 and "--draft-model" in outcome.stderr


def test_training_notes_the_acceptance_by_position() -> None:
    measured = tau_meter(Target(simple_target()), some_prompts(), 24)(periodic_fspad())
    assert [measured[f"acceptance_at_{position}"] for position in (1, 2, 3)] == [1.0] * 3
    assert measured["acceptance_rate"] == 1.0


# --- while decoding ----------------------------------------------------------------------------------------------


def test_decoding_warns_once_where_hardly_any_draft_is_right(recwarn: pytest.WarningsRecorder) -> None:
    def warned() -> list[str]:
        return [str(one.message) for one in recwarn.list if "outdraft doctor" in str(one.message)]

    settings: dict[str, Any] = {"max_new_tokens": 40, "controller": "fixed", "prompt_lookup_min": 0}
    right = outdraft.load(simple_target(), periodic_fspad(), backend="eager")
    misread = periodic_fspad()
    misread.config.rope_theta = 1e6
    wrong = outdraft.load(simple_target(), misread, backend="eager")
    for _ in range(2):
        right.generate(some_prompts(), **settings)
    assert not warned()
    for _ in range(2):
        wrong.generate(some_prompts(), **settings)
    assert len(warned()) == 1
