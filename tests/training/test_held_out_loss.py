"""What is measured on held-out conversations is what decoding would do, and the weights that did best are saved."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor
from transformers import DynamicCache

from outdraft.data.conversations import Conversation, read_conversations
from outdraft.data.tokenization import Example, ExampleSet, tokenize
from outdraft.losses.objective import TrainingExamples, collate
from outdraft.methods.checkpoint import Network
from outdraft.methods.fspad.beginning import keep_frequent
from outdraft.methods.fspad.loss import FeatureObjective
from outdraft.methods.fspad.network import FeatureHead
from outdraft.target.target import Target
from outdraft.training.config import DrafterConfig
from outdraft.training.held_out import CHAIN, STEPS, BestWeights, HeldOut, Hits
from outdraft.training.preparation import new_drafter, objective_for
from outdraft.training.train import train
from outdraft.training.trainer import ObjectiveTrainer

from .test_train import assert_same_bits, log, quiet, settings, weights
from .tiny import tiny_target, write_chats

METHODS: dict[str, dict[str, Any]] = {
    "fspad": {},
    "whole distribution": {"teacher_top_k": 0},
    "draft vocabulary": {"draft_vocab_size": 14},
    "taps": {"tap_layers": [1, 3], "state_norm": True},
}


def knowing_drafter(target: Target, config: DrafterConfig, examples: ExampleSet) -> FeatureHead:
    """One that hits now and then: made to say what the target says of the feature it reads, but for some noise."""
    drafter = new_drafter(target, config)
    assert isinstance(drafter, FeatureHead)
    keep_frequent(drafter, examples)
    return drafter.double().eval()


def step_by_step(target: Target, drafter: FeatureHead, example: Example) -> dict[tuple[int, int], bool]:
    """(position, step) -> whether the chain from there hits with this step: one token a time over a real cache."""
    ids, found = example.input_ids.long()[None], {}
    layers = list(drafter.config.tap_layers)
    kept = drafter.draft_tokens
    with torch.no_grad():
        out = target.model(ids, use_cache=False, output_hidden_states=True)
        read = torch.cat([out.hidden_states[-1], *(out.hidden_states[layer] for layer in layers)], dim=-1)
        embedded = target.embed(ids)
        for start in range(len(example) - 2):
            cache = DynamicCache()
            here = torch.arange(start + 1)[None]
            said = drafter(embedded[:, 1 : start + 2], read[:, : start + 1], here, None, cache)
            for step in range(STEPS):
                place = start + step  # stands for the feature one further, from which the target says the token after
                if place + 2 >= len(example):
                    break
                if step:
                    at = torch.tensor([[place]])
                    said = drafter(embedded[:, place + 1 : place + 2], said.r[:, -1:], at, None, cache)
                logits = target.head(said.p[0, -1])
                guess = int(logits.argmax() if kept is None else kept[logits[kept].argmax()])
                found[start, step] = guess == int(out.logits[0, place + 1].argmax())
    return found


@pytest.mark.parametrize("method", METHODS)
def test_agreement_is_what_a_loop_of_draft_steps_finds(method: str, chats: Path) -> None:
    target = tiny_target(torch.float64, layers=4)
    examples = tokenize(read_conversations(chats), target.tokenizer, 128)
    config = DrafterConfig(data="none", output_dir="none", **METHODS[method])
    drafter = knowing_drafter(target, config, examples)
    few = ExampleSet(examples.examples[:5])
    # So random a drafter never hits: the target is made to say few things, among which chance decides.
    with torch.no_grad():
        head = target.model.lm_head.weight
        common = keep_of(examples)
        head[[token for token in range(260) if token not in common]] *= 0.01
    objective = FeatureObjective(target, config, drafter)
    by_hand = [step_by_step(target, objective.finished(), example) for example in few.examples]
    right, count, chains = [0] * STEPS, [0] * STEPS, []
    for example, found in zip(few.examples, by_hand, strict=True):
        for (start, step), hit in found.items():
            if example.loss_mask[start + step + 2]:
                count[step] += 1
                right[step] += hit
        for start in range(len(example) - 2):
            tokens = range(start + 2, start + 2 + STEPS)
            if tokens.stop > len(example) or not all(example.loss_mask[token] for token in tokens):
                continue
            length = 1
            while length <= STEPS and found[start, length - 1]:
                length += 1
            chains.append(length)
    measured = HeldOut(objective, few).measure()
    assert 0 < sum(right) < sum(count) and len(set(chains)) > 1
    for step in range(STEPS):
        assert measured[f"held_out_top1_{step + 1}"] == pytest.approx(right[step] / count[step], abs=1e-7)
    assert measured[CHAIN] == pytest.approx(sum(chains) / len(chains), rel=1e-6)
    data = TrainingExamples(few)
    batch = collate([data[i] for i in range(5)])
    hits, spoken = objective.hits(batch, objective.reading(batch["input_ids"], batch["lengths"]), STEPS)
    for row, (example, found) in enumerate(zip(few.examples, by_hand, strict=True)):
        for (start, step), hit in found.items():
            assert bool(spoken[row, start + step, step]) == bool(example.loss_mask[start + step + 2])
            assert not spoken[row, start + step, step] or bool(hits[row, start + step, step]) == hit
    assert Hits(hits, spoken).chains().tolist() == chains


def keep_of(examples: ExampleSet) -> set[int]:
    """The three most frequent tokens of the responses."""
    responses = torch.cat([example.input_ids[example.loss_mask] for example in examples.examples]).long()
    return set(torch.bincount(responses).topk(3).indices.tolist())


def test_chains_end_at_the_first_miss_and_stay_within_the_response() -> None:
    spoken = torch.ones(1, 5, 3, dtype=torch.bool)
    spoken[0, 4:] = False
    spoken[0, 0, 1:] = spoken[0, 1, 2:] = False
    hits = torch.zeros(1, 5, 3, dtype=torch.bool)
    hits[0, 0, 0] = hits[0, 1, 1] = hits[0, 2, 2] = True  # three in a row from position 0
    hits[0, 2, 1] = True  # after a miss at position 1: worth nothing
    assert Hits(hits, spoken).chains().tolist() == [4, 1]
    assert Hits(hits[:, :2], spoken[:, :2]).chains().tolist() == []


def test_responses_too_short_for_a_chain_give_agreement_alone(target: Target) -> None:
    config = DrafterConfig(data="none", output_dir="none")
    mask = torch.tensor([False, False, True, True])
    short = ExampleSet([Example(torch.tensor([5, 6, 7, 8], dtype=torch.int32), mask)])
    found = HeldOut(objective_for(target, config), short).measure()
    assert set(found) == {f"held_out_top1_{step}" for step in range(1, STEPS + 1)}


def test_a_method_whose_guesses_are_not_looked_at_measures_nothing(target: Target, chats: Path) -> None:
    examples = tokenize(read_conversations(chats), target.tokenizer, 128)
    config = DrafterConfig(data="none", output_dir="none", method="eesd", exit_layer=1)
    assert HeldOut(objective_for(target, config), examples).measure() == {}


def test_a_run_logs_agreement_on_what_is_held_out(chats: Path, tmp_path: Path) -> None:
    held_out = read_conversations(write_chats(tmp_path / "held.jsonl", 9, seed=5)).conversations
    said = io.StringIO()
    config = DrafterConfig(**settings(chats, tmp_path / "run", max_steps=6, eval_steps=3, save_steps=6))
    result = train(tiny_target(), config, held_out=held_out, console=Console(file=said, width=250))
    assert result.tau is not None and 1 <= result.tau[CHAIN] <= 1 + STEPS
    state = json.loads((tmp_path / "run/checkpoint-6/trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"] if CHAIN in entry] == [3]
    assert "held_out_top1_1 0." in said.getvalue() and f"{CHAIN} 1." in said.getvalue()
    assert json.loads((tmp_path / "run/provenance.json").read_text())["tau"] == result.tau


def test_held_out_conversations_that_are_too_long_are_not_measured(chats: Path, tmp_path: Path) -> None:
    long = Conversation("x:1", ({"role": "user", "content": "red " * 99}, {"role": "assistant", "content": "blue"}))
    unanswered = Conversation("x:2", ({"role": "user", "content": "red"},))
    values = settings(chats, tmp_path / "run", max_steps=2, save_steps=2)
    result = quiet(tiny_target(), values, held_out=[long, unanswered], measure_tau=lambda drafter: {"tau": 1.5})
    assert result.tau == {"tau": 1.5}


class Script:
    """Says of a drafter what was written down for that step, and keeps its weights."""

    def __init__(self, chains: list[float]):
        self.chains, self.seen = chains, []

    def __call__(self, drafter: Network) -> dict[str, float]:
        self.seen.append({name: weight.clone() for name, weight in drafter.state_dict().items()})
        return {"tau": 2.0, CHAIN: self.chains[min(len(self.seen), len(self.chains)) - 1]}


def assert_holds(folder: Path, expected: dict[str, Tensor]) -> None:
    found = weights(folder)
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def test_the_weights_that_did_best_are_the_ones_that_are_saved(chats: Path, tmp_path: Path) -> None:
    script, said = Script([1.5, 3.0, 2.0, 1.0]), io.StringIO()
    config = DrafterConfig(**settings(chats, tmp_path / "run", max_steps=8, eval_steps=2))
    result = train(tiny_target(), config, measure_tau=script, console=Console(file=said, width=200))
    assert len(script.seen) == 5  # at 2, 4, 6, the end, and again with the weights of step 4
    assert_holds(tmp_path / "run", script.seen[1])
    assert any(not torch.equal(script.seen[1][name], script.seen[3][name]) for name in script.seen[1])
    assert "the weights of step 4 did best on what is held out: they are saved" in said.getvalue()
    assert result.steps == 8


def test_last_weights_that_are_as_good_are_kept(chats: Path, tmp_path: Path) -> None:
    script, said = Script([2.0, 2.0, 2.0, 2.0]), io.StringIO()
    config = DrafterConfig(**settings(chats, tmp_path / "run", max_steps=8, eval_steps=2))
    train(tiny_target(), config, measure_tau=script, console=Console(file=said, width=200))
    assert_holds(tmp_path / "run", script.seen[3])
    assert "did best" not in said.getvalue()


def test_the_best_weights_survive_an_interruption(chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = settings(chats, tmp_path / "run", max_steps=8, eval_steps=2)
    compute, first = ObjectiveTrainer.compute_loss, Script([1.5, 3.0, 2.0])

    def breaking(self: ObjectiveTrainer, *args: Any, **more: Any) -> Any:
        if self.state.global_step == 7:
            raise MemoryError
        return compute(self, *args, **more)

    with monkeypatch.context() as patch:
        patch.setattr(ObjectiveTrainer, "compute_loss", breaking)
        with pytest.raises(MemoryError):
            quiet(tiny_target(), values, measure_tau=first)
    last = Script([1.0])
    quiet(tiny_target(), values, resume=True, measure_tau=last)
    assert len(last.seen) == 2  # the end, and the weights that are saved
    assert_holds(tmp_path / "run", first.seen[1])


def test_a_new_run_knows_nothing_of_an_older_ones_best(tmp_path: Path) -> None:
    layer = torch.nn.Linear(2, 2)
    BestWeights(tmp_path, layer).note(9.0, 10)
    fresh = BestWeights(tmp_path, layer)
    assert fresh.score < 0 and not fresh.note(1.0, 5) and fresh.step == 5
    resumed = BestWeights(tmp_path, layer)
    resumed.resume()
    assert (resumed.score, resumed.step) == (1.0, 5)
    (tmp_path / "best.json").write_text('{"sc')
    resumed.resume()
    assert resumed.score < 0


def test_training_ends_after_so_many_measurements_without_a_better_one(chats: Path, tmp_path: Path) -> None:
    script = Script([1.5, 3.0, 2.0, 2.9, 9.0])
    values = settings(chats, tmp_path / "run", max_steps=11, eval_steps=1, patience=2, save_steps=100)
    result = quiet(tiny_target(), values, measure_tau=script)
    assert result.steps == 4 and (tmp_path / "run/checkpoint-4").is_dir()
    assert json.loads((tmp_path / "run/provenance.json").read_text())["steps"] == 4
    assert len(script.seen) >= 5  # four measurements and the end's own


def test_a_measurement_that_a_resumed_run_makes_again_does_not_try_its_patience(tmp_path: Path) -> None:
    layer = torch.nn.Linear(2, 2)
    best = BestWeights(tmp_path, layer, patience=2)
    assert [best.note(score, step) for score, step in ((3.0, 4), (2.0, 6))] == [False, False]
    resumed = BestWeights(tmp_path, layer, patience=2)
    resumed.resume()
    assert [resumed.note(score, step) for score, step in ((3.0, 4), (2.0, 6), (2.5, 8))] == [False, False, True]
    assert (resumed.score, resumed.step) == (3.0, 4)


def test_measuring_changes_no_weight_and_hides_no_loss(chats: Path, tmp_path: Path) -> None:
    held_out = read_conversations(write_chats(tmp_path / "held.jsonl", 3, seed=5)).conversations
    quiet(tiny_target(), settings(chats, tmp_path / "plain"))
    quiet(tiny_target(), settings(chats, tmp_path / "measured", eval_steps=1), held_out=held_out)
    losses = [[entry["loss"] for entry in log(tmp_path / name)] for name in ("plain", "measured")]
    assert losses[0] == losses[1] and len(losses[0]) == 11
    assert_same_bits(tmp_path / "plain/checkpoint-11", tmp_path / "measured/checkpoint-11")


def test_weights_of_an_abandoned_run_are_not_those_of_the_next_in_its_folder(chats: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    left = BestWeights(folder, torch.nn.Linear(2, 2))
    left.note(9.0, 400)
    script = Script([1.5, 3.0, 2.0, 1.0])
    quiet(tiny_target(), settings(chats, folder, max_steps=8, eval_steps=2), measure_tau=script)
    assert_holds(folder, script.seen[1])


def test_a_run_out_of_patience_is_finished_when_it_is_resumed(chats: Path, tmp_path: Path) -> None:
    values = settings(chats, tmp_path / "run", max_steps=20, eval_steps=2, patience=2)
    first = quiet(tiny_target(), values, measure_tau=Script([3.0, 2.0, 2.0]))
    assert first.steps == 6
    script = Script([2.0])
    again = quiet(tiny_target(), values, resume=True, measure_tau=script)
    assert again.steps == 6 and len(script.seen) == 2  # the last weights and the best ones
