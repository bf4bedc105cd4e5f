"""EAGLE-3's training meets its decoding: the unrolled loss against the equations and against what the drafter drafts,
planted mistakes between the two, whole runs, resumption, and drafters to go on with."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from eagle3_reference import KEPT, Eagle3Shape, NaiveEagle3, eagle3_folder
from torch import Tensor

import test_losslessness as losslessness
from models import tiny
from outdraft.api.loading import load_drafter_for
from outdraft.core.dice import Dice
from outdraft.core.sampling_settings import SamplingSettings
from outdraft.core.shape import TreeShape
from outdraft.data.conversations import read_conversations
from outdraft.errors import UserError
from outdraft.losses.objective import Reading
from outdraft.methods.checkpoint import save_drafter, target_facts
from outdraft.methods.eagle3.drafter import Eagle3Drafter, Eagle3Head
from outdraft.methods.eagle3.folder import load_eagle3, official_name
from outdraft.methods.eagle3.loss import Eagle3Objective, new_head
from outdraft.methods.fspad import unrolled
from outdraft.methods.fspad.loss import FeatureObjective
from outdraft.target.target import Target
from outdraft.training.config import DrafterConfig
from outdraft.training.held_out import tau_meter
from outdraft.training.plan import plan
from test_losslessness import CHAIN, NARROW, PLAIN, PROMPT, Recorded, assert_same_law, finish, rows_of, small
from training.test_exit_training import IDS, LENGTHS, MASK, family_target
from training.test_train import assert_same_bits, break_and_resume, quiet, settings, weights
from training.tiny import tiny_target, write_chats

STEPS = 3


def eagle3(data: Path | str, folder: Path, **values: Any) -> dict[str, Any]:
    return settings(data, folder, **{"method": "eagle3", "draft_vocab_size": 40, "max_length": 128, **values})


def deep() -> Target:
    return tiny_target(layers=6)


def started(target: Target, kept: bool = True, **values: Any) -> Eagle3Objective:
    """An objective with a head of random weights in float64, its norms random too."""
    chosen = {"draft_vocab_size": len(KEPT)} if kept else {}
    config = DrafterConfig(output_dir="none", method="eagle3", unroll_steps=STEPS, preset="tiny", **chosen, **values)
    head = new_head(target, config.with_preset(10**6)).double()
    with torch.no_grad():
        if head.draft_tokens is not None:
            head.draft_tokens.copy_(torch.tensor(KEPT))
        for weight in head.parameters():
            if weight.ndim == 1:
                weight.add_(0.2 * torch.randn_like(weight))
            else:
                weight.mul_(3)  # so small and random a drafter says nearly the same everywhere
    return Eagle3Objective(target, config.with_preset(10**6), head)


def outputs(objective: Eagle3Objective, ids: Tensor, lengths: Tensor, mask: Tensor, steps: int) -> list[Tensor]:
    """For every draft step `(rows, positions, kept)` log-probabilities, as training computes them."""
    features = objective.reading(ids, lengths)
    outs, _, _ = objective.loss._unrolled(objective._embed(ids), features, mask, None, steps)
    return [objective.drafter.lm_head(out.p).log_softmax(-1) for out in outs]


def equations(objective: Eagle3Objective) -> Iterator[tuple[int, int, int, np.ndarray, np.ndarray]]:
    """For every counted row, position and step: the drafter's law and the target's, both over the whole vocabulary,
    each from its prefix alone: the drafter's in NumPy, the target's from the stock model."""
    head, model = objective.drafter, objective.target.model
    config, names = head.config, head.state_dict()
    shape = Eagle3Shape(
        intermediate_size=config.intermediate_size,
        head_dim=config.head_dim,
        rms_norm_eps=config.rms_norm_eps,
        rope_theta=config.rope["rope_theta"],
        kept=None if head.draft_tokens is None else tuple(KEPT),
        fc_norm=config.tap_norms,
        norm_output=config.norm_output,
    )
    w = {official_name(name): tensor.numpy() for name, tensor in names.items()}
    table = model.get_input_embeddings().weight.numpy()
    for row, length in enumerate(LENGTHS):
        for t in range(int(length) - 2):
            if not MASK[row, t + 2]:
                continue
            ids = IDS[row].tolist()
            wanted = model(IDS[row : row + 1, : t + 2], use_cache=False).logits[0, -1].softmax(-1).numpy()
            for step in range(min(t + 1, STEPS)):
                first = t - step + 1  # features are the target's up to here, the drafter's from here on
                hidden = model(IDS[row : row + 1, :first], output_hidden_states=True, use_cache=False).hidden_states
                taps = [hidden[tap][0].numpy() for tap in config.taps(model.config.num_hidden_layers)]
                naive = NaiveEagle3(w, shape, table, ids[1 : first + 1], taps)
                yield row, t, step, naive.law(tuple(ids[first + 1 : t + 2])), wanted


@torch.no_grad()
def assert_training_is_the_equations(objective: Eagle3Objective) -> None:
    found = outputs(objective, IDS, LENGTHS, MASK, STEPS)
    head = objective.drafter
    kept = list(range(32)) if head.draft_tokens is None else KEPT
    for row, t, step, law, _ in equations(objective):
        np.testing.assert_allclose(found[step][row, t].numpy(), law[kept], atol=1e-9)


SWITCHES: dict[str, dict[str, Any]] = {"EAGLE-3": {}, "3.1": {"state_norm": True}, "whole": {"kept": False}}


@pytest.mark.parametrize("switches", SWITCHES.values(), ids=SWITCHES)
@pytest.mark.parametrize("family", ["llama-gqa", "gemma"])
def test_every_step_of_training_is_the_equations(family: str, switches: dict[str, Any]) -> None:
    """Position by position, over a ragged batch; Gemma scales its embeddings, of which EAGLE-3 reads bare rows."""
    assert_training_is_the_equations(started(Target(tiny(family, num_hidden_layers=6)), **switches))


def seen_too_far(q: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor]) -> Tensor:
    step, length = len(keys) - 1, q.shape[2]
    mask = unrolled.unrolled_mask(length, step, q.device).view(length, step + 1, length).clone()
    mask[:, 0] |= mask.new_ones(length, length).tril(1 - step)
    wide = mask.view(1, 1, length, (step + 1) * length)
    return unrolled.grouped_attention(q, torch.cat(tuple(keys), dim=2), torch.cat(tuple(values), dim=2), wide)


MISTAKES: dict[str, Callable[[Eagle3Objective, pytest.MonkeyPatch], Any]] = {
    "a step sees one of the target's features too many": lambda _, patch: patch.setattr(
        unrolled, "banded", seen_too_far
    ),
    "layers off by one": lambda objective, _: setattr(objective, "reading", Reading(objective.target, (1, 3))),
    "positions from one on": lambda objective, patch: patch.setattr(
        objective.drafter, "rotary", lambda places, dtype: Eagle3Head.rotary(objective.drafter, places * 2, dtype)
    ),
    "scaled embeddings": lambda objective, patch: patch.setattr(Eagle3Objective, "_embed", FeatureObjective._embed),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_planted_mistake_would_be_seen(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    objective = started(Target(tiny("gemma", num_hidden_layers=6)))
    MISTAKES[mistake](objective, monkeypatch)
    with pytest.raises(AssertionError):
        assert_training_is_the_equations(objective)


@pytest.mark.parametrize("switch", ["norm_output", "norm_before_residual"])
def test_a_switch_that_decoding_has_otherwise_would_be_seen(switch: str) -> None:
    objective = started(Target(tiny("llama-gqa", num_hidden_layers=6)))
    with torch.no_grad():
        before = outputs(objective, IDS, LENGTHS, MASK, STEPS)
        setattr(objective.drafter.config, switch, True)
        after = outputs(objective, IDS, LENGTHS, MASK, STEPS)
    same_at_first = torch.allclose(before[0], after[0])
    assert same_at_first == (switch == "norm_output") and not torch.allclose(before[1], after[1])


@pytest.mark.parametrize("top_k", [32, 5, 0])
def test_the_loss_weighs_the_steps_and_leaves_out_what_is_never_drafted(top_k: int) -> None:
    """With all the target's tokens known, those outside carry no loss; with its whole distribution, that of the kept
    ones is the goal, as in the paper."""
    objective = started(Target(tiny("llama-gqa", num_hidden_layers=6)), teacher_top_k=top_k)
    totals, right, count = [0.0] * STEPS, [0] * STEPS, [0] * STEPS
    with torch.no_grad():
        for _, _, step, law, wanted in equations(objective):
            goal = wanted[KEPT] / (wanted[KEPT].sum() if top_k == 0 else 1)
            if top_k:
                goal = np.where(wanted[KEPT] >= np.sort(wanted)[-top_k], goal, 0.0)
            totals[step] -= float((goal * law[KEPT]).sum())
            right[step] += int(law.argmax() == wanted.argmax())
            count[step] += 1
    batch = {"input_ids": IDS, "loss_mask": MASK, "lengths": LENGTHS, "index": torch.arange(2)}
    features = objective.reading(IDS, LENGTHS)
    sums = objective.loss(*objective.arguments(batch, features, 0))
    decayed = np.array([0.8**step for step in range(STEPS)])
    expected = float((decayed * totals).sum() / decayed.sum())
    assert objective.total(sums).item() == pytest.approx(expected, rel=1e-6)
    assert int(sums.positions) == count[0] and sums.regression == 0
    with torch.no_grad():
        hits, spoken = objective.hits(batch, features, STEPS)
    assert (hits & spoken).sum((0, 1)).tolist() == right and spoken.sum((0, 1)).tolist() == count


@pytest.mark.parametrize("switches", SWITCHES.values(), ids=SWITCHES)
@torch.inference_mode()
def test_the_drafter_drafts_what_training_says_step_by_step(switches: dict[str, Any]) -> None:
    """Every chain of a ragged batch in decoding is the arg max of training's forward over text and chain; features
    beyond the chain's root are replaced by noise, which no unrolled step may read."""
    target = Target(tiny("llama-gqa", num_hidden_layers=6))
    objective = started(target, **switches)
    head = objective.drafter
    recorded = Recorded(Eagle3Drafter(head.eval(), target))
    prompts = [[5, 9, 9, 3, 5, 9], [1, 2, 3, 4, 1, 2, 3], [30, 8, 30]]
    chances = [Dice(i) for i in range(3)]
    finish(target, recorded, rows_of(target, prompts, SamplingSettings(), 9, chances), TreeShape.chain(4))
    compared = 0
    for prefix, proposed in recorded.proposed:
        chain = proposed.tokens[0, 1:].tolist()
        ids = torch.tensor([prefix if isinstance(prefix, list) else prefix.tolist()])
        root, ids = ids.shape[1] - 2, torch.cat([ids, torch.tensor([chain])], dim=1)
        features = objective.reading(ids, torch.tensor([ids.shape[1]]))
        features[:, root + 1 :] = torch.randn_like(features[:, root + 1 :])
        mask = torch.ones_like(ids).bool()
        outs, _, _ = objective.loss._unrolled(objective._embed(ids), features, mask, None, len(chain))
        for step, token in enumerate(chain):
            best = int(head.lm_head(outs[step].p[0, root + step]).argmax())
            assert token == (best if head.draft_tokens is None else KEPT[best])
            compared += 1
    assert compared > 30


# --- whole runs --------------------------------------------------------------------------------------------------


def test_training_agrees_more_notes_held_out_guesses_and_comes_back(tmp_path: Path) -> None:
    target, data = deep(), write_chats(tmp_path / "chats.jsonl", 26)
    before = {name: weight.clone() for name, weight in target.model.state_dict().items()}
    values = eagle3(data, tmp_path / "run", max_steps=60, logging_steps=10, save_steps=60, draft_vocab_size=200)
    held = read_conversations(data).conversations[:4]
    result = quiet(target, values, measure_tau=tau_meter(target, [[1, 40, 41, 42]], 8), held_out=held)
    history = json.loads((tmp_path / "run/checkpoint-60/trainer_state.json").read_text())["log_history"]
    first = next(entry for entry in history if "loss" in entry)
    assert result.metrics["loss"] < first["loss"] - 0.1 and result.metrics["acc"] > first["acc"]
    assert result.metrics["loss_cls"] == pytest.approx(result.metrics["loss"], rel=0.1)
    assert result.tau is not None and result.tau["tau"] >= 1
    assert {f"held_out_top1_{step}" for step in (1, 2, 3, 4)} | {"held_out_chain"} <= result.tau.keys()
    assert all(torch.equal(before[name], weight) for name, weight in target.model.state_dict().items())
    record = json.loads((tmp_path / "run" / "provenance.json").read_text())
    assert DrafterConfig(**record["config"]).method == "eagle3"
    assert record["config"]["unroll_steps"] == 4 and not {"w_reg", "embedding_scale"} & record["config"].keys()
    loaded = load_eagle3(tmp_path / "run")
    assert set(weights(tmp_path / "run")) == set(loaded.network.state_dict()) and loaded.layout == "outdraft"
    assert loaded.training["config"]["method"] == "eagle3" and "EAGLE-3" in (tmp_path / "run/README.md").read_text()
    drafter = load_drafter_for(target, tmp_path / "run")
    assert isinstance(drafter, Eagle3Drafter) and drafter.reads.layers == (2, 3)


def test_the_draft_vocabulary_is_the_most_frequent_and_its_output_begins_as_the_targets(tmp_path: Path) -> None:
    target, data = deep(), write_chats(tmp_path / "chats.jsonl", 26)
    quiet(target, eagle3(data, tmp_path / "run", max_steps=1, learning_rate=1e-12, draft_vocab_size=5))
    quiet(target, settings(data, tmp_path / "fspad", max_steps=1, draft_vocab_size=5))
    found = weights(tmp_path / "run")
    assert torch.equal(found["draft_tokens"], weights(tmp_path / "fspad")["draft_tokens"])
    rows = target.model.lm_head.weight[found["draft_tokens"]]
    torch.testing.assert_close(found["lm_head.weight"], rows, atol=1e-6, rtol=1e-6)


def test_broken_training_resumes_to_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_chats(tmp_path / "chats.jsonl", 26)
    quiet(deep(), eagle3(data, tmp_path / "whole"))
    break_and_resume(deep, eagle3(data, tmp_path / "run"), monkeypatch)
    assert_same_bits(tmp_path / "whole", tmp_path / "run")


def test_cached_features_train_alike(tmp_path: Path) -> None:
    data = write_chats(tmp_path / "chats.jsonl", 26)
    for features in ("online", "cached"):
        quiet(deep(), eagle3(data, tmp_path / features, max_steps=4, features=features))
    online, cached = weights(tmp_path / "online"), weights(tmp_path / "cached")
    for name, weight in online.items():
        torch.testing.assert_close(cached[name], weight, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("family", ["llama-tied", "gpt2", "gemma2", "granite"])
def test_every_family_trains_and_drafts(family: str, tmp_path: Path) -> None:
    """Targets of two layers, of which one can be read, and other names, norms and scales."""
    target, data = family_target(family), write_chats(tmp_path / "chats.jsonl", 26)
    result = quiet(target, eagle3(data, tmp_path / "run", max_steps=2, max_length=48, unroll_steps=2))
    assert 0 < result.metrics["loss"] < 100
    assert tau_meter(target, [[5, 6, 7], [9]], 6)(load_eagle3(tmp_path / "run").network)["tau"] >= 1


def test_the_plan_counts_the_head(tmp_path: Path) -> None:
    data = write_chats(tmp_path / "chats.jsonl", 26)
    found = plan(deep(), DrafterConfig(**eagle3(data, tmp_path / "run")))
    attention, mlp, norms = 32 * (16 + 8 + 8) + 16 * 16, 3 * 16 * 24, 4 * 16
    assert found.drafter_parameters == 2 * 16 * 16 + attention + mlp + norms + 40 * 16
    assert not (tmp_path / "run").exists()


def test_a_drafter_of_others_is_trained_on(tmp_path: Path) -> None:
    """Its shape, tokens and switches stay, whatever the data would choose."""
    target = Target(tiny("llama-gqa", num_hidden_layers=8, dtype=torch.float32, vocab_size=260), deep().tokenizer)
    data = write_chats(tmp_path / "chats.jsonl", 26)
    shape = Eagle3Shape(vocab_size=260, max_position_embeddings=128, norm_output=True)
    source = eagle3_folder(tmp_path / "theirs", "specforge", shape, (1, 4, 6))
    values = eagle3(data, tmp_path / "run", init_from=str(source), max_steps=3, max_length=64)
    del values["draft_vocab_size"]
    quiet(target, values)
    before, after = (load_eagle3(place).network for place in (source, tmp_path / "run"))
    assert after.config == before.config and after.draft_tokens.tolist() == KEPT  # type: ignore[union-attr]
    assert not torch.equal(after.fc.weight, before.fc.weight)
    with pytest.raises(UserError, match="draft_vocab_size is that of the drafter in"):
        quiet(target, {**values, "output_dir": str(tmp_path / "no"), "draft_vocab_size": 9})


def test_what_cannot_be_trained_is_refused(tmp_path: Path) -> None:
    config = DrafterConfig(output_dir=tmp_path, method="eagle3")
    with pytest.raises(UserError, match="has a single layer"):
        new_head(Target(tiny("llama-gqa", num_hidden_layers=1)), config)
    with pytest.raises(UserError, match="in rising order"):
        new_head(deep(), DrafterConfig(output_dir=tmp_path, method="eagle3", tap_layers=[4, 2]))
    with pytest.raises(UserError, match='"w_reg" is a setting of fspad, eagle and fspad-1f, not of eagle3'):
        DrafterConfig(output_dir=tmp_path, method="eagle3", w_reg=1.0)
    for damage in ({"rope": 3}, {"tap_unit": 4}, {"norm_output": "yes"}):
        folder = save_drafter(
            tmp_path / "d", new_head(deep(), config), target_id="t", target=target_facts(deep().model)
        )
        found = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**found, **damage}))
        with pytest.raises(UserError, match=next(iter(damage))):
            load_eagle3(folder)


# --- the law of a trained head -----------------------------------------------------------------------------------


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> str:
    """A head that a few steps of its own objective have trained on the small target; all tokens but the first."""

    def build(target: Target, _: Any) -> Eagle3Drafter:
        vocab = target.vocab_size
        config = DrafterConfig(output_dir="none", method="eagle3", draft_vocab_size=vocab - 1, unroll_steps=2)
        head = new_head(target, config).double()
        head.draft_tokens.copy_(torch.arange(1, vocab))  # type: ignore[union-attr]
        objective = Eagle3Objective(target, config, head)
        optimizer = torch.optim.Adam(head.parameters(), lr=0.02)
        ids = torch.randint(vocab, (8, 12), generator=torch.Generator().manual_seed(1))
        batch = {"input_ids": ids, "loss_mask": ids >= 0, "lengths": torch.full((8,), 12), "index": torch.arange(8)}
        losses = []
        for step in range(15):
            sums = objective.loss(*objective.arguments(batch, objective.reading(ids, batch["lengths"]), step))
            optimizer.zero_grad()
            objective.total(sums).backward()
            optimizer.step()
            losses.append(float(sums.token.detach()))
        assert losses[-1] < losses[0]
        return Eagle3Drafter(head.eval(), target)

    monkeypatch.setitem(losslessness.DRAFTERS, "trained", build)
    return "trained"


def test_a_trained_head_keeps_the_law(trained: str) -> None:
    for shape in (CHAIN, TreeShape(1, 2, 5)):
        assert_same_law(trained, 3, PROMPT, PLAIN, 3, shape)
    statistics = assert_same_law(trained, 4, (0, 2, 1, 3), NARROW, 2, TreeShape(1, 2, 5, "sampled"))
    assert 0 < statistics.accepted < statistics.drafted


def test_batched_rows_equal_single_rows(trained: str) -> None:
    target = Target(small(4)[0])
    drafter = losslessness.DRAFTERS[trained](target, small(4)[1])
    prompts = [[0, 2, 1, 3], [1, 1], [3, 2, 0, 0, 1, 2, 3]]
    for temperature, shape in ((0.0, TreeShape(2, 2, 7)), (1.0, TreeShape.chain(3, candidates="sampled"))):
        plain = SamplingSettings(temperature=temperature)
        together = finish(target, drafter, rows_of(target, prompts, plain, 12, [Dice(i) for i in range(3)]), shape)
        for i, (prompt, row) in enumerate(zip(prompts, together, strict=True)):
            (alone,) = finish(target, drafter, rows_of(target, [prompt], plain, 12, [Dice(i)]), shape)
            assert alone.tokens == row.tokens and alone.statistics.accepted == row.statistics.accepted
