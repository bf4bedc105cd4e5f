"""Lookahead decoding: what its window computes and its pool keeps, and that none of it changes what comes out.

Greedy texts, batches and controllers are tested with all drafters'. The expected window is made one guess at a time, by
the stock model on whole sequences.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import pytest
import torch
from outdraft_lookahead import LOOKAHEAD
from outdraft_lookahead.drafter import Lookahead, cycled, merged

from enumeration import ScriptedChance, distance, law_of
from models import tiny
from outdraft.api.loading import load_drafter_for
from outdraft.control import CONTROLLERS
from outdraft.core.dice import Dice
from outdraft.core.sampling_settings import SamplingSettings
from outdraft.core.shape import TreeShape
from outdraft.core.statistics import Statistics
from outdraft.errors import UserError
from outdraft.methods import registry
from outdraft.methods.registry import register
from outdraft.target.target import Target
from test_control_of_decoding import controlled
from test_losslessness import (
    EXACT,
    GREEDY,
    NARROW,
    PLAIN,
    PROMPTS,
    SHAPED,
    Recorded,
    expected_law,
    finish,
    pair,
    rows_of,
    small,
    stock_greedy,
)

TREE = TreeShape(2, 3, 7)


def law(
    drafter: Lookahead,
    settings: SamplingSettings,
    length: int,
    shape: TreeShape,
    name: str | None = None,
    vocab: int = 3,
) -> tuple[dict, Statistics]:
    target = Target(small(vocab)[0])
    everything: list[Statistics] = []

    def run(new_chance: Callable[[], ScriptedChance]) -> tuple[int, ...]:
        rows = rows_of(target, [(0, 2, 1)], settings, length, [new_chance()], (1,))
        (row,) = finish(target, drafter, controlled(rows, name, shape) if name else rows, shape)
        everything.append(row.statistics)
        return tuple(row.tokens)

    return law_of(run), Statistics.sum(everything)


@pytest.mark.parametrize("shape", [TreeShape.chain(2), TREE], ids=["chain", "tree"])
@pytest.mark.parametrize("ngram", [2, 3])
@pytest.mark.parametrize("settings", [PLAIN, SHAPED, NARROW, GREEDY], ids=["plain", "shaped", "top-k", "greedy"])
def test_the_law_is_kept(settings: SamplingSettings, ngram: int, shape: TreeShape) -> None:
    found, statistics = law(Lookahead(window=3, ngram=ngram, pool=2), settings, 5, shape)
    assert distance(found, expected_law(small(3)[0], (0, 2, 1), settings, 5, (1,))) < EXACT
    if settings is PLAIN:
        assert 0 < statistics.accepted < statistics.drafted


@pytest.mark.parametrize("name", CONTROLLERS)
def test_the_law_is_kept_under_every_controller(name: str) -> None:
    found, statistics = law(Lookahead(window=3, ngram=3, pool=2), NARROW, 5, TREE, name)
    assert distance(found, expected_law(small(3)[0], (0, 2, 1), NARROW, 5, (1,))) < EXACT
    assert statistics.drafted > 0


@torch.inference_mode()
def expected_trees(
    drafter: Lookahead, model: torch.nn.Module, prompt: list[int], rounds: list[list[int]]
) -> list[dict]:
    """The pool after every round, whose roots were the last tokens of these prefixes."""

    def said(text: list[int]) -> int:
        return int(model(torch.tensor([text]), use_cache=False).logits[0, -1].argmax())

    steps = [[prompt[i % len(prompt)] for i in range(drafter.window)]]
    pool: dict[int, list[tuple[int, ...]]] = defaultdict(list)
    pools = []
    for prefix in rounds:
        new = [said(prefix + steps[0][: i + 1] + [step[i] for step in steps[1:]]) for i in range(drafter.window)]
        steps.append(new)
        if len(steps) == drafter.ngram:
            for i in range(drafter.window):
                first, rest = steps[0][i], tuple(step[i] for step in steps[1:])
                pool[first] = [*(kept for kept in pool[first] if kept != rest), rest][-drafter.pool :]
            steps = steps[1:]
        pools.append({first: list(kept) for first, kept in pool.items()})
    return pools


@pytest.mark.parametrize("family", ["llama-gqa", "gpt2", "gemma2", "mistral-sliding"])
@pytest.mark.parametrize("ngram", [2, 3, 4])
def test_candidates_are_the_n_grams_of_jacobi_iteration(family: str, ngram: int) -> None:
    """In a ragged batch; the sliding window hides old tokens from far guesses, too."""
    model = pair(family)[0]
    target, drafter = Target(model), Lookahead(window=5, ngram=ngram, pool=2)
    recorded = Recorded(drafter)
    rows = finish(target, recorded, rows_of(target, PROMPTS, GREEDY, 16, [Dice(0)] * 4), TreeShape(5, 2, 20))
    assert sum(row.statistics.accepted for row in rows) > 0
    drafted = 0
    for prompt in PROMPTS:
        own = [(p, tree) for p, tree in recorded.proposed if p[: len(prompt)] == prompt and is_row(p, prompt, rows)]
        pools = expected_trees(drafter, model, prompt, [prefix for prefix, _ in own])
        before: dict[int, list[tuple[int, ...]]] = {}
        for (prefix, tree), after in zip(own, pools, strict=True):
            wanted = merged(torch.tensor(prefix[-1:]), [before.get(prefix[-1], [])[::-1]], 20)
            count = tree.counts[0]
            assert tree.tokens[0, :count].tolist() == wanted.tokens[0].tolist()
            assert tree.parents[0, :count].tolist() == wanted.parents[0].tolist()
            drafted += count - 1
            before = after
    assert drafted > 0


def is_row(prefix: list[int], prompt: list[int], rows: list) -> bool:
    """Whether the prefix is one of that prompt's row."""
    tokens = next(row.tokens for row in rows if row.prompt == prompt)
    return prefix == prompt + tokens[: len(prefix) - len(prompt)]


@pytest.mark.parametrize("settings", [PLAIN, SHAPED, GREEDY], ids=["plain", "shaped", "greedy"])
def test_the_window_changes_nothing_that_verification_sees(settings: SamplingSettings) -> None:
    """The same dice, with candidates that are never there: plain decoding's tokens."""

    class Mute(Lookahead):
        def begin(self, prompts, run):
            state = super().begin(prompts, run)
            for row in state.rows:
                row.candidates = lambda token, shape: []  # type: ignore[method-assign]
            return state

    target = Target(pair("llama-gqa")[0])
    plain = finish(
        target, None, rows_of(target, PROMPTS, settings, 12, [Dice(i) for i in range(4)]), TreeShape(0, 1, 1)
    )
    mute = finish(target, Mute(5, 3, 2), rows_of(target, PROMPTS, settings, 12, [Dice(i) for i in range(4)]), TREE)
    assert [row.tokens for row in mute] == [row.tokens for row in plain]
    assert sum(row.statistics.drafted for row in mute) == 0


def test_a_repeating_text_is_drafted_far() -> None:
    """A target that goes round in a circle is guessed right as soon as the window has been round once."""
    model = tiny("llama-gqa", vocab_size=6, num_hidden_layers=1)
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            parameter.zero_()  # what is left reads the last token only
        torch.nn.init.eye_(model.model.embed_tokens.weight)
        model.model.norm.weight.fill_(1)
        model.lm_head.weight.zero_()
        for token in range(6):
            model.lm_head.weight[(token + 1) % 6, token] = 1
    target = Target(model)
    (row,) = finish(
        target, Lookahead(6, 4, 4), rows_of(target, [[0, 1, 2]], GREEDY, 50, [Dice(0)]), TreeShape(2, 4, 13)
    )
    assert row.tokens == [(3 + i) % 6 for i in range(50)]
    assert row.statistics.tau > 3


def test_paths_share_what_they_begin_with_and_the_size_is_kept() -> None:
    tree = merged(torch.tensor([7, 8]), [[(1, 2, 3), (1, 2, 4), (5,)], [(6,)]], 5)
    tree.validate()
    assert tree.tokens.tolist() == [[7, 1, 2, 3, 4], [8, 6, 0, 0, 0]]
    assert tree.parents.tolist() == [[-1, 0, 1, 2, 2], [-1, 0, 0, 0, 0]] and tree.counts == [5, 2]
    assert cycled([1, 2], 5) == [1, 2, 1, 2, 1]


def test_by_name_and_in_sizes_that_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    target = Target(pair("llama-gqa")[0])
    monkeypatch.setattr(registry, "_registered", {})
    register(LOOKAHEAD)
    drafter = load_drafter_for(target, None, method="lookahead")
    assert isinstance(drafter, Lookahead) and drafter.num_parameters == 0
    shape = drafter.default_shape(target.device)
    assert shape.size == 1 + drafter.pool * (drafter.ngram - 1)
    assert (
        drafter.slots(shape) == shape.size + drafter.window * (drafter.ngram - 1)
        and drafter.slots(TreeShape(0, 1, 1)) == 1
    )
    for sizes in ({"window": 0}, {"ngram": 1}, {"pool": 0}):
        with pytest.raises(UserError, match=r"lookahead's .* must be at least"):
            Lookahead(**sizes)


def test_greedy_through_a_long_text() -> None:
    target = Target(pair("llama-gqa")[0])
    (row,) = finish(target, Lookahead(4, 3, 2), rows_of(target, PROMPTS[:1], GREEDY, 50, [Dice(0)]), TREE)
    assert row.tokens == stock_greedy("llama-gqa", tuple(PROMPTS[0]), 50)
