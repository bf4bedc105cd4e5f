"""What goes beyond the paper, each a setting: the training's forward is decoding's, and the settings reach it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from outdraft.core.dice import Dice
from outdraft.core.sampling import Warper
from outdraft.core.sampling_settings import SamplingSettings
from outdraft.core.shape import TreeShape
from outdraft.engine.round import decode
from outdraft.engine.rows import Row
from outdraft.errors import UserError
from outdraft.methods.fspad.drafter import FeatureDrafter
from outdraft.methods.fspad.folder import load_drafter
from outdraft.methods.fspad.loss import FeatureObjective, LossSums
from outdraft.methods.fspad.network import FeatureHead
from outdraft.target.target import Target
from outdraft.training.config import DrafterConfig
from outdraft.training.preparation import new_drafter, objective_for
from outdraft.training.train import train

from .tiny import tiny_target

SWITCHES: dict[str, dict[str, Any]] = {
    "paper": {},
    "several layers": {"tap_layers": [1, 3]},
    "norm": {"state_norm": True},
    "both": {"tap_layers": [2], "state_norm": True},
    "eagle, both": {"method": "eagle", "tap_layers": [1, 2, 3], "state_norm": True},
}
STEPS = 3


def settings(**more: Any) -> DrafterConfig:
    return DrafterConfig(data="none", output_dir="none", unroll_steps=STEPS, feature_noise=False, **more)


@pytest.fixture(scope="module")
def exact_target() -> Target:
    return tiny_target(torch.float64, layers=4)


def drafter_for(target: Target, config: DrafterConfig) -> FeatureHead:
    """Of random weights; those that begin at 0 or 1, too."""
    head = new_drafter(target, config).double().eval()
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for name, weight in head.named_parameters():
            if "taps" in name or "norm" in name:
                weight.add_(0.3 * torch.randn(weight.shape, generator=generator, dtype=weight.dtype))
    assert isinstance(head, FeatureHead)
    return head


@torch.inference_mode()
def drafted(head: FeatureHead, target: Target, prompt: list[int], rounds: int) -> list[tuple[list[int], list[Tensor]]]:
    """Real decoding in chains: of every round the text up to the last candidate, and the logits of each draft step."""
    drafter, found = FeatureDrafter(head, target), []
    said: list[Tensor] = []
    logits = drafter.logits
    drafter.logits = lambda p: said.append(logits(p)) or said[-1]  # type: ignore[method-assign, func-returns-value]
    row = Row(prompt, Warper(SamplingSettings(), len(prompt), target.vocab_size, ()), Dice(0), 3 * rounds)
    rounds_of = decode(target, drafter, [row], TreeShape.chain(STEPS))
    next(rounds_of)
    for _ in range(rounds):
        before = len(row.tokens)
        said.clear()
        next(rounds_of)
        text = prompt + row.tokens[:before]
        found.append((text + [int(one.flatten().argmax()) for one in said], [one.flatten() for one in said]))
    return found


@pytest.mark.parametrize("switches", SWITCHES)
def test_what_is_trained_is_what_decodes(exact_target: Target, switches: str) -> None:
    """Draft step k of decoding and step k of unrolled training give the same logits after the same text."""
    config = settings(**SWITCHES[switches])
    head = drafter_for(exact_target, config)
    objective = FeatureObjective(exact_target, config, head)
    rounds = drafted(objective.finished(), exact_target, [10, 20, 30, 25, 99, 31], rounds=4)
    outputs: list[Tensor] = []
    head.register_forward_hook(lambda _, __, out: outputs.append(out.p))
    for text, said in rounds:
        ids = torch.tensor([text])
        batch = {"input_ids": ids, "lengths": torch.tensor([len(text)]), "loss_mask": torch.ones_like(ids).bool()}
        outputs.clear()
        with torch.no_grad():
            objective.loss(*objective.arguments(batch, objective.reading(ids, batch["lengths"]), 0))
        assert len(outputs) == len(said) == STEPS
        for step in range(STEPS):
            place = len(text) - STEPS - 2 + step
            trained = exact_target.head(outputs[step][0, place])
            torch.testing.assert_close(trained, said[step], atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("switches", [name for name in SWITCHES if name != "paper"])
def test_every_switch_matters(exact_target: Target, switches: str) -> None:
    config = settings(**SWITCHES[switches])
    head = drafter_for(exact_target, config)
    bare = FeatureHead(new_drafter(exact_target, settings(method=config.method)).config).double()
    bare.load_state_dict(head.state_dict(), strict=False)
    prompt = [10, 20, 30, 25, 99, 31]
    ((_, one), (_, other)) = (drafted(each, exact_target, prompt, rounds=1)[0] for each in (head, bare))
    assert (one[0] - other[0]).abs().max() > 1e-3


def test_a_fresh_drafter_that_reads_several_layers_is_the_one_that_does_not(exact_target: Target) -> None:
    one, other = (new_drafter(exact_target, settings(**switch)).state_dict() for switch in ({}, {"tap_layers": [1, 3]}))
    assert all(torch.equal(weight, other[name]) for name, weight in one.items())
    assert other["fusion.taps.proj.weight"].abs().max() == 0


def test_other_layers_carry_no_noise_and_are_no_goal(exact_target: Target) -> None:
    config = settings(tap_layers=[1, 3]).model_copy(update={"feature_noise": True})
    objective = FeatureObjective(exact_target, config, drafter_for(exact_target, config))
    ids = torch.randint(3, 200, (1, 12), generator=torch.Generator().manual_seed(0))
    batch = {
        "input_ids": ids,
        "lengths": torch.tensor([12]),
        "loss_mask": torch.ones_like(ids).bool(),
        "index": torch.tensor([4]),
    }
    read: list[Tensor] = []
    objective.drafter.fusion.taps.register_forward_hook(lambda _, inputs, __: read.extend([inputs[0], *inputs[1]]))
    features = objective.reading(ids, batch["lengths"])
    objective.loss(*objective.arguments(batch, features, 0))
    feature, low, high = features[:, :-2].split(16, dim=-1)
    assert torch.equal(read[1], low) and torch.equal(read[2], high)
    assert 0 < (read[0] - feature).abs().max() <= 0.1 * 512 / 12


@pytest.mark.parametrize("switches", [name for name in SWITCHES if name != "paper"])
def test_a_drafter_keeps_its_switches(target: Target, chats: Path, tmp_path: Path, switches: str) -> None:
    layers = {"tap_layers": [1]} if "tap_layers" in SWITCHES[switches] else {}
    config = DrafterConfig(
        data=chats, output_dir=tmp_path / "run", max_steps=2, batch_size=4, report_to=["none"], precision="fp32",
        features="cached", **{**SWITCHES[switches], **layers},
    )  # fmt: skip
    trained = train(target, config)
    loaded = load_drafter(trained.folder).head
    assert loaded.config.tap_layers == tuple(layers.get("tap_layers", ()))
    assert loaded.config.state_norm is config.state_norm
    stored = json.loads((trained.folder / "config.json").read_text())
    assert stored["tap_layers"] == list(loaded.config.tap_layers)
    assert stored["training"]["config"]["state_norm"] is config.state_norm
    said = drafted(loaded, target, [10, 20, 30], rounds=1)[0][1]
    assert all(one.isfinite().all() for one in said)


@pytest.mark.parametrize(("schedule", "expected"), [("constant", 1.0), ("linear", 0.75), ("cosine", 0.853553390593)])
def test_the_feature_loss_fades(exact_target: Target, schedule: Any, expected: float) -> None:
    config = settings(w_reg=2.0, w_cls=0.5, w_reg_schedule=schedule)
    objective = objective_for(exact_target, config)
    assert isinstance(objective, FeatureObjective)
    sums = LossSums(torch.tensor(3.0), torch.tensor(4.0), torch.tensor(1), torch.tensor(1))
    assert objective.total(sums, 0.25).item() == pytest.approx(2 * expected * 3 + 0.5 * 4)
    assert objective.total(sums, 0.0).item() == pytest.approx(8)
    assert objective.total(sums, 1.0).item() == pytest.approx(8 if schedule == "constant" else 2)


def test_the_run_says_how_far_it_is(
    target: Target, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[float] = []
    total = FeatureObjective.total

    def listening(self: FeatureObjective, sums: Any, progress: float = 0.0) -> Tensor:
        heard.append(progress)
        return total(self, sums, progress)

    monkeypatch.setattr(FeatureObjective, "total", listening)
    given = {"batch_size": 4, "gradient_accumulation_steps": 2, "report_to": ["none"], "precision": "fp32"}
    train(target, DrafterConfig(data=chats, output_dir=tmp_path, max_steps=4, **given))
    assert heard == [0.0, 0.0, 0.25, 0.25, 0.5, 0.5, 0.75, 0.75]


def test_layers_that_are_not_there_are_refused(target: Target, chats: Path, tmp_path: Path) -> None:
    for layers, says in (([2], "between 1 and 1"), ([1, 1], "rising order"), ([0], "rising order")):
        config = DrafterConfig(data=chats, output_dir=tmp_path / "run", max_steps=1, tap_layers=layers)
        with pytest.raises(UserError, match=says):
            train(target, config)


def test_a_run_from_before_the_switches_goes_on(target: Target, chats: Path, tmp_path: Path) -> None:
    """Its record says nothing of them: they were at what is the default."""
    given = {"data": chats, "output_dir": tmp_path, "max_steps": 2, "report_to": ["none"], "precision": "fp32"}
    train(target, DrafterConfig(**given))
    record = tmp_path / "training_run.json"
    before = json.loads(record.read_text())
    assert before.pop("token_loss") == "soft" and before.pop("state_norm") is False
    record.write_text(json.dumps(before))
    assert train(target, DrafterConfig(**given), resume=True).steps == 2
    with pytest.raises(UserError, match="token_loss was soft in this run and is top-k now"):
        train(target, DrafterConfig(**given, token_loss="top-k"), resume=True)
