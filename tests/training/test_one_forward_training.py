"""FSPAD-1F's training: its loss against the equation, its two stages, resumption, folders."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from outdraft.drafting.vocabulary import DraftVocabulary
from outdraft.errors import UserError
from outdraft.losses.objective import collate
from outdraft.methods.checkpoint import save_drafter, target_facts
from outdraft.methods.fspad.beginning import feature_head_config
from outdraft.methods.fspad.folder import load_drafter
from outdraft.methods.fspad.network import FeatureHead, outputs
from outdraft.methods.fspad_1f.loss import GAMMA, drawn_anchors, mask_rows
from outdraft.methods.fspad_1f.network import OneForwardHead, head_rows
from outdraft.target.target import Target
from outdraft.training.config import DrafterConfig
from outdraft.training.held_out import tau_meter
from outdraft.training.preparation import new_drafter, objective_for

from .test_train import assert_same_bits, break_and_resume, quiet, settings, weights
from .tiny import tiny_target, write_chats


def one_forward(data: Path, folder: Path, **values: Any) -> dict[str, Any]:
    more = {"method": "fspad-1f", "block_size": 4, "anchors": 6, "transition_rank": 4, "slot_candidates": 5}
    return settings(data, folder, **{**more, "teacher_top_k": 20, "embedding_scale": 1.0, **values})


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """The folder of an FSPAD with a draft vocabulary."""
    target = tiny_target()
    torch.manual_seed(1)
    head = FeatureHead(feature_head_config(target, draft_vocab_size=200))
    assert head.draft_tokens is not None
    head.draft_tokens += 7
    return save_drafter(tmp_path / "fspad", head, target_id="x", target=target_facts(target.model))


# --- the loss --------------------------------------------------------------------------------------------------------


def alone(head: OneForwardHead, embedded: Tensor, features: Tensor, t: int) -> tuple[Tensor, Tensor]:
    """p and r of the mask rows after anchor t, in one plain causal forward of FSPAD's inputs and those of mask rows."""
    embedded, features = embedded[:, : t + 1], features[:, : t + 1]
    r, slots = head(embedded, features).r[:, -1:], head.slots[None]
    h = torch.cat([head.fusion(embedded, features), head.fusion(slots, r.expand(-1, slots.shape[1], -1))], dim=1)
    layer: Any = head if head.second is None else head.second
    p, r = outputs(layer, h + layer.self_attn(h, head.rotary(torch.arange(h.shape[1])[None], h.dtype), None, None))
    return p[0, t + 1 :], r[0, t + 1 :]


@pytest.mark.parametrize("progress", [0.1, 0.9])
@pytest.mark.parametrize("second_layer", [True, False])
@torch.no_grad()
def test_the_loss_is_the_equation_s(second_layer: bool, progress: float, base: Path, tmp_path: Path) -> None:
    target = tiny_target(torch.float64)
    values = one_forward(Path("x"), tmp_path / "run", second_layer=second_layer, init_from=str(base), loss_chunk_size=7)
    config = DrafterConfig(**values)
    head: Any = new_drafter(target, config).double()
    torch.nn.init.normal_(head.transition.after.weight)
    objective = objective_for(target, config, head)
    torch.manual_seed(4)
    ids = [torch.randint(0, 260, (n,)) for n in (17, 9, 12)]
    masks = [torch.arange(len(x)) % 7 > 1 for x in ids]
    examples = [
        type("Example", (), {"input_ids": x, "loss_mask": m, "__len__": lambda self: len(self.input_ids)})()
        for x, m in zip(ids, masks, strict=True)
    ]
    batch = collate([{"index": i, "example": example} for i, example in enumerate(examples)])
    features = objective.reading(batch["input_ids"], batch["lengths"])
    given = objective.arguments(batch, features, 3, progress)
    sums = objective.loss(*given)
    anchors, kept = given[5], head.draft_tokens.tolist()
    reduced, codes = DraftVocabulary(head.draft_tokens, target).head, head_rows(target.model) @ head.transition.basis
    total = unary_total = moved_total = 0.0
    for row, (x, mask) in enumerate(zip(ids, masks, strict=True)):
        embedded, read = target.embed(x[None])[:, 1:], target.features(x[None])
        own = [t for t in anchors[row].tolist() if t >= 0]
        assert len(own) == len(set(own)) and all(mask[t + 2] and mask[t + 3] for t in own)
        for t in own:
            p, r = alone(head, embedded, read, t)
            for j in range(1, 4):
                if t + 2 + j >= len(x) or not mask[t + 2 : t + 3 + j].all():
                    break
                whole = target.head(read[0, t + 1 + j]).softmax(-1)
                best = whole.topk(20)
                law = torch.zeros(260, dtype=torch.float64).scatter(0, best.indices, best.values)[kept]
                logits = reduced(p[j - 1])
                unary = -float((law * logits.log_softmax(-1)).sum())
                among = logits.topk(5).indices.tolist()
                label, before = int(x[t + 2 + j]), int(x[t + 1 + j])
                if label in kept and kept.index(label) not in among:
                    among.append(kept.index(label))
                asked = head.transition.before(codes[before]) * head.transition.state(r[j - 1])
                scores = torch.stack([logits[b] + head.transition.after(codes[kept[b]]) @ asked for b in among])
                goal, q = law[among] / law[among].sum(), scores.softmax(0)
                moved = 0.1 * -float((goal * q.log()).sum()) + 0.9 * float((goal - q).abs().sum())
                moved = moved if float(law[among].sum()) > 1e-4 and before in kept else 0.0
                weight = math.exp(-(j - 1) / GAMMA) / sum(math.exp(-i / GAMMA) for i in range(3))
                weight *= int(mask[2:].sum()) / len(own)
                unary_total, moved_total = unary_total + weight * unary, moved_total + weight * moved
                total += weight * (unary + min(1.0, 3 * progress) * moved)
    assert moved_total > 0 and int(sums.positions) == sum(int(mask[2:].sum()) for mask in masks)
    assert float(sums.unary) == pytest.approx(unary_total, rel=1e-6)
    assert float(sums.moved) == pytest.approx(moved_total, rel=1e-6)
    assert float(objective.total(sums)) == pytest.approx(total, rel=1e-6)


def test_gradients_are_those_of_the_loss(base: Path, tmp_path: Path) -> None:
    """Those that are computed chunk by chunk in the forward, against differences."""
    target = tiny_target(torch.float64)
    config = DrafterConfig(**one_forward(Path("x"), tmp_path / "run", init_from=str(base), loss_chunk_size=5))
    head: Any = new_drafter(target, config).double()
    torch.nn.init.normal_(head.transition.after.weight, std=0.1)
    objective = objective_for(target, config, head)
    ids = torch.randint(0, 260, (1, 14), generator=torch.Generator().manual_seed(2))
    batch = {
        "input_ids": ids,
        "loss_mask": torch.ones_like(ids).bool(),
        "lengths": torch.tensor([14]),
        "index": torch.tensor([0]),
    }
    given = objective.arguments(batch, objective.reading(ids, batch["lengths"]), 0, 1.0)
    objective.total(objective.loss(*given)).backward()
    trained = {name: weight for name, weight in head.named_parameters() if weight.requires_grad}
    assert set(trained) == {name for name in trained if name.startswith(("slots", "second.", "transition."))}
    for name in (
        "slots",
        "second.self_attn.k_proj.weight",
        "transition.before.weight",
        "transition.after.weight",
        "transition.state.weight",
    ):
        weight, step = trained[name], 1e-6
        place = int(weight.grad.abs().argmax())
        with torch.no_grad():
            weight.view(-1)[place] += step
            above = float(objective.total(objective.loss(*given)))
            weight.view(-1)[place] -= 2 * step
            below = float(objective.total(objective.loss(*given)))
        assert float(weight.grad.view(-1)[place]) == pytest.approx((above - below) / (2 * step), rel=1e-4)


def test_anchors_are_drawn_by_row_step_and_seed_without_replacement() -> None:
    mask = torch.rand(4, 40, generator=torch.Generator().manual_seed(0)) > 0.3
    seeds = [5, 6, 7, 8]
    anchors = drawn_anchors(mask, 6, seeds)
    assert anchors.shape == (4, 6) and (anchors >= 0).all()
    for row in range(4):
        assert torch.equal(drawn_anchors(mask[row : row + 1], 6, seeds[row : row + 1])[0], anchors[row])
    assert not torch.equal(drawn_anchors(mask, 6, [1, 2, 3, 4]), anchors)
    none = drawn_anchors(torch.zeros(2, 3, dtype=torch.bool), 6, [0, 1])
    assert (none == -1).all() and len(mask_rows(none, torch.zeros(2, 3), 3).batch) == 0


# --- runs ------------------------------------------------------------------------------------------------------------


def test_stage_1_leaves_fspad_and_stage_2_trains_it(base: Path, chats: Path, tmp_path: Path) -> None:
    target, fspad = tiny_target(), load_drafter(base).head.state_dict()
    values = one_forward(chats, tmp_path / "1", init_from=str(base), max_steps=60, logging_steps=10, save_steps=60)
    result = quiet(target, values, measure_tau=tau_meter(target, [[1, 40, 41, 42]], 8))
    log = json.loads((tmp_path / "1/checkpoint-60/trainer_state.json").read_text())["log_history"]
    assert result.metrics["loss_unary"] < log[0]["loss_unary"] - 0.1
    for slot, name in ((slot, name) for slot in (1, 3) for name in ("recall_1", "recall_8", "recall_16", "top1_moved")):
        assert 0 <= result.metrics[f"{name}_slot_{slot}"] <= 1
    assert result.tau is not None and result.tau["tau"] >= 1
    first = weights(tmp_path / "1")
    assert all(torch.equal(weight, first[name]) for name, weight in fspad.items())
    begun = new_drafter(target, DrafterConfig(**values)).state_dict()
    assert not any(torch.equal(begun[name], first[name]) for name in ("slots", "transition.after.weight"))
    quiet(target, one_forward(chats, tmp_path / "2", init_from=str(tmp_path / "1"), train_base=True, max_steps=4))
    second = weights(tmp_path / "2")
    assert first.keys() == second.keys() and torch.equal(first["draft_tokens"], second["draft_tokens"])
    assert not any(torch.equal(first[name], second[name]) for name in ("slots", "fusion.fc.weight", "down_proj.weight"))


def test_without_an_fspad_everything_is_trained(chats: Path, tmp_path: Path) -> None:
    result = quiet(tiny_target(), one_forward(chats, tmp_path / "run", max_steps=3, draft_vocab_size=50))
    assert 0 < result.metrics["loss"] < 100
    head = load_drafter(tmp_path / "run", kind=OneForwardHead).head
    assert head.config.draft_vocab_size == 50 and head.method == "fspad-1f"


@pytest.mark.parametrize("stage", [1, 2])
def test_broken_training_resumes_to_the_same_weights(
    stage: int, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_chats(tmp_path / "chats.jsonl", 26)
    more = {"init_from": str(base), "train_base": stage == 2}
    quiet(tiny_target(), one_forward(data, tmp_path / "whole", **more))
    break_and_resume(tiny_target, one_forward(data, tmp_path / "run", **more), monkeypatch)
    assert_same_bits(tmp_path / "whole", tmp_path / "run")


def test_cached_features_train_alike(base: Path, chats: Path, tmp_path: Path) -> None:
    for features in ("online", "cached"):
        quiet(
            tiny_target(), one_forward(chats, tmp_path / features, max_steps=4, features=features, init_from=str(base))
        )
    online, cached = weights(tmp_path / "online"), weights(tmp_path / "cached")
    for name, weight in online.items():
        torch.testing.assert_close(cached[name], weight, atol=1e-3, rtol=1e-2)


def test_scaled_embeddings_are_folded_in_and_mask_rows_with_them(base: Path, tmp_path: Path) -> None:
    target = tiny_target(torch.float64)
    ids = torch.randint(0, 260, (1, 9), generator=torch.Generator().manual_seed(2))
    batch = {
        "input_ids": ids,
        "loss_mask": torch.ones_like(ids).bool(),
        "lengths": torch.tensor([9]),
        "index": torch.tensor([0]),
    }
    heads: Any = {}
    for scale in (1.0, 8.0):
        config = DrafterConfig(**one_forward(Path("x"), tmp_path / "run", init_from=str(base), embedding_scale=scale))
        objective = objective_for(target, config, new_drafter(target, config).double())
        heads[scale] = objective.finished()
        assert scale == 1 or not torch.equal(objective.drafter.slots, heads[scale].slots)
        sums = objective.loss(*objective.arguments(batch, objective.reading(ids, batch["lengths"]), 0))
        heads[scale].loss = float(sums.unary)
    torch.testing.assert_close(heads[1.0].slots, heads[8.0].slots)
    torch.testing.assert_close(heads[1.0].fusion.fc.weight, heads[8.0].fusion.fc.weight)
    assert heads[1.0].loss == pytest.approx(heads[8.0].loss, rel=1e-6)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"teacher_top_k": 0}, "give teacher_top_k a number above 0"),
        ({"block_size": 1}, "block_size"),
        ({"method": "fspad"}, "is a setting of dflash, dspark and fspad-1f, not of fspad"),
        ({"unroll_steps": 3}, '"unroll_steps" is a setting of eagle3, fspad and eagle, not of fspad-1f'),
        ({"preset": "paper"}, "auto for fspad-1f"),
    ],
)
def test_settings_that_cannot_work_are_refused(values: dict[str, Any], says: str, chats: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError) as raised:
        DrafterConfig(**one_forward(chats, tmp_path, **values))
    assert says in str(raised.value) and "\n" not in str(raised.value)


def test_other_drafters_are_no_beginning(base: Path, chats: Path, tmp_path: Path) -> None:
    quiet(tiny_target(), one_forward(chats, tmp_path / "1", init_from=str(base), max_steps=1))
    with pytest.raises(UserError, match="has block_size 4, this run's has 3; set block_size 4"):
        quiet(tiny_target(), one_forward(chats, tmp_path / "2", init_from=str(tmp_path / "1"), block_size=3))
    other = Target(
        tiny_target().model.__class__(
            tiny_target().model.config.__class__(**{**tiny_target().model.config.to_dict(), "vocab_size": 300})
        )
    )
    with pytest.raises(UserError, match="was trained for a target with vocab_size 260, this one has 300"):
        new_drafter(other, DrafterConfig(**one_forward(chats, tmp_path / "3", init_from=str(base))))
    with pytest.raises(UserError, match="holds a drafter of method 'fspad', not fspad-1f"):
        load_drafter(base, kind=OneForwardHead)
