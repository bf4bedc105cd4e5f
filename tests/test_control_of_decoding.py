"""Controllers say how far to draft and never what comes out: its law stays the target's, for every one of them.

And a controller that looks at a token before it decides to keep it is found out, or these tests would prove nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from enumeration import ScriptedChance, distance, law_of
from outdraft.control import CONTROLLERS, Controller, ControlSettings, Costs, Pacer
from outdraft.core.dice import Dice
from outdraft.core.sampling_settings import SamplingSettings
from outdraft.core.shape import TreeShape
from outdraft.core.statistics import Statistics
from outdraft.core.tree import Tree
from outdraft.drafting.base import Drafter, DraftState, RowContext, Update
from outdraft.engine.round import decode
from outdraft.engine.rows import Row
from outdraft.target.target import Target
from test_losslessness import (
    DRAFTERS,
    EXACT,
    GREEDY,
    NARROW,
    PLAIN,
    PROMPTS,
    SHAPED,
    Recorded,
    expected_law,
    pair,
    rows_of,
    small,
    stock_greedy,
)

CHEAP = Costs.fixed(begin=0.05, step=0.03, verify_base=1.0, verify_per_node=0.01)
"""Drafting pays as soon as some of it is accepted."""

DEAR = Costs.fixed(begin=0.6, step=0.5, verify_base=1.0, verify_per_node=0.2)

WAVERING = Costs.fixed(begin=0.05, step=0.3, verify_base=1.0, verify_per_node=0.05)
"""A second level pays if what was drawn for the first looks good."""

HALFWAY = Costs.fixed(begin=0.45, step=0.05, verify_base=1.0, verify_per_node=0.05)
"""Drafting pays if half of it is accepted."""

PROMPT = (0, 2, 1, 3)
LEARNING = [name for name in CONTROLLERS if name != "fixed"]
SHAPES = {
    "chain": TreeShape.chain(4),
    "tree": TreeShape(3, 3, 12),
    "drawn chain": TreeShape.chain(4, candidates="sampled"),
    "drawn tree": TreeShape(2, 2, 7, "sampled"),
}


def controlled(
    rows: list[Row], name: str, shape: TreeShape, costs: Costs = CHEAP, seed: int = 0, tuned: bool = True, **options
) -> list[Row]:
    """The rows with controllers of one pacer; where it is not to tune whole shapes, each decides for itself."""
    pacer = Pacer(ControlSettings(name, **options), costs)
    for place, row in enumerate(rows):
        row.controller = pacer.controller(shape.depth + 1, seed + place)
        row.controller.pacer = pacer if tuned else None
    return rows


def finish(target: Target, drafter: Drafter, rows: list[Row], shape: TreeShape, costs: Costs = CHEAP) -> list[Row]:
    for _ in decode(target, drafter, rows, shape, costs):
        pass
    return rows


# --- the law ---------------------------------------------------------------------------------------------------------


def law_and_statistics(
    drafter: Drafter,
    target: Target,
    name: str,
    settings: SamplingSettings,
    shape: TreeShape,
    seed: int,
    length: int = 3,
) -> tuple[dict, Statistics]:
    everything: list[Statistics] = []

    def run(new_chance: Callable[[], ScriptedChance]) -> tuple[int, ...]:
        rows = rows_of(target, [PROMPT], settings, length, [new_chance()])
        (row,) = finish(target, drafter, controlled(rows, name, shape, seed=seed), shape)
        everything.append(row.statistics)
        return tuple(row.tokens)

    return law_of(run), Statistics.sum(everything)


@pytest.mark.parametrize("name", [*CONTROLLERS, "auto"])
@pytest.mark.parametrize("shape", [TreeShape.chain(2), TreeShape(1, 2, 5)], ids=["chain", "tree"])
@pytest.mark.parametrize("kind", ["fspad", "fspad-1f", "eesd", "draft-model", "prompt-lookup"])
def test_every_controller_keeps_the_law_of_deterministic_candidates(kind, shape, name):
    model, near = small(4)
    target = Target(model)
    drafted = 0
    for seed in range(2):
        law, statistics = law_and_statistics(DRAFTERS[kind](target, near), target, name, PLAIN, shape, seed, 3)
        assert distance(law, expected_law(model, PROMPT, PLAIN, 3)) < EXACT
        drafted += statistics.drafted
    assert drafted > 0


@pytest.mark.parametrize("name", [*CONTROLLERS, "auto"])
def test_every_controller_keeps_the_law_of_a_drawn_spine(name):
    model, near = small(4)
    drafter = DRAFTERS["fspad-1f"](Target(model), near)
    law, statistics = law_and_statistics(drafter, drafter.target, name, NARROW, TreeShape(2, 2, 6, "spine"), 0, 2)
    assert distance(law, expected_law(model, PROMPT, NARROW, 2)) < EXACT
    assert statistics.drafted > 0


@pytest.mark.parametrize("name", [*CONTROLLERS, "auto"])
@pytest.mark.parametrize("candidates", ["sampled", "sampled-with-replacement"])
@pytest.mark.parametrize("width", [1, 2])
@pytest.mark.parametrize("kind", ["fspad", "eesd", "draft-model"])
def test_every_controller_keeps_the_law_of_drawn_candidates(kind, width, candidates, name):
    if candidates == "sampled-with-replacement" and width == 1:
        pytest.skip("one draw is no replacement")
    model, near = small(4)
    target = Target(model)
    shape = TreeShape(1, width, 1 + 2 * width, candidates)
    accepted = drafted = 0
    for seed in range(2):
        law, statistics = law_and_statistics(DRAFTERS[kind](target, near), target, name, NARROW, shape, seed, 2)
        assert distance(law, expected_law(model, PROMPT, NARROW, 2)) < EXACT
        accepted, drafted = accepted + statistics.accepted, drafted + statistics.drafted
    assert 0 < accepted < drafted


class Peeking(Drafter):
    """A wrong controller: it draws a candidate, looks at it, and keeps it only if its own probability is large."""

    def __init__(self, inner: Drafter, least: float):
        self.inner, self.method, self.least = inner, inner.method, least

    def start(self, target, cache):
        return self.inner.start(target, cache)

    def begin(self, prompts, run) -> DraftState:
        state = self.inner.begin(prompts, run)
        propose = state.propose

        def peeking(update: Update, shape: TreeShape, rows: RowContext) -> Tree:
            tree = propose(update, shape, rows)
            assert tree.draft_probs is not None and tree.rows == 1
            kept = tree.counts[0]
            while kept > 1 and tree.draft_probs[0, kept - 2, tree.tokens[0, kept - 1]] < self.least:
                kept -= 1
            return Tree(
                tree.tokens[:, :kept], tree.parents[:, :kept], [kept], tree.candidates, tree.draft_probs[:, :kept]
            )

        state.propose = peeking  # type: ignore[method-assign]
        return state


@pytest.mark.parametrize("kind", ["fspad", "eesd", "draft-model"])
def test_a_controller_that_looks_before_it_keeps_changes_the_law_and_is_found_out(kind):
    model, near = small(4)
    target = Target(model)
    shape = TreeShape.chain(2, candidates="sampled")
    expected = expected_law(model, PROMPT, PLAIN, 2)
    honest, _ = law_and_statistics(DRAFTERS[kind](target, near), target, "fixed", PLAIN, shape, 0, 2)
    assert distance(honest, expected) < EXACT
    wrong, _ = law_and_statistics(Peeking(DRAFTERS[kind](target, near), 0.3), target, "fixed", PLAIN, shape, 0, 2)
    assert distance(wrong, expected) > 1e-3


# --- rows of a batch -------------------------------------------------------------------------------------------------

TWO = [(0, 2, 1), (1, 0, 2)]


def joint_law(
    drafter: Drafter,
    target: Target,
    name: str,
    shape: TreeShape,
    costs: Costs,
    tuned: bool = True,
    lengths: tuple[int, int] = (3, 2),
) -> tuple[dict, list[list[int]]]:
    """Of the tokens of two rows decoded as a batch; and every round's depths of every run."""
    depths: list[list[int]] = []

    def run(new_chance: Callable[[], ScriptedChance]) -> tuple:
        rows = [
            row
            for prompt, length in zip(TWO, lengths, strict=True)
            for row in rows_of(target, [prompt], NARROW, length, [new_chance()])
        ]
        finish(target, drafter, controlled(rows, name, shape, costs, tuned=tuned), shape, costs)
        depths.extend(row.statistics.depths for row in rows)
        return tuple(tuple(row.tokens) for row in rows)

    return law_of(run), depths


def product_law(model, lengths: tuple[int, int] = (3, 2)) -> dict:
    one, other = (expected_law(model, prompt, NARROW, length) for prompt, length in zip(TWO, lengths, strict=True))
    return {(a, b): p * q for a, p in one.items() for b, q in other.items()}


@pytest.mark.parametrize(
    "kind, name, shape",
    [
        ("draft-model", "calibrated", TreeShape.chain(2, candidates="sampled")),
        ("fspad", "calibrated", TreeShape(1, 2, 5)),
        ("fspad", "beta", TreeShape(1, 2, 5)),
        ("fspad", "auto", TreeShape(1, 2, 5)),
    ],
    ids=["drawn-calibrated", "tree-calibrated", "tree-beta", "tree-auto"],
)
def test_rows_whose_shapes_are_tuned_are_still_independent_and_each_keeps_its_law(kind, name, shape):
    """How far a row drafts depends on what was accepted in the other; that is all that it may depend on."""
    model, near = small(3)
    target = Target(model)
    lengths = (3, 3)  # a second round in which both rows are there
    law, depths = joint_law(DRAFTERS[kind](target, near), target, name, shape, HALFWAY, lengths=lengths)
    assert distance(law, product_law(model, lengths)) < EXACT
    assert len({one[1] for one in depths if len(one) > 1}) > 1, "or no decision would depend on the other row"


def test_rows_that_decide_for_themselves_are_independent():
    """Whether a row drafts on depends on what was drawn for it."""
    model, near = small(3)
    target = Target(model)
    shape = TreeShape.chain(2, candidates="sampled")
    drafter = DRAFTERS["draft-model"](target, near)
    law, depths = joint_law(drafter, target, "calibrated", shape, WAVERING, tuned=False)
    assert distance(law, product_law(model)) < EXACT
    assert {1, 2} <= {one[0] for one in depths}, "or nothing would be proved about decisions that depend on draws"


class PeekingBatch(Peeking):
    """A wrong decision for all: the newest level of a batch is drawn, and dropped if its tokens are improbable."""

    def begin(self, prompts, run) -> DraftState:
        state = self.inner.begin(prompts, run)
        propose = state.propose

        def peeking(update: Update, shape: TreeShape, rows: RowContext) -> Tree:
            tree = propose(update, shape, rows)
            assert tree.draft_probs is not None
            last = [
                tree.draft_probs[row, kept - 2, tree.tokens[row, kept - 1]].item()
                for row, kept in enumerate(tree.counts)
            ]
            if sum(last) >= self.least * len(last):
                return tree
            kept = max(tree.counts) - 1
            return Tree(
                tree.tokens[:, :kept],
                tree.parents[:, :kept],
                [kept] * tree.rows,
                tree.candidates,
                tree.draft_probs[:, :kept],
            )

        state.propose = peeking  # type: ignore[method-assign]
        return state


def test_a_decision_for_all_rows_that_looks_before_it_keeps_is_found_out():
    model, near = small(3)
    target = Target(model)
    wrong = PeekingBatch(DRAFTERS["draft-model"](target, near), 0.6)
    law, _ = joint_law(wrong, target, "fixed", TreeShape.chain(2, candidates="sampled"), CHEAP)
    assert distance(law, product_law(model)) > 1e-3


# --- the same tokens -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*CONTROLLERS, "auto"])
@pytest.mark.parametrize("kind", DRAFTERS)
def test_greedy_tokens_are_those_of_stock_generate_under_every_controller(kind, name):
    model, near = pair("llama-gqa")
    target = Target(model)
    drafter = DRAFTERS[kind](target, near)
    expected = [stock_greedy("llama-gqa", tuple(prompt), 14) for prompt in PROMPTS]
    for shape in (SHAPES["chain"], SHAPES["tree"]):
        rows = rows_of(target, PROMPTS, GREEDY, 14, [Dice(seed) for seed in range(4)])
        finish(target, drafter, controlled(rows, name, shape), shape)
        assert [row.tokens for row in rows] == expected
        assert sum(row.statistics.drafted for row in rows) > 0


@pytest.mark.parametrize("name", LEARNING)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("kind", ["fspad", "eesd", "draft-model", "prompt-lookup"])
def test_rows_that_decide_for_themselves_equal_single_rows(kind, shape, name):
    """With given costs and the same dice; rows draft to different lengths and leave at different times."""
    model, near = pair("llama-gqa")
    target = Target(model)
    drafter = DRAFTERS[kind](target, near)
    limits = [9, 3, 16, 6]

    def rows(which: Sequence[int]) -> list[Row]:
        made = [row for i in which for row in rows_of(target, [PROMPTS[i]], SHAPED, limits[i], [Dice(100 + i)], [11])]
        for i, row in zip(which, made, strict=True):
            controlled([row], name, shape, seed=i, tuned=False)
        return made

    together = finish(target, drafter, rows(range(4)), shape)
    for i, row in enumerate(together):
        (alone,) = finish(target, drafter, rows([i]), shape)
        assert (row.tokens, row.accepted) == (alone.tokens, alone.accepted)
        assert row.statistics.depths == alone.statistics.depths
    assert sum(row.statistics.drafted for row in together) > 0


@pytest.mark.parametrize("name", ["beta", "calibrated", "auto"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("kind", ["fspad", "eesd", "draft-model", "prompt-lookup"])
def test_rows_whose_shapes_are_tuned_draft_alike_and_do_so_again(kind, shape, name):
    """The same batch, dice and given costs: the same tokens and trees."""
    model, near = pair("llama-gqa")
    target = Target(model)
    drafter = DRAFTERS[kind](target, near)
    limits = [9, 3, 16, 6]

    def batch() -> list[Row]:
        rows = []
        for i, limit in enumerate(limits):
            rows += rows_of(target, [PROMPTS[i]], SHAPED, limit, [Dice(100 + i)], [11])
        return finish(target, drafter, controlled(rows, name, shape), shape)

    once, again = batch(), batch()
    assert [(row.tokens, row.statistics.depths) for row in once] == [
        (row.tokens, row.statistics.depths) for row in again
    ]
    assert sum(row.statistics.drafted for row in once) > 0
    for own in zip(*(row.statistics.depths for row in once), strict=False):
        drawn = shape.candidates != "top-k" and kind != "prompt-lookup"  # others may end before the shape does
        assert not drawn or len(set(own)) == 1


# --- how far ---------------------------------------------------------------------------------------------------------


class Every(Controller):
    """Drafts to the limit in every n-th round, and not at all in the others."""

    def __init__(self, rounds: int):
        super().__init__(CHEAP, 8, torch.Generator())
        self.every, self.round = rounds, 0

    def decide(self, confidences, nodes):
        return self.round % self.every == 0

    def observe(self, confidences, accepted, tokens, seconds):
        self.round += 1


@pytest.mark.parametrize("shape", [SHAPES["chain"], SHAPES["tree"]], ids=["chain", "tree"])
@pytest.mark.parametrize("kind", [kind for kind in DRAFTERS if kind != "lookahead"])  # its window moves by rounds
def test_what_was_decided_while_nothing_was_drafted_is_not_forgotten(kind, shape):
    """After the same text the same tree is drafted, however many rounds of that text the drafter sat out."""
    model, near = pair("llama-gqa")
    target = Target(model)
    trees: list[dict] = []
    for rounds in (1, 2):
        recorded = Recorded(DRAFTERS[kind](target, near))
        rows = rows_of(target, PROMPTS[:1], GREEDY, 50, [Dice(0)])
        rows[0].controller = Every(rounds)
        finish(target, recorded, rows, shape)
        trees.append(
            {tuple(prefix): (tree.tokens.tolist(), tree.parents.tolist()) for prefix, tree in recorded.proposed}
        )
        if rounds == 2:
            assert 0 in rows[0].statistics.depths
    common = trees[0].keys() & trees[1].keys()
    assert len(common) > 1
    for prefix in common:
        assert trees[0][prefix] == trees[1][prefix]


@pytest.mark.parametrize("name", LEARNING)
def test_where_drafting_does_not_pay_it_nearly_stops(name):
    """A drafter of random weights against costs that only a good one could earn."""
    target = Target(pair("llama-gqa")[0])
    drafter, shape = DRAFTERS["fspad"](target, pair("llama-gqa")[1]), SHAPES["chain"]
    rows = controlled(rows_of(target, [PROMPTS[0]], GREEDY, 50, [Dice(0)]), name, shape, DEAR)
    (row,) = finish(target, drafter, rows, shape, DEAR)
    assert row.statistics.depths.count(0) > 0.8 * row.statistics.rounds


@pytest.mark.parametrize("name", ["beta", "calibrated"])
def test_where_every_candidate_is_accepted_drafts_grow_long(name):
    target = Target(pair("llama-gqa")[0])
    drafter, shape = DRAFTERS["draft-model"](target, pair("llama-gqa")[0]), TreeShape.chain(6)
    rows = controlled(rows_of(target, [PROMPTS[0]], GREEDY, 50, [Dice(0)]), name, shape)
    (row,) = finish(target, drafter, rows, shape)
    late = row.statistics.depths[len(row.statistics.depths) // 2 :]
    assert sum(late) / len(late) > 3


def test_a_row_that_waits_drafts_nothing_while_others_do():
    """One row of the batch drafts in every round, the other in none: trees of different sizes verified together."""
    model, near = pair("llama-gqa")
    target = Target(model)
    rows = rows_of(target, PROMPTS[:2], GREEDY, 12, [Dice(0), Dice(1)])
    rows[0].controller, rows[1].controller = Every(1), Every(1000)
    rows[1].controller.round = 1  # type: ignore[attr-defined]
    finish(target, DRAFTERS["draft-model"](target, near), rows, SHAPES["tree"])
    assert set(rows[1].statistics.depths) == {0} and 0 not in rows[0].statistics.depths
    assert [row.tokens for row in rows] == [stock_greedy("llama-gqa", tuple(p), 12) for p in PROMPTS[:2]]
