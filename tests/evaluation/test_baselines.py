"""The stock library's own methods: the same text, counted by our rules, and nothing of the model left changed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from cli_fixtures import Folders
from outdraft.errors import UserError
from outdraft.evaluation.bench import baselines as module
from outdraft.evaluation.bench.baselines import peers
from outdraft.evaluation.bench.measure import PLAIN, compare, speculative
from outdraft.evaluation.bench.methods import BenchSettings, contenders
from outdraft.evaluation.bench.summary import summarise
from outdraft.target.target import Target
from training.tiny import tiny_target

PROMPTS = [[10, 20, 30, 10, 20, 30, 10], [40, 50, 60, 70]]
ALL = ["generate", "prompt-lookup=3", "assistant", "early-exit=2"]


@pytest.fixture(scope="module")
def target() -> Target:
    return tiny_target(torch.float32, layers=3)


def test_peers_say_what_plain_greedy_decoding_says(target: Target) -> None:
    rivals = [speculative(PLAIN, target, None), *peers(ALL, target, [target], None)]
    runs = compare(rivals, PROMPTS, max_new_tokens=40)
    expected = [run.answer.tokens for run in runs[PLAIN]]
    assert [rival.name for rival in rivals[1:]] == [
        "transformers generate",
        "transformers prompt-lookup",
        "transformers assistant",
        "transformers early-exit 2",
    ]
    for name, own in runs.items():
        assert [run.answer.tokens for run in own] == expected, name
        summary = summarise(name, "x", 0, own, runs[PLAIN], [])
        counts = summary.statistics
        assert sum(counts.lengths) + counts.rounds == counts.emitted and len(counts.lengths) == counts.rounds
        assert summary.first_token_seconds > 0 and summary.decode_tokens_per_second > 0
        for run in own:
            assert len(run.answer.accepted) == len(run.answer.tokens)
    taus = {name: summarise(name, "x", 0, own, runs[PLAIN], []).statistics.tau for name, own in runs.items()}
    assert taus["transformers generate"] == 1
    assert taus["transformers assistant"] >= 1.5, "its assistant is the target itself"
    assert min(taus.values()) >= 1 and taus["transformers early-exit 2"] > 1


def test_sampled_answers_repeat_by_seed_and_leave_the_global_dice_alone(target: Target) -> None:
    for peer in peers(ALL, target, [target], None):
        settings: dict[str, Any] = {"max_new_tokens": 12, "temperature": 1.0, "seed": 5}
        before = torch.get_rng_state()
        first, second = (peer.decode(PROMPTS[0], settings).tokens for _ in range(2))
        assert first == second and torch.equal(before, torch.get_rng_state()), peer.name
        assert peer.decode(PROMPTS[0], {**settings, "seed": 6}).tokens != first


def test_settings_of_the_model_s_own_config_hold_for_peers_as_for_ours(target: Target) -> None:
    model = copy.deepcopy(target.model)
    model.generation_config.update(do_sample=True, top_k=1, temperature=0.01, repetition_penalty=3.0)
    filtered = Target(model, target.tokenizer)
    settings: dict[str, Any] = {"max_new_tokens": 12, "temperature": 0.0, "seed": 5}
    with pytest.warns(UserWarning, match="repetition_penalty"):
        ours = speculative("ours", filtered, None).decode(PROMPTS[0], settings).tokens
    assert ours != speculative("ours", target, None).decode(PROMPTS[0], settings).tokens, "there is a difference"
    for peer in peers(ALL, filtered, [filtered], None):
        assert peer.decode(PROMPTS[0], settings).tokens == ours
        assert peer.decode(PROMPTS[0], {**settings, "temperature": 1.0}).tokens == ours, "top_k 1 leaves one token"
    assert model.generation_config.top_k == 1, "put back"


def test_an_interrupted_early_exit_leaves_the_model_whole(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    (peer,) = peers(["early-exit=1"], target, [], None)

    def interrupted(*args: Any, **settings: Any) -> None:
        target.model.config.num_hidden_layers = 1
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(type(target.model), "generate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            peer.decode(PROMPTS[0], {"max_new_tokens": 4})
    assert target.model.config.num_hidden_layers == 3


def test_models_without_an_early_exit_are_refused(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    inner: Any = target.model.base_model
    whole = inner.forward

    def all_layers(*args: Any, **settings: Any) -> Any:
        inner.config.num_hidden_layers = 3
        return whole(*args, **settings)

    monkeypatch.setattr(inner, "forward", all_layers)
    with pytest.raises(UserError, match="runs all of its layers"):
        peers(["early-exit=2"], target, [], None)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (["medusa"], "unknown peer 'medusa'"),
        (["generate=2"], "unknown peer"),
        (["early-exit"], "unknown peer"),
        (["early-exit=3"], "3 layers"),
        (["early-exit=0"], "at least 1"),
        (["prompt-lookup=x"], "at least 1"),
        (["assistant"], "assistant=PATH"),
        (["prompt-lookup=2", "prompt-lookup=3"], "twice"),
    ],
    ids=str,
)
def test_peers_that_cannot_be(target: Target, asked: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        peers(asked, target, [], None)


def test_assistants_come_from_drafters_or_folders(folders: Folders) -> None:
    from outdraft.api.loading import load_target

    target = load_target(folders.target, dtype="float32")
    named = ["plain", "transformers assistant", "prompt-lookup", "small", "small+lookup"]
    found = contenders(target, BenchSettings("", [f"small={folders.small_model}"], peers=["assistant"]))
    assert [contender.name for contender in found] == named
    (given,) = peers([f"assistant={folders.small_model}"], target, [], "eager")
    assert given.parameters == found[1].parameters > 0
    assert (
        given.decode([5, 6, 7], {"max_new_tokens": 8}).tokens
        == found[0].decode([5, 6, 7], {"max_new_tokens": 8}).tokens
    )


def test_counts_of_rounds_are_ours() -> None:
    rounds = module._Rounds()
    for count in (5, 1, 3, 2):  # the prompt, then what the forwards emitted
        rounds.put(torch.zeros(count))
    found, accepted = module.counted(rounds.emitted, tokens=6, prefill=1.0, seconds=3.0)
    assert (found.rounds, found.emitted, found.accepted, found.lengths) == (2, 5, 3, [2, 1])
    assert (found.prefill_seconds, found.rest_seconds) == (1.0, 2.0)
    assert accepted == [False, True, True, False, True, False]
