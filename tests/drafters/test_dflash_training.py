"""DFlash's and DSpark's training meets their decoding: logits and loss against the equations and against what the
drafter drafts, planted mistakes between them, whole runs in each layout, resumption, and what cannot be."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dflash_reference import LAYOUTS, BlockShape, NaiveDFlash, block_folder, block_tensors
from safetensors.torch import load_file, save_file
from test_dflash import OWN, TAPS, VARIANTS, folder_of, model_of
from torch import Tensor

from outdraft.api.loading import load_drafter_for
from outdraft.console.facts import describe
from outdraft.core.dice import Dice
from outdraft.core.sampling_settings import SamplingSettings
from outdraft.core.shape import TreeShape
from outdraft.data.conversations import read_conversations
from outdraft.errors import UserError
from outdraft.evaluation.doctor import diagnose
from outdraft.losses.objective import Reading
from outdraft.methods.dflash import loss as dflash_loss
from outdraft.methods.dflash.drafter import DFlash
from outdraft.methods.dflash.folder import load_dflash
from outdraft.methods.dflash.loss import BlockObjective, begun_from
from outdraft.target.target import Target
from outdraft.training.config import DrafterConfig
from outdraft.training.held_out import tau_meter
from outdraft.training.plan import plan
from test_losslessness import Recorded, finish, rows_of
from training.test_train import assert_same_bits, break_and_resume, quiet, settings, weights
from training.tiny import tiny_target, write_chats

IDS = torch.randint(0, 32, (3, 15), generator=torch.Generator().manual_seed(3))
LENGTHS = torch.tensor([15, 9, 13])
MASK = (torch.arange(15) < LENGTHS[:, None]) & ((torch.arange(15) + torch.tensor([[0], [1], [5]])) % 8 > 1)
MASK[:, 0] = False
BATCH = {"input_ids": IDS, "loss_mask": MASK, "lengths": LENGTHS, "index": torch.arange(3)}
ANCHORS = [[t for t in range(14) if MASK[row, t] and MASK[row, t + 1]] for row in range(3)]


def started(folder: Path, **values: Any) -> tuple[BlockObjective, Target]:
    """The objective in float64, of the drafter in a folder."""
    target = Target(model_of())
    method = load_dflash(folder).network.method
    config = DrafterConfig(output_dir="none", method=method, init_from=str(folder), preset="tiny", **values)
    network = begun_from(target, config).double()
    network.load_stored({name: tensor.double() for name, tensor in load_file(folder / "model.safetensors").items()})
    return BlockObjective(target, config, network), target


def naive_at(objective: BlockObjective, shape: BlockShape, row: int, anchor: int) -> NaiveDFlash:
    """The equations at an anchor, from the stock model's forward over the tokens before it alone."""
    model: Any = objective.target.model
    prefix = IDS[row : row + 1, :anchor]
    hidden = model(prefix, output_hidden_states=True, use_cache=False).hidden_states
    table, head = model.get_input_embeddings().weight.numpy(), model.get_output_embeddings().weight.numpy()
    taps = [hidden[tap][0].numpy() for tap in TAPS]
    return NaiveDFlash(block_tensors(shape), shape, table, head, int(IDS[row, anchor]), taps)


@torch.no_grad()
def assert_training_is_the_equations(objective: BlockObjective, shape: BlockShape) -> None:
    """Log-probabilities of every proposal that counts, after the true tokens, at all anchors in one forward."""
    compared = 0
    given = objective.arguments(BATCH, objective.reading(IDS, LENGTHS), 0)
    kept = list(range(32)) if shape.kept is None else list(shape.kept)
    for i, slot in enumerate(objective.loss.slots(*given)):
        laws = objective.loss.logits(slot.p).log_softmax(-1)
        for row, before, law in zip(slot.batch.tolist(), slot.before.tolist(), laws.numpy(), strict=True):
            anchor = before - i
            assert anchor in ANCHORS[row] and MASK[row, anchor + 1 : anchor + 2 + i].all()
            path = tuple(IDS[row, anchor + 1 : anchor + 1 + i].tolist())
            np.testing.assert_allclose(law, naive_at(objective, shape, row, anchor).law(path)[kept], atol=1e-9)
            compared += 1
    assert compared > 40


@pytest.mark.parametrize("variant", VARIANTS)
def test_training_is_the_equations(tmp_path: Path, variant: str) -> None:
    folder, shape = folder_of(tmp_path / "drafter", variant)
    assert_training_is_the_equations(started(folder)[0], shape)


@pytest.mark.parametrize("variant", VARIANTS)
@torch.inference_mode()
def test_the_drafter_drafts_what_training_says(tmp_path: Path, variant: str) -> None:
    """At every round of a ragged batch, decoding's logits are training's at that anchor, whatever comes after it."""
    objective, target = started(folder_of(tmp_path / "drafter", variant)[0])
    decoder = DFlash(objective.drafter.eval(), target)
    recorded, given, levels = Recorded(decoder), list[Tensor](), decoder.levels

    def noting(*args: Any) -> Tensor:
        given.extend((logits := levels(*args)).clone())
        return logits

    decoder.levels = noting  # type: ignore[method-assign]
    prompts = [[5, 9, 9, 3, 5, 9], [1, 2, 3, 4, 1, 2, 3], [30, 8]]
    rows = rows_of(target, prompts, SamplingSettings(), 9, [Dice(i) for i in range(3)])
    finish(target, recorded, rows, TreeShape.chain(3))
    assert len(given) == len(recorded.proposed) > 6
    for (prefix, _), found in zip(recorded.proposed, given, strict=True):
        ids = torch.tensor([[*prefix, 7, 8, 9, 10]])
        anchor = torch.tensor([[len(prefix) - 1, 1]])
        features = objective.reading(ids, torch.tensor([ids.shape[1]]))
        features[:, len(prefix) - 1 :] = torch.randn_like(features[:, len(prefix) - 1 :])
        states = objective.loss.states(features[..., 32:], ids, anchor)[0, 0]
        torch.testing.assert_close(decoder.logits(states)[: len(found)], found, atol=1e-9, rtol=0)


def masked(change: Callable[[Tensor], Tensor] = lambda context: context, blind: bool = True) -> Callable[..., Any]:
    """A mistake in the mask alone: other positions of context rows, or blocks that are not blind to each other."""
    right = dflash_loss.block_mask

    def wrong(sight: tuple[bool, int], positions: Tensor, size: int, context: Tensor) -> Tensor:
        mask = right(sight, positions, size, change(context))
        mask[..., context.shape[1] :] |= not blind
        return mask

    return lambda objective, patch: patch.setattr(dflash_loss, "block_mask", wrong)


MISTAKES: dict[str, tuple[str, Callable[[BlockObjective, pytest.MonkeyPatch], Any]]] = {
    "the anchor's own feature is seen": ("z-lab", masked(lambda context: context - 1)),
    "the newest context row is missing": ("z-lab", masked(lambda context: context + 1)),
    "layers off by one": ("z-lab", lambda o, _: setattr(o, "reading", Reading(o.target, (3, 5, 7)))),
    "another mask token": ("z-lab", lambda o, _: setattr(o.drafter.config, "mask_token_id", 28)),
    "a causal block": ("z-lab", lambda o, _: setattr(o.drafter.config, "causal", (True, True))),
    "a bidirectional block": ("causal head", lambda o, _: setattr(o.drafter.config, "causal", (False, False))),
    "no window": ("sliding layer", lambda o, _: setattr(o.drafter.config, "windows", (0, 0))),
    "slots read one off": ("deepspec dflash", lambda o, _: setattr(o.drafter.config, "anchor_first", False)),
    "no Markov bias": ("deepspec dspark", lambda o, _: setattr(o.drafter, "markov_head", None)),
    "no final scaling": ("scaled", lambda o, _: setattr(o.drafter.config, "output_multiplier", 1.0)),
    "blocks see each other": ("z-lab", masked(blind=False)),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_planted_mistake_would_be_seen(mistake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    variant, plant = MISTAKES[mistake]
    folder, shape = folder_of(tmp_path / "drafter", variant)
    objective, _ = started(folder)
    plant(objective, monkeypatch)
    with pytest.raises(AssertionError):
        assert_training_is_the_equations(objective, shape)


@pytest.mark.parametrize("variant", ["z-lab", "speculators dspark", "own width"])
def test_the_loss_weighs_the_slots_and_its_gradients_are_right(variant: str, tmp_path: Path) -> None:
    folder, shape = folder_of(tmp_path / "drafter", variant)
    objective, target = started(folder, teacher_top_k=10, loss_chunk_size=5)
    kept = np.arange(32) if shape.kept is None else np.array(shape.kept)
    proposals = shape.block_size - (not shape.anchor_first)
    falling = np.exp(-np.arange(proposals) / 4)
    total, right, count = 0.0, np.zeros(proposals), np.zeros(proposals)
    with torch.no_grad():
        said = target.model(IDS).logits.softmax(-1).numpy()
        for row, anchors in enumerate(ANCHORS):
            for anchor in anchors:
                naive = naive_at(objective, shape, row, anchor)
                for i in range(proposals):
                    if not (anchor + 1 + i < 15 and MASK[row, anchor + 1 : anchor + 2 + i].all()):
                        break
                    wanted = said[row, anchor + i]
                    law = naive.law(tuple(IDS[row, anchor + 1 : anchor + 1 + i].tolist()))
                    goal = np.where(wanted >= np.sort(wanted)[-10], wanted, 0.0)[kept]
                    total -= falling[i] / falling.sum() * float((goal * law[kept]).sum())
                    right[i] += law.argmax() == wanted.argmax()
                    count[i] += 1
        features = objective.reading(IDS, LENGTHS)
        given = objective.arguments(BATCH, features, 0)
        sums = objective.loss(*given)
        hits, spoken = objective.hits(BATCH, features, 2)
    positions = sum(map(len, ANCHORS))
    assert objective.total(sums).item() == pytest.approx(total, rel=1e-6)
    assert int(sums.positions) == positions == int(objective.counted(MASK).sum()) == count[0]
    assert (hits & spoken).sum((0, 1)).tolist() == right.tolist() and spoken.sum((0, 1)).tolist() == count.tolist()
    shown = [float(getattr(sums, name)) / positions for name in objective.parts]
    np.testing.assert_allclose(shown, right / count, rtol=1e-6)

    objective.total(objective.loss(*given)).backward()
    trained = {name: weight for name, weight in objective.drafter.named_parameters() if weight.requires_grad}
    assert not {"embed_tokens.weight", "lm_head.weight"} & trained.keys()
    markov = [name for name in trained if name.startswith("markov_head.")]
    assert len(markov) == (2 if shape.markov_rank else 0)
    for name in ("fc.weight", "hidden_norm.weight", "layers.0.self_attn.v_proj.weight", "norm.weight", *markov):
        weight, step = trained[name], 1e-6
        place = int(weight.grad.abs().argmax())
        moved = []
        with torch.no_grad():
            for by in (step, -2 * step):
                weight.view(-1)[place] += by
                moved.append(float(objective.total(objective.loss(*given))))
        assert float(weight.grad.view(-1)[place]) == pytest.approx((moved[0] - moved[1]) / (2 * step), rel=1e-4)


def test_anchors_are_few_and_drawn_anew_by_step_and_example(tmp_path: Path) -> None:
    objective, _ = started(folder_of(tmp_path / "drafter", "z-lab")[0], anchors=3)
    features = objective.reading(IDS, LENGTHS)
    first, later = (objective.arguments(BATCH, features, step)[-1] for step in (4, 5))
    assert torch.equal(first, objective.arguments(BATCH, features, 4)[-1]) and not torch.equal(first, later)
    for row, found in enumerate(first.tolist()):
        own = [t for t in found if t >= 0]
        assert len(set(own)) == len(own) == min(3, len(ANCHORS[row])) and set(own) <= set(ANCHORS[row])
    assert int(objective.counted(MASK).sum()) == int((first >= 0).sum())


# --- whole runs --------------------------------------------------------------------------------------------------

SMALL: dict[str, Any] = {"hidden_size": 16, "target_hidden_size": 16, "vocab_size": 260, "max_position_embeddings": 128}
BEGINNINGS: dict[str, dict[str, Any]] = {
    "z-lab": {},
    "speculators": {**OWN, "kept": tuple(range(3, 200))},
    "deepspec": {**OWN, "anchor_first": True, "markov_rank": 5},
}


def deep() -> Target:
    return tiny_target(layers=8)


def beginning(folder: Path, layout: str = "z-lab") -> Path:
    block_folder(folder, layout, BlockShape(**SMALL, **BEGINNINGS[layout]), TAPS)
    if layout == "deepspec":  # as some name their tensors
        file = folder / "model.safetensors"
        save_file({f"model.{name}": tensor for name, tensor in load_file(file).items()}, file)
    return folder


def going_on(data: Path | str, folder: Path, source: Path, **values: Any) -> dict[str, Any]:
    method = load_dflash(source).network.method
    return settings(Path(data), folder, **{"method": method, "init_from": str(source), "anchors": 6, **values})


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_agrees_more_and_writes_the_layout_that_it_began_from(layout: str, tmp_path: Path) -> None:
    target, data, source = deep(), write_chats(tmp_path / "chats.jsonl", 26), beginning(tmp_path / "theirs", layout)
    before = {name: weight.clone() for name, weight in target.model.state_dict().items()}
    more = {"max_steps": 30, "logging_steps": 5, "save_steps": 30, "features": "cached"}
    held = read_conversations(data).conversations[:4]
    values = going_on(data, tmp_path / "run", source, **more)
    result = quiet(target, values, measure_tau=tau_meter(target, [[1, 40, 41, 42]], 8), held_out=held)
    history = json.loads((tmp_path / "run/checkpoint-30/trainer_state.json").read_text())["log_history"]
    first = next(entry for entry in history if "loss" in entry)
    assert result.metrics["loss"] < first["loss"] - 0.05 and result.metrics["acc"] > first["acc"]
    assert result.metrics["acc"] == result.metrics["top1_slot_1"] and "top1_slot_3" in result.metrics
    assert result.tau is not None and result.tau["tau"] >= 1
    proposals = 4 if layout == "deepspec" else 3
    assert {f"held_out_top1_{i}" for i in range(1, proposals + 1)} | {"held_out_chain"} <= result.tau.keys()
    assert all(torch.equal(before[name], weight) for name, weight in target.model.state_dict().items())

    old, new = (json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "run"))
    assert {name: value for name, value in new.items() if name in old} == old
    assert set(new) - set(old) == {"method", "outdraft_version", "target", "training"}
    theirs, ours = load_file(source / "model.safetensors"), weights(tmp_path / "run")
    assert theirs.keys() == ours.keys()
    same = {name for name, weight in theirs.items() if torch.equal(weight.to(ours[name].dtype), ours[name])}
    frozen = {"embed_tokens.weight", "lm_head.weight", "d2t", "t2d", "confidence_head.proj.weight"}
    same, held_too = ({name.removeprefix("model.") for name in names} for names in (same, theirs))
    assert same == frozen & held_too

    loaded = load_dflash(tmp_path / "run")
    assert loaded.layout == layout and loaded.training["config"]["anchors"] == 6
    facts = describe(str(tmp_path / "run"), "cpu")
    assert facts["method"] == values["method"] and facts["tau_at_end_of_training"] == result.tau["tau"]
    assert f"arxiv.org/abs/{'2607.05147' if layout == 'deepspec' else '2602.06036'}" in (
        tmp_path / "run/README.md"
    ).read_text(encoding="utf-8")
    drafter = load_drafter_for(target, tmp_path / "run")
    assert isinstance(drafter, DFlash) and drafter.reads.layers == TAPS
    assert load_drafter_for(target, tmp_path / "run/checkpoint-30") is not None
    found = quiet(target, going_on(data, tmp_path / "more", tmp_path / "run", max_steps=1))
    assert found.metrics["loss"] < first["loss"] - 0.05


@pytest.mark.parametrize("layout", LAYOUTS)
def test_broken_training_resumes_to_the_same_weights(
    layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, source = write_chats(tmp_path / "chats.jsonl", 26), beginning(tmp_path / "theirs", layout)
    quiet(deep(), going_on(data, tmp_path / "whole", source))
    break_and_resume(deep, going_on(data, tmp_path / "run", source), monkeypatch)
    assert_same_bits(tmp_path / "whole", tmp_path / "run")


def test_cached_features_and_pieces_train_alike(tmp_path: Path) -> None:
    data, source = write_chats(tmp_path / "chats.jsonl", 26), beginning(tmp_path / "theirs")
    ways: dict[str, dict[str, Any]] = {
        "online": {"features": "online"},
        "cached": {"features": "cached"},
        "padded": {"features": "online", "length_groups": False, "gradient_accumulation_steps": 1},
    }
    for name, way in ways.items():
        quiet(deep(), going_on(data, tmp_path / name, source, max_steps=4, **way))
    expected = weights(tmp_path / "online")
    for name in ("cached", "padded"):
        for part, weight in weights(tmp_path / name).items():
            torch.testing.assert_close(weight, expected[part], atol=1e-3, rtol=1e-2)


@pytest.mark.parametrize("layout", ["speculators", "deepspec"])
def test_bf16_trains(layout: str, tmp_path: Path) -> None:
    data, source = write_chats(tmp_path / "chats.jsonl", 26), beginning(tmp_path / "theirs", layout)
    target = tiny_target(torch.bfloat16, layers=8)
    result = quiet(target, going_on(data, tmp_path / "run", source, max_steps=2, precision="bf16"))
    kinds = {name: weight.dtype for name, weight in weights(tmp_path / "run").items() if name.endswith("fc.weight")}
    assert 0 < result.metrics["loss"] < 100 and list(kinds.values()) == [torch.float32]


def test_a_dry_run_says_what_it_costs_and_leaves_nothing(tmp_path: Path) -> None:
    data, source = write_chats(tmp_path / "chats.jsonl", 26), beginning(tmp_path / "theirs")
    found = plan(deep(), DrafterConfig(**going_on(data, tmp_path / "run", source)))
    assert found.method == "dflash" and found.step_seconds > 0 and found.drafter_parameters > 1000
    assert not (tmp_path / "run").exists()


def test_the_doctor_reads_a_trained_folder(tmp_path: Path) -> None:
    target, data, source = deep(), write_chats(tmp_path / "chats.jsonl", 26), beginning(tmp_path / "theirs")
    quiet(target, going_on(data, tmp_path / "run", source, max_steps=2))
    assert diagnose(target, tmp_path / "run", [[1, 40, 41, 42], [1, 50, 60]]).verdict != "wrong layout"


# --- errors ----------------------------------------------------------------------------------------------------------


def test_what_cannot_be_is_refused_in_one_line(tmp_path: Path) -> None:
    source, spark = beginning(tmp_path / "theirs"), beginning(tmp_path / "spark", "deepspec")

    def refusal(target: Target | None = None, **values: Any) -> str:
        with pytest.raises(UserError) as error:
            config = DrafterConfig(**{**going_on("x", tmp_path / "run", source), **values})
            begun_from(target or deep(), config)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "takes about a million answers" in refusal(init_from=None) and "fspad-1f" in refusal(init_from=None)
    assert "takes about a million answers" in refusal(method="dspark", init_from=None)
    assert "is a 'dspark' drafter; give --method dspark" in refusal(init_from=str(spark))
    assert "num_layers 8, this one has 6" in refusal(tiny_target(layers=6))
    assert "vocab_size 260, this one has 32" in refusal(Target(model_of(hidden_size=16)))
    assert "teacher_top_k a number above 0" in refusal(teacher_top_k=0)
    assert '"block_size" is a setting of fspad-1f, not of dflash' in refusal(block_size=8)
    assert "there is no folder" in refusal(init_from=str(tmp_path / "nowhere"))
    assert "auto for dflash" in refusal(preset="paper")
