"""Medusa's training: its loss against the equation, whole runs, resumption."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from models import tiny
from outdraft.errors import UserError
from outdraft.losses.objective import Reading
from outdraft.methods.medusa.drafter import MedusaConfig, MedusaHeads, load_medusa
from outdraft.methods.medusa.loss import MedusaLoss
from outdraft.target.target import Target
from outdraft.training.config import DrafterConfig
from outdraft.training.held_out import tau_meter
from outdraft.training.plan import plan

from .test_exit_training import IDS, LENGTHS, MASK, deep, family_target
from .test_train import assert_same_bits, break_and_resume, quiet, settings, weights
from .tiny import write_chats


def medusa(data: Path, folder: Path, **values: Any) -> dict[str, Any]:
    return settings(data, folder, **{"method": "medusa", "medusa_num_heads": 3, **values})


def random_heads(target: Target, own_head: bool, heads: int = 3) -> MedusaHeads:
    config = MedusaConfig(target.hidden_size, target.vocab_size, heads, 1, own_head)
    made = MedusaHeads.beginning(target.model, config).to(target.dtype)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in made.parameters():
            weight.add_(0.1 * torch.randn(weight.shape, generator=generator, dtype=weight.dtype))
    return made


def by_the_equation(target: Target, heads: MedusaHeads, hard_weight: float) -> tuple[float, int, int]:
    """Sum of 0.8^k times the cross-entropy of head k, one row and one position at a time, from the stock model."""
    model, total, agreed, first = target.model, 0.0, 0, 0
    speaking = heads.speaking(target) or [target.head] * len(heads.heads)
    with torch.no_grad():
        for row, length in enumerate(LENGTHS):
            for k, (head, speak) in enumerate(zip(heads.heads, speaking, strict=True), start=1):
                for t in range(int(length) - 1 - k):
                    if not MASK[row, t + 1 + k]:
                        continue
                    wanted = model(IDS[row : row + 1, : t + 1 + k], use_cache=False).logits[0, -1].numpy()
                    feature = target.features(IDS[row : row + 1, : t + 1])[0, -1]
                    said = speak(head(feature[None, None]))[0, 0].numpy()
                    law = np.exp(wanted - wanted.max())
                    law /= law.sum()
                    log_said = said - said.max() - np.log(np.exp(said - said.max()).sum())
                    loss = -(1 - hard_weight) * float((law * log_said).sum())
                    loss -= hard_weight * float(log_said[IDS[row, t + 1 + k]])
                    total += 0.8**k * loss
                    if k == 1:
                        agreed, first = agreed + int(wanted.argmax() == said.argmax()), first + 1
    return total, agreed, first


@pytest.mark.parametrize("own_head", [False, True])
@pytest.mark.parametrize("hard_weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("family", ["llama-gqa", "gemma2"])
def test_the_loss_is_the_equation_s(family: str, hard_weight: float, own_head: bool) -> None:
    target = Target(tiny(family))
    heads = random_heads(target, own_head)
    loss = MedusaLoss(heads, target, chunk_size=2, hard_weight=hard_weight)
    sums = loss(Reading(target)(IDS, LENGTHS), IDS, MASK)
    total, agreed, positions = by_the_equation(target, heads, hard_weight)
    assert positions == 6
    assert sums.cross_entropy.item() == pytest.approx(total, rel=1e-9)
    assert (int(sums.agreed), int(sums.positions)) == (agreed, positions)


def test_sequences_shorter_than_the_heads_reach_train_the_first_ones() -> None:
    target = family_target("llama-gqa")
    heads = random_heads(target, True, heads=9)
    loss = MedusaLoss(heads, target)
    loss(Reading(target)(IDS, LENGTHS), IDS, MASK).cross_entropy.backward()
    norms = [sum(float(weight.grad.norm()) for weight in head.parameters()) for head in heads.heads]
    assert all(norms[:5]) and not any(norms[6:])
    assert all(weight.grad is None for weight in target.model.parameters())


def test_what_stands_on_padding_changes_nothing() -> None:
    target = family_target("llama-gqa")
    loss, features = MedusaLoss(random_heads(target, False), target), Reading(target)(IDS, LENGTHS)
    before = loss(features, IDS, MASK)
    features = features.clone()
    features[1, 5:] = 1e3
    assert all(torch.equal(a, b) for a, b in zip(before, loss(features, IDS, MASK), strict=True))


@pytest.mark.parametrize("more", [{}, {"own_head": True, "loss": "hard"}, {"medusa_num_layers": 2, "loss": "mixed"}])
def test_training_lowers_the_loss_agrees_more_and_leaves_the_target(
    more: dict[str, Any], chats: Path, tmp_path: Path
) -> None:
    target = deep()
    before = {name: weight.clone() for name, weight in target.model.state_dict().items()}
    values = medusa(chats, tmp_path / "run", max_steps=60, logging_steps=10, save_steps=60, **more)
    result = quiet(target, values, measure_tau=tau_meter(target, [[1, 40, 41, 42]], 8))
    first = json.loads((tmp_path / "run/checkpoint-60/trainer_state.json").read_text())["log_history"][0]
    assert result.metrics["loss"] < first["loss"] - 0.1
    if not more:  # the chats' own words are not what this random target would say
        assert result.metrics["acc"] > first["acc"]
    assert result.metrics["loss_head1"] < first["loss_head1"]
    assert result.tau is not None and result.tau["tau"] >= 1
    assert all(torch.equal(before[name], weight) for name, weight in target.model.state_dict().items())
    record = json.loads((tmp_path / "run" / "provenance.json").read_text())
    assert record["config"]["medusa_num_heads"] == 3 and not {"w_reg", "exit_layer"} & record["config"].keys()
    assert DrafterConfig(**record["config"]).method == "medusa"  # a record is a configuration again
    assert set(weights(tmp_path / "run")) == set(load_medusa(tmp_path / "run").network.state_dict())


@pytest.mark.parametrize("family", ["llama-gqa", "gpt2", "gemma2", "granite"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_family_trains_and_comes_back(family: str, dtype: torch.dtype, chats: Path, tmp_path: Path) -> None:
    target = family_target(family, dtype)
    values = medusa(chats, tmp_path / "run", max_steps=2, max_length=48, own_head=family != "gpt2")
    result = quiet(target, {**values, "precision": "bf16" if dtype == torch.bfloat16 else "fp32"})
    assert 0 < result.metrics["loss"] < 100
    assert {weight.dtype for weight in weights(tmp_path / "run").values()} == {torch.float32}
    heads = load_medusa(tmp_path / "run").network
    assert tau_meter(target, [[5, 6, 7], [9]], 6)(heads)["tau"] >= 1


def test_broken_training_resumes_to_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_chats(tmp_path / "chats.jsonl", 26)
    quiet(deep(), medusa(data, tmp_path / "whole"))
    break_and_resume(deep, medusa(data, tmp_path / "run"), monkeypatch)
    assert_same_bits(tmp_path / "whole", tmp_path / "run")


def test_cached_features_train_alike(chats: Path, tmp_path: Path) -> None:
    for features in ("online", "cached"):
        quiet(deep(), medusa(chats, tmp_path / features, max_steps=4, features=features))
    online, cached = weights(tmp_path / "online"), weights(tmp_path / "cached")
    for name, weight in online.items():
        torch.testing.assert_close(cached[name], weight, atol=1e-4, rtol=1e-3)


def test_the_plan_counts_the_heads(chats: Path, tmp_path: Path) -> None:
    target = deep()
    found = plan(target, DrafterConfig(**medusa(chats, tmp_path / "run", own_head=True)))
    assert found.method == "medusa" and found.drafter_parameters == 3 * (16 * 16 + 260 * 16)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"exit_layer": 1}, '"exit_layer" is a setting of eesd, not of medusa'),
        ({"w_cls": 0.1}, '"w_cls" is a setting of fspad, eagle and fspad-1f, not of medusa'),
        ({"method": "fspad"}, '"medusa_num_heads" is a setting of medusa, not of fspad'),
        ({"hard_weight": 0.2}, '"hard_weight" belongs to loss mixed, not soft'),
        ({"preset": "paper"}, "auto for medusa"),
        ({"medusa_num_heads": 0}, "medusa_num_heads"),
    ],
)
def test_settings_of_another_method_are_refused(values: dict[str, Any], says: str, chats: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError) as raised:
        DrafterConfig(**medusa(chats, tmp_path, **values))
    assert says in str(raised.value) and "\n" not in str(raised.value)
