"""Turns are taken fairly, and figures are what their names say."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from outdraft.api.generation import SpeculativeModel
from outdraft.console.generate import stream
from outdraft.core.statistics import Statistics
from outdraft.evaluation.bench.measure import PLAIN, Answer, Contender, Run, compare, speculative
from outdraft.evaluation.bench.methods import BenchSettings, contenders
from outdraft.evaluation.bench.summary import interval, summarise
from outdraft.methods.draft_model.drafter import DraftModel
from outdraft.methods.fspad.beginning import feature_head_config
from outdraft.methods.fspad.drafter import FeatureDrafter
from outdraft.methods.fspad.network import FeatureHead
from outdraft.methods.prompt_lookup.drafter import PromptLookup
from outdraft.target.target import Target
from training.tiny import tiny_target

PROMPTS = [[10, 20, 30], [40, 50, 60, 70]]


@pytest.fixture(scope="module")
def target() -> Target:
    return tiny_target(torch.float64)


def new_head(target: Target) -> FeatureHead:
    torch.manual_seed(3)
    return FeatureHead(feature_head_config(target))


def test_every_contender_decodes_every_prompt_and_each_goes_first_in_turn() -> None:
    order: list[tuple[str, int, int]] = []

    def contender(name: str) -> Contender:
        def decode(prompt: list[int], settings: dict[str, Any]) -> Answer:
            order.append((name, prompt[0], settings["seed"]))
            return Answer([1], 1.0, Statistics())

        return Contender(name, decode, "none")

    rivals = [contender(name) for name in "abc"]
    runs = compare(rivals, PROMPTS, repetitions=3, seed=5)
    warm_up, counted = order[:3], order[3:]
    assert [name for name, *_ in warm_up] == ["a", "b", "c"]
    assert [name for name, *_ in counted[::3]] == ["a", "b", "c", "a", "b", "c"]
    for turn in range(6):
        together = counted[3 * turn : 3 * turn + 3]
        assert {name for name, *_ in together} == {"a", "b", "c"}
        assert len({(prompt, seed) for _, prompt, seed in together}) == 1
    for own in runs.values():
        assert [(run.prompt, run.repetition) for run in own] == [(p, r) for p in range(2) for r in range(3)]


def test_all_greedy_contenders_say_the_same(target: Target) -> None:
    rivals = [
        *contenders(target, BenchSettings("", include_transformers=True)),
        speculative("head", target, FeatureDrafter(new_head(target).double(), target)),
    ]
    runs = compare(rivals, PROMPTS, max_new_tokens=12)
    texts = {name: [run.answer.tokens for run in own] for name, own in runs.items()}
    assert list(texts) == [PLAIN, "transformers generate", "prompt-lookup", "head"]
    for name, own in texts.items():
        assert own == texts[PLAIN], name
    assert runs["head"][0].answer.statistics.drafted > 0


def fake_runs(seconds: list[float], tokens: int = 11) -> list[Run]:
    counts = Statistics(rounds=5, emitted=tokens - 1, drafted=20, accepted=5, prefill_seconds=0.5, verify_seconds=2.0)
    return [Run(i, 0, Answer([1] * tokens, s, counts)) for i, s in enumerate(seconds)]


def test_speedup_is_the_median_of_paired_ratios() -> None:
    plain, own = fake_runs([10.0, 20.0, 30.0]), fake_runs([5.0, 5.0, 20.0])
    found = summarise("x", "fspad", 7, own, plain, [])
    assert found.speedup == 2.0
    low, high = found.speedup_interval
    assert 1.5 <= low <= 2.0 <= high <= 4.0
    assert found.tokens_per_second == 33 / 30
    assert found.decode_tokens_per_second == 30 / 6
    assert found.first_token_seconds == 0.5
    assert found.statistics.tau == 2.0
    assert found.identical is True
    assert set(found.headline()) == {"tau", "tokens_per_second", "speedup", "identical"}
    assert summarise("x", "fspad", 7, own, plain, None).identical is None


def test_intervals_draw_the_repetitions_of_a_prompt_together() -> None:
    ratios = np.array([1.0, 1.0, 1.0, 3.0, 3.0, 3.0])
    assert interval(ratios, [0, 0, 0, 1, 1, 1]) == (1.0, 3.0)
    assert interval(np.full(6, 2.0), range(6)) == (2.0, 2.0)


def test_streamed_figures_equal_those_of_generate(target: Target) -> None:
    for drafter in (
        None,
        PromptLookup(),
        DraftModel(target, target),
        FeatureDrafter(new_head(target).double(), target),
    ):
        for count in (1, 2, 9, 14):
            model = SpeculativeModel(target, drafter)
            expected = model.generate(PROMPTS[0], max_new_tokens=count)
            streamed = stream(model.stream(PROMPTS[0], max_new_tokens=count), Console(file=io.StringIO()))
            assert streamed.accepted == expected.accepted[0]
            assert streamed.finish_reason == expected.finish_reasons[0]
            assert streamed.tau == pytest.approx(expected.tau, nan_ok=True)
