"""EESD's training: its loss against the equation, what it may change, whole runs of several families."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor

from models import tiny
from outdraft.errors import UserError
from outdraft.losses.objective import Reading
from outdraft.methods.eesd.loss import ExitLoss, float32_ends
from outdraft.methods.eesd.network import ExitLayer, ExitLayerConfig, load_exit_layer
from outdraft.target.target import Target
from outdraft.target.views import exit_view
from outdraft.training.config import DrafterConfig
from outdraft.training.held_out import tau_meter
from outdraft.training.plan import plan
from outdraft.training.preparation import objective_for
from outdraft.training.train import TrainResult, train

from .test_train import assert_same_bits, break_and_resume, log, settings, weights
from .tiny import byte_tokenizer, tiny_target, write_chats

FAMILIES = ["llama-gqa", "llama-tied", "gpt2", "gemma2", "gpt-neox", "gpt-neo", "granite", "qwen2-sliding"]


def eesd(data: Path, folder: Path, **values: Any) -> dict[str, Any]:
    return settings(data, folder, **{"method": "eesd", "exit_layer": 1, **values})


def quiet(target: Target, values: dict[str, Any], resume: bool = False, **more: Any) -> TrainResult:
    said = more.pop("said", io.StringIO())
    return train(target, DrafterConfig(**values), resume=resume, console=Console(file=said, width=200), **more)


def deep(dtype: torch.dtype = torch.float32) -> Target:
    """The tiny target with so many layers that the first two do not make it whole."""
    return tiny_target(dtype, layers=4)


def family_target(family: str, dtype: torch.dtype = torch.float32) -> Target:
    target = Target(tiny(family, dtype=dtype, vocab_size=260), byte_tokenizer())
    target.model.requires_grad_(False)
    return target


def exit_of(target: Target, own_head: bool = False) -> ExitLayer:
    return ExitLayer.beginning(target.model, ExitLayerConfig(1, own_head))


IDS = torch.tensor([[5, 9, 12, 7, 3, 30, 8], [4, 11, 6, 2, 1, 0, 0]])
LENGTHS = torch.tensor([7, 5])
MASK = torch.tensor([[1, 0, 1, 1, 0, 1, 1], [0, 0, 0, 1, 1, 0, 0]]).bool()


def by_the_equation(target: Target, drafter: ExitLayer, hard_weight: float) -> tuple[float, int]:
    """The mean loss and the agreeing positions: one row and one position at a time, from the models' own outputs."""
    exit_, total, agreed, positions = drafter.bind(target), 0.0, 0, 0
    with torch.no_grad():
        for row, length in enumerate(LENGTHS):
            for t in range(int(length) - 1):
                if not MASK[row, t + 1]:
                    continue
                out = target.model(IDS[row : row + 1, : t + 1], output_hidden_states=True, use_cache=False)
                wanted = out.logits[0, -1].double().numpy()
                features = exit_.features(out.hidden_states[1], use_cache=False)
                said = exit_.head(features)[0, -1].double().numpy()
                law = np.exp(wanted - wanted.max())
                law /= law.sum()
                log_said = said - said.max() - np.log(np.exp(said - said.max()).sum())
                total -= (1 - hard_weight) * float((law * log_said).sum())
                total -= hard_weight * float(log_said[IDS[row, t + 1]])
                agreed += int(wanted.argmax() == said.argmax())
                positions += 1
    assert positions == 6
    return total / positions, agreed


@pytest.mark.parametrize("own_head", [False, True])
@pytest.mark.parametrize("hard_weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("family", ["llama-gqa", "gemma2"])
def test_the_loss_is_the_equation_s(family: str, hard_weight: float, own_head: bool) -> None:
    target = Target(tiny(family))
    drafter = exit_of(target, own_head).double()
    with torch.no_grad():
        for weight in drafter.parameters():
            weight.add_(0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(3), dtype=weight.dtype))
    loss = ExitLoss(drafter, target, chunk_size=2, hard_weight=hard_weight)
    loss._view = exit_view(target.model, drafter.layer)  # float64 to its end
    hidden, features = Reading(target, exit_layer=1)(IDS, LENGTHS).split(32, dim=-1)
    sums = loss(hidden, features, IDS, MASK)
    expected, agreed = by_the_equation(target, drafter, hard_weight)
    assert sums.cross_entropy.item() / 6 == pytest.approx(expected, rel=1e-9)
    assert (int(sums.agreed), int(sums.positions)) == (agreed, 6)


@pytest.mark.parametrize("own_head", [False, True])
def test_gradients_are_the_plain_ones_and_reach_only_what_trains(own_head: bool) -> None:
    target = family_target("llama-gqa")
    drafter = exit_of(target, own_head)
    hidden, features = Reading(target, exit_layer=1)(IDS, LENGTHS).split(32, dim=-1)
    out = drafter.bind(target)
    counted = MASK[:, 1:]
    said = out.head(out.features(hidden, use_cache=False)[:, :-1][counted]).log_softmax(-1)
    law = target.head(features[:, :-1][counted]).softmax(-1).detach()
    plain = -(law * said).sum() - 0.5 * said.gather(1, IDS[:, 1:][counted][:, None]).sum() + 0.5 * (law * said).sum()
    expected = torch.autograd.grad(plain, list(drafter.parameters()))
    ExitLoss(drafter, target, 4, hard_weight=0.5)(hidden, features, IDS, MASK).cross_entropy.backward()
    for (name, weight), gradient in zip(drafter.named_parameters(), expected, strict=True):
        torch.testing.assert_close(weight.grad, gradient, atol=1e-5, rtol=1e-4, msg=name)
    assert all(weight.grad is None for weight in target.model.parameters())
    assert any(name.startswith("head.") for name, _ in drafter.named_parameters()) == own_head


def test_what_stands_on_padding_changes_nothing() -> None:
    target = family_target("llama-gqa")
    loss = ExitLoss(exit_of(target), target)
    hidden, features = Reading(target, exit_layer=1)(IDS, LENGTHS).split(32, dim=-1)
    before = loss(hidden, features, IDS, MASK)
    hidden, features = hidden.clone(), features.clone()
    hidden[1, 5:], features[1, 5:] = 1e3, -1e3
    assert all(torch.equal(a, b) for a, b in zip(before, loss(hidden, features, IDS, MASK), strict=True))


def test_the_end_of_a_low_precision_target_is_a_copy_and_the_rest_is_shared() -> None:
    model = tiny("gpt2", dtype=torch.bfloat16)
    view = float32_ends(model)
    assert view.transformer.ln_f.weight.dtype == torch.float32 and model.transformer.ln_f.weight.dtype == torch.bfloat16
    assert view.transformer.h is model.transformer.h and view.transformer.wte is model.transformer.wte


def test_training_lowers_the_loss_agrees_more_and_leaves_the_target(chats: Path, tmp_path: Path) -> None:
    target = deep()
    before = {name: weight.clone() for name, weight in target.model.state_dict().items()}
    values = eesd(chats, tmp_path / "run", max_steps=60, logging_steps=10, save_steps=60)
    measure = tau_meter(target, [[1, 40, 41, 42]], 8)
    result = quiet(target, values, measure_tau=measure)
    first = json.loads((tmp_path / "run/checkpoint-60/trainer_state.json").read_text())["log_history"][0]
    assert result.metrics["loss"] < first["loss"] - 0.1 and result.metrics["acc"] > first["acc"] + 0.1
    assert "loss_reg" not in first and result.tau is not None and result.tau["tau"] >= 1
    assert all(torch.equal(before[name], weight) for name, weight in target.model.state_dict().items())
    assert all(weight.grad is None for weight in target.model.parameters())
    record = json.loads((tmp_path / "run" / "provenance.json").read_text())
    assert record["config"]["exit_layer"] == 1 and "w_reg" not in record["config"]
    assert DrafterConfig(**record["config"]).exit_layer == 1  # a record is a configuration again
    assert set(weights(tmp_path / "run")) == set(load_exit_layer(tmp_path / "run", target.model).state_dict())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_family_trains_and_comes_back(family: str, dtype: torch.dtype, chats: Path, tmp_path: Path) -> None:
    target = family_target(family, dtype)
    values = eesd(chats, tmp_path / "run", max_steps=2, max_length=48, own_head=family == "gemma2")
    result = quiet(target, {**values, "precision": "bf16" if dtype == torch.bfloat16 else "fp32"})
    assert 0 < result.metrics["loss"] < 100
    measured = tau_meter(target, [[5, 6, 7], [9]], 6)(load_exit_layer(tmp_path / "run", target.model))
    assert measured["tau"] >= 1


def test_a_bf16_target_trains_in_float32(chats: Path, tmp_path: Path) -> None:
    for family in ("llama-gqa", "gpt2"):
        target = family_target(family, torch.bfloat16)
        result = quiet(target, eesd(chats, tmp_path / family, max_steps=2, max_length=48, own_head=True))
        assert {weight.dtype for weight in weights(result.folder).values()} == {torch.float32}


def test_broken_training_resumes_to_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_chats(tmp_path / "chats.jsonl", 26)
    quiet(deep(), eesd(data, tmp_path / "whole", own_head=True))
    break_and_resume(deep, eesd(data, tmp_path / "run", own_head=True), monkeypatch)
    assert_same_bits(tmp_path / "whole", tmp_path / "run")
    assert log(tmp_path / "whole")[-1]["loss"] == log(tmp_path / "run")[-1]["loss"]


def test_a_family_with_dropout_trains_without(chats: Path, tmp_path: Path) -> None:
    for run in ("one", "two"):
        torch.rand(7)
        quiet(family_target("gpt2"), eesd(chats, tmp_path / run, max_steps=3, max_length=48))
    assert_same_bits(tmp_path / "one", tmp_path / "two")


def test_pieces_of_a_batch_train_alike(chats: Path, tmp_path: Path) -> None:
    found = []
    for pieces in (1, 2):
        # The whole distribution: a teacher that is kept in float16 moves some of Adam's first signs.
        more = {"own_head": True, "teacher_top_k": 0, "gradient_accumulation_steps": pieces}
        quiet(deep(), eesd(chats, tmp_path / str(pieces), max_steps=5, **more))
        found.append(weights(tmp_path / str(pieces)))
    for key, weight in found[0].items():
        torch.testing.assert_close(found[1][key], weight, atol=1e-3, rtol=1e-2, msg=key)


def test_the_plan_counts_the_exit_layer_and_writes_nothing(chats: Path, tmp_path: Path) -> None:
    target = deep()
    found = plan(target, DrafterConfig(**eesd(chats, tmp_path / "run")))
    assert not (tmp_path / "run").exists() and found.method == "eesd"
    assert found.drafter_parameters == sum(weight.numel() for weight in exit_of(target).parameters())
    assert found.feature_cache_bytes == found.tokens * 2 * 16 * 4 + found.response_tokens * 64 * (4 + 2)
    assert found.memory_bytes > 0


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"exit_layer": None}, 'method eesd needs "exit_layer"; give a number of layers or auto'),
        ({"exit_layer": 0}, '"exit_layer" must be at least 1, not 0'),
        ({"exit_layer": "last"}, "exit_layer"),
        ({"feature_noise": True}, '"feature_noise" is a setting of fspad, eagle and fspad-1f, not of eesd'),
        ({"unroll_steps": 2}, '"unroll_steps" is a setting of eagle3, fspad and eagle, not of eesd'),
        ({"w_reg": 1.0}, '"w_reg" is a setting of fspad, eagle and fspad-1f'),
        ({"hard_weight": 0.3}, '"hard_weight" belongs to loss mixed, not soft'),
        ({"preset": "paper"}, "FSPAD's published recipe"),
        ({"method": "fspad"}, '"exit_layer" is a setting of eesd, not of fspad'),
        (
            {"method": "eagle", "exit_layer": None, "own_head": True},
            '"own_head" is a setting of eesd and medusa, not of eagle',
        ),
        ({"method": "fspad", "exit_layer": None, "loss": "hard"}, '"loss" is a setting of eesd'),
    ],
)
def test_settings_of_another_method_are_refused(values: dict[str, Any], says: str, chats: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError) as raised:
        DrafterConfig(**eesd(chats, tmp_path, **values))
    assert says in str(raised.value) and "\n" not in str(raised.value)


def test_a_layer_that_the_target_has_not(chats: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the exit layer must be between 1 and 3 for this model, not 7"):
        quiet(deep(), eesd(chats, tmp_path / "run", exit_layer=7))
    assert not (tmp_path / "run").exists()


def test_an_objective_reads_only_what_its_method_needs(chats: Path, tmp_path: Path) -> None:
    target = deep()
    exit_ = objective_for(target, DrafterConfig(**eesd(chats, tmp_path)))
    head = objective_for(target, DrafterConfig(**settings(chats, tmp_path)))
    assert (exit_.reading.width, head.reading.width) == (32, 16)
    hidden, features = exit_.reading(IDS, LENGTHS).split(16, dim=-1)
    with torch.no_grad():
        out = target.model(IDS, output_hidden_states=True, use_cache=False)
    for row, length in enumerate(LENGTHS.tolist()):  # what stands on padding means nothing
        assert_close(hidden[row, :length], out.hidden_states[1][row, :length])
        assert_close(features[row, :length], head.reading(IDS, LENGTHS)[row, :length])


def assert_close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
