"""Rows that draft what their own text repeats say what the target says: by enumeration, greedily, and seed by seed.

And a repetition that is chosen after a look at what was drawn, or that is verified under the drafter's law, is found
out, or these tests would prove nothing. How a text is searched and how users ask for it: `test_repeats_in_use.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pytest
import torch

import outdraft.drafting.ngrams as ngrams
import outdraft.engine.drafts as decoding
from enumeration import ScriptedChance, distance, law_of
from models import CONTEXT, tiny
from outdraft.control import CONTROLLERS, Controller, Costs
from outdraft.control.tuner import ShapeChoice
from outdraft.core.dice import Dice
from outdraft.core.sampling_settings import SamplingSettings
from outdraft.core.shape import TreeShape
from outdraft.core.tree import Tree
from outdraft.drafting.base import Drafter, DraftState, RowContext, Update
from outdraft.drafting.ngrams import Luck, NgramSettings
from outdraft.engine.continuous import Decoder
from outdraft.engine.round import decode
from outdraft.engine.rows import Row
from outdraft.methods.prompt_lookup.drafter import PromptLookup
from outdraft.target.target import Target
from test_control_of_decoding import CHEAP, controlled
from test_joining import alone, in_company
from test_losslessness import (
    DRAFTERS,
    EXACT,
    GREEDY,
    NARROW,
    PLAIN,
    SHAPED,
    dice,
    expected_law,
    pair,
    rows_of,
    small,
    stock_greedy,
)

KINDS = [kind for kind in DRAFTERS if kind not in ("prompt-lookup", "lookahead")]  # those look back themselves
SHAPES = {
    "drawn chain": TreeShape.chain(2, candidates="sampled"),
    "drawn tree": TreeShape(1, 2, 5, "sampled"),
    "drawn with replacement": TreeShape(1, 2, 5, "sampled-with-replacement"),
    "tree": TreeShape(1, 2, 5),
}

SHALLOW = {name: TreeShape(0, shape.top_k, 3, shape.candidates) for name, shape in SHAPES.items()}
SHALLOW["drawn chain"] = TreeShape.chain(1, candidates="sampled")


def repeating(rows: list[Row], least: int, most: int = 3) -> list[Row]:
    for row in rows:
        row.ngrams = NgramSettings(least, most)
    return rows


@dataclass
class Tally:
    """What became of repetitions and of the drafter's own trees, over any number of decodings."""

    repeated: int = 0
    """Rounds of rows that drafted a repetition."""
    drafted: int = 0
    accepted: int = 0
    others: int = 0
    """Rounds of rows that did not."""
    both: int = 0
    """Rounds of batches in which some rows did and some did not."""
    all: int = 0
    """Rounds of batches of several rows that all did."""
    cut: int = 0
    """Repetitions that went on after an end of sequence, as the target would have."""

    def finish(self, target: Target, drafter: Drafter, rows: list[Row], shape: TreeShape, costs=None) -> list[Row]:
        """Decode the rows, round by round."""
        before = [0] * len(rows)
        for gained in decode(target, drafter, rows, shape, costs):
            now = []
            for place, row in enumerate(rows):
                if any(row is one for one in gained) and row.statistics.rounds:
                    now.append(row.statistics.repeats > before[place])
                    before[place] = row.statistics.repeats
                    if now[-1]:
                        self.drafted += row.statistics.depths[-1]
                        self.accepted += row.statistics.lengths[-1]
                        self.cut += row.finish_reason == "eos" and row.accepted[-1]
            self.repeated += sum(now)
            self.others += len(now) - sum(now)
            self.both += len(set(now)) == 2
            self.all += len(now) > 1 and all(now)
        return rows

    def is_telling(self) -> bool:
        """Whether there were repetitions that were accepted, others that were rejected, and rounds without any."""
        return 0 < self.accepted < self.drafted and self.others > 0


# --- the law ---------------------------------------------------------------------------------------------------------


def decoded_law(
    drafter: Drafter, target: Target, prompt, settings, length: int, shape: TreeShape, least: int, tally: Tally
) -> dict:
    def run(new_chance: Callable[[], ScriptedChance]) -> tuple[int, ...]:
        rows = repeating(rows_of(target, [prompt], settings, length, [new_chance()]), least)
        return tuple(tally.finish(target, drafter, rows, shape)[0].tokens)

    return law_of(run)


@pytest.mark.parametrize("settings", [PLAIN, SHAPED, NARROW], ids=["plain", "shaped", "narrow"])
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_repetitions_keep_the_law(kind, name, settings):
    """Of two tokens of three that the filter leaves, or of a vocabulary of two."""
    vocab = 3 if settings is NARROW else 2
    model, near = small(vocab)
    target, prompt, tally = Target(model), (0, 2 % vocab, 1, 0, 2 % vocab), Tally()
    law = decoded_law(DRAFTERS[kind](target, near), target, prompt, settings, 4, SHALLOW[name], 1, tally)
    assert distance(law, expected_law(model, prompt, settings, 4)) < EXACT
    assert tally.is_telling()


@pytest.mark.parametrize(("name", "least"), [("drawn chain", 1), ("drawn chain", 2), ("drawn tree", 1)])
@pytest.mark.parametrize("kind", ["fspad", "draft-model"])
def test_longer_repetitions_beside_deeper_trees_keep_the_law(kind, name, least):
    """And the drafter goes on after them, with what was decided meanwhile."""
    model, near = small(3)
    target, prompt, tally = Target(model), (0, 2, 1, 0, 2), Tally()
    law = decoded_law(DRAFTERS[kind](target, near), target, prompt, NARROW, 4, SHAPES[name], least, tally)
    assert distance(law, expected_law(model, prompt, NARROW, 4)) < EXACT
    assert tally.is_telling()


COMPANY = [((0, 2, 1, 0, 2), NARROW, 3), ((1, 1, 0), GREEDY, 5)]
"""The second row has one text, so that the runs of both are few."""


def joint_law(
    drafter: Drafter, target: Target, shape: TreeShape, repeats: Sequence[NgramSettings | None], tally: Tally
):
    def run(new_chance: Callable[[], ScriptedChance]) -> tuple:
        rows = [
            row
            for prompt, settings, length in COMPANY
            for row in rows_of(target, [prompt], settings, length, [new_chance()])
        ]
        for row, own in zip(rows, repeats, strict=True):
            row.ngrams = own
        return tuple(tuple(row.tokens) for row in tally.finish(target, drafter, rows, shape))

    return law_of(run)


def product_law(model) -> dict:
    one, other = (expected_law(model, prompt, settings, length) for prompt, settings, length in COMPANY)
    return {(a, b): p * q for a, p in one.items() for b, q in other.items()}


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        *((kind, shape) for kind in ("fspad", "draft-model") for shape in (SHALLOW["drawn tree"], SHAPES["tree"])),
        *((kind, shape) for kind in ("eesd", "medusa") for shape in (SHAPES["drawn chain"], TreeShape.chain(2))),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{value.candidates}-{value.top_k}",
)
@pytest.mark.parametrize("company", ["one", "all"])
def test_rows_of_a_batch_keep_their_laws_whether_one_repeats_or_all_do(kind, shape, company):
    """The joint law is the product, for trees of one row's repetition beside the other's draft."""
    model, near = small(3)
    target, tally = Target(model), Tally()
    repeats = [NgramSettings(1, 2), NgramSettings(1, 2) if company == "all" else None]
    law = joint_law(DRAFTERS[kind](target, near), target, shape, repeats, tally)
    assert distance(law, product_law(model)) < EXACT
    assert tally.is_telling()
    assert tally.all > 0 if company == "all" else tally.both > 0


class Deaf(Drafter):
    """Drafts to the shape's limit in every row, whatever the pace says, as drafters may."""

    method = "deaf"

    def __init__(self, inner: Drafter):
        self.inner = inner

    def begin(self, prompts, run):
        state = self.inner.begin(prompts, run)
        propose = state.propose
        state.propose = lambda update, shape, rows: propose(update, shape, replace(rows, budget=None))
        return state


@pytest.mark.parametrize("name", ["drawn chain", "drawn tree", "tree"])
def test_what_a_drafter_drafts_for_a_repeating_row_gives_way(name):
    model, near = small(3)
    target, tally = Target(model), Tally()
    drafter = Deaf(DRAFTERS["draft-model"](target, near))
    law = joint_law(drafter, target, SHAPES[name], [NgramSettings(1, 1), None], tally)
    assert distance(law, product_law(model)) < EXACT
    assert tally.both > 0


# --- what the enumeration finds out ----------------------------------------------------------------------------------


def test_a_repetition_under_the_drafters_law_is_found_out(monkeypatch):
    """A chain that is certain, put among drawn ones as if it had been drawn like them."""
    right = decoding.spliced

    def claiming(tree: Tree, chains: Sequence[Sequence[int]]) -> Tree:
        made = right(tree, chains)
        assert made.draft_probs is not None and tree.draft_probs is not None
        claimed = made.draft_probs.clone()
        claimed[:, 0] = tree.draft_probs[:, 0]
        return Tree(made.tokens, made.parents, made.counts, made.candidates, claimed, made.levels)

    model, near = small(3)
    target, shape = Target(model), TreeShape(0, 2, 3, "sampled")
    expected, repeats = product_law(model), [NgramSettings(1, 2), None]
    drafter = DRAFTERS["draft-model"](target, near)
    assert distance(joint_law(drafter, target, shape, repeats, Tally()), expected) < EXACT
    monkeypatch.setattr(decoding, "spliced", claiming)
    assert distance(joint_law(drafter, target, shape, repeats, Tally()), expected) > 1e-3


class Peeking(Drafter):
    """A wrong rule: it repeats only where what it has just drawn looks bad."""

    method = "peeking"

    def __init__(self, inner: Drafter, least: float):
        self.inner, self.least = inner, least

    def begin(self, prompts, run) -> DraftState:
        state = self.inner.begin(prompts, run)
        propose = state.propose

        def peeking(update: Update, shape: TreeShape, rows: RowContext) -> Tree:
            tree = propose(update, shape, rows)
            assert tree.draft_probs is not None and tree.rows == 1
            if tree.draft_probs[0, 0, tree.tokens[0, 1]] >= self.least:
                return tree
            found = NgramSettings(1, 2).text(rows.prefixes[0].tolist())
            chain = NgramSettings(1, 2).candidates(found, 2)
            return decoding.spliced(Tree.roots(tree.tokens[:, 0]), [chain])

        state.propose = peeking  # type: ignore[method-assign]
        return state


def test_a_repetition_chosen_after_a_look_at_the_draft_is_found_out():
    model, near = small(3)
    target, shape, prompt = Target(model), SHAPES["drawn chain"], (0, 2, 1, 0, 2)
    expected = expected_law(model, prompt, PLAIN, 2)
    for least, wrong in ((0.0, False), (0.4, True)):
        drafter = Peeking(DRAFTERS["draft-model"](target, near), least)
        law = law_of(
            lambda new, drafter=drafter: tuple(
                Tally().finish(target, drafter, rows_of(target, [prompt], PLAIN, 2, [new()]), shape)[0].tokens
            )
        )
        assert (distance(law, expected) > 1e-3) == wrong


# --- the same tokens -------------------------------------------------------------------------------------------------

PROMPTS = [[5, 9, 9, 3, 5, 9], [7], [1, 2, 3, 4, 1, 2, 3, 4, 1, 2, 3, 4], [30, 8, 30]]
WIDE = {"chain": TreeShape.chain(3), "tree": TreeShape(2, 4, 12)}


@pytest.mark.parametrize("least", [1, 2])
@pytest.mark.parametrize(
    ("family", "kind"),
    [
        *(("llama-gqa", kind) for kind in KINDS),
        *((family, kind) for family in ("gemma2", "mistral-sliding") for kind in ("fspad", "eesd", "draft-model")),
        *(("gpt-neo", kind) for kind in ("fspad", "eesd", "medusa")),
    ],
)
def test_greedy_tokens_are_those_of_stock_generate(family, kind, least):
    """Alone and in ragged batches, where all rows repeat themselves or none, past sliding windows."""
    model, near = pair(family)
    target, tally = Target(model), Tally()
    drafter = DRAFTERS[kind](target, near)
    expected = [stock_greedy(family, tuple(prompt), 40) for prompt in PROMPTS]
    for shape in WIDE.values():
        rows = repeating(rows_of(target, PROMPTS, GREEDY, 40, dice(4)), least, 14)
        assert [row.tokens for row in tally.finish(target, drafter, rows, shape)] == expected
        rows = repeating(rows_of(target, PROMPTS[2:3], GREEDY, 40, dice(1)), least, 14)
        assert tally.finish(target, drafter, rows, shape)[0].tokens == expected[2]
    assert tally.repeated > 0 and tally.both == 0 and tally.others > 0
    if least == 1:
        assert tally.is_telling()


@pytest.mark.parametrize("family", ["llama-gqa", "gpt2", "gpt-neo", "mistral-sliding"])
@pytest.mark.parametrize("kind", ["fspad", "eesd", "medusa"])
def test_decoding_ends_with_the_context(family, kind):
    """Repetitions may reach over the last position, not over a family's last slot; the text is the stock model's."""
    model, near = pair(family)
    target, tally = Target(model), Tally()
    drafter = DRAFTERS[kind](target, near)
    prompts = [list(range(20)) * 2, list(range(25, 30)), [3, 4, 3, 4, 3]]
    expected = [stock_greedy(family, tuple(prompt), CONTEXT - len(prompt)) for prompt in prompts]
    for shape in WIDE.values():
        for which in ([0, 1, 2], [0, 2], [0], [2]):
            given = [prompts[place] for place in which]
            rows = repeating(rows_of(target, given, GREEDY, 1000, dice(len(given))), 1, 14)
            tally.finish(target, drafter, rows, shape)
            assert {row.finish_reason for row in rows} == {"context"}
            assert [row.tokens for row in rows] == [expected[place] for place in which]
    assert tally.is_telling()


@pytest.mark.parametrize("length", [5, 6, 8])
def test_repetitions_beside_drafts_end_with_a_familys_last_slot(length):
    """GPT-Neo's table of slots holds what the exit drafter ran ahead as well as the other row's repetition. Rows that
    draw from one token say what greedy ones say, and do not wait for each other."""
    model, near = pair("gpt-neo")
    target, tally = Target(model), Tally()
    drafter, shape = DRAFTERS["eesd"](target, near), TreeShape.chain(length)
    prompts = [[*range(30), *range(8)], list(range(25, 30)), [3, 4, 3, 4, 3]]
    for more in range(12):
        given = [prompts[0] + [31] * (more > 0) + list(range(10, 9 + more)), *prompts[1:]]
        rows = repeating(rows_of(target, given, SamplingSettings(temperature=1, top_k=1), 1000, dice(3)), 1, 14)
        tally.finish(target, drafter, rows, shape)
        assert rows[0].tokens == stock_greedy("gpt-neo", tuple(given[0]), CONTEXT - len(given[0]))
    assert tally.both > 0


def cycle_of(model) -> list[int]:
    """The tokens that follow each other for ever in a model that looks at the last one alone; makes it one."""
    inner = model.base_model
    with torch.inference_mode():
        for layer in inner.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        after = model.lm_head(inner.norm(inner.embed_tokens.weight)).argmax(-1).tolist()
    token = 0
    for _ in after:
        token = after[token]
    cycle = [token]
    while after[cycle[-1]] != token:
        cycle.append(after[cycle[-1]])
    return cycle


def test_an_end_of_sequence_amid_a_repetition_ends_the_row():
    model, cycle = next(
        (model, cycle) for seed in range(60) for model in [tiny("llama-gqa", seed)] if len(cycle := cycle_of(model)) > 6
    )
    target, shape, prompt, amid = Target(model), TreeShape.chain(1), cycle * 3, 0
    for end in cycle:
        for start in (1, 2, 5):
            given, tally = prompt[: len(prompt) - start], Tally()
            (row,) = repeating(rows_of(target, [given], GREEDY, 30, dice(1), [end]), 2, 14)
            tally.finish(target, DRAFTERS["fspad"](target, model), [row], shape)
            expected = prompt[len(given) :] + cycle
            assert row.tokens == expected[: expected.index(end) + 1] and row.finish_reason == "eos"
            amid += tally.cut
    assert amid > 0


# --- the same seeds --------------------------------------------------------------------------------------------------

DRAWN = {**WIDE, "drawn chain": TreeShape.chain(3, candidates="sampled"), "drawn tree": TreeShape(2, 2, 7, "sampled")}


@pytest.mark.parametrize("settings", [PLAIN, SHAPED], ids=["plain", "shaped"])
@pytest.mark.parametrize("shape", DRAWN.values(), ids=DRAWN)
@pytest.mark.parametrize("kind", ["fspad", "eesd", "draft-model", "medusa"])
def test_batched_rows_equal_single_rows(kind, shape, settings):
    model, near = pair("llama-gqa")
    target, tally = Target(model), Tally()
    drafter, limits = DRAFTERS[kind](target, near), [22, 20, 30, 1]

    def rows(which: Sequence[int], seed: int) -> list[Row]:
        return [
            row
            for i in which
            for row in repeating(rows_of(target, [PROMPTS[i]], settings, limits[i], [Dice(seed + i)]), 1, 5)
        ]

    for seed in (0, 100):
        for i, row in enumerate(tally.finish(target, drafter, rows(range(4), seed), shape)):
            (single,) = tally.finish(target, drafter, rows([i], seed), shape)
            assert (row.tokens, row.accepted) == (single.tokens, single.accepted)
            own, others = row.statistics, single.statistics
            assert (own.lengths, own.depths, own.repeats) == (others.lengths, others.depths, others.repeats)
    assert tally.repeated > 0 and tally.both > 0 and tally.others > 0


@pytest.mark.parametrize("settings", [GREEDY, SamplingSettings(temperature=0.8, top_k=12)], ids=["greedy", "sampling"])
@pytest.mark.parametrize("kind", ["fspad", "eesd", "draft-model"])
def test_a_row_that_joins_late_says_what_it_says_alone(kind, settings):
    model, near = pair("llama-gqa")
    target = Target(model)
    drafter = DRAFTERS[kind](target, near)
    shape = TreeShape(2, 2, 7, candidates="top-k" if settings is GREEDY else "sampled")
    prompts = [[5, 6, 7, 5, 6, 7, 5, 6], [1, 2, 1, 2, 1], [9], list(range(1, 31)), [3, 3, 3]]
    rows = [
        row
        for place, prompt in enumerate(prompts)
        for row in repeating(rows_of(target, [prompt], settings, 24 - 3 * place, [Dice(7 + place)]), 1, 6)
    ]
    expected = alone(target, drafter, rows, shape)
    in_company(Decoder(target, drafter, shape), rows, pieces=7)
    assert [row.tokens for row in rows] == expected
    repeats = sum(row.statistics.repeats for row in rows)
    assert 0 < repeats < sum(row.statistics.rounds for row in rows)


# --- controllers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*CONTROLLERS, "auto"])
@pytest.mark.parametrize("kind", ["fspad", "eesd"])
def test_every_controller_keeps_the_law_beside_repetitions(kind, name):
    model, near = small(3)
    target, tally, prompt = Target(model), Tally(), (0, 2, 1, 0, 2)

    def run(new_chance: Callable[[], ScriptedChance]) -> tuple[int, ...]:
        rows = repeating(rows_of(target, [prompt], NARROW, 4, [new_chance()]), 1)
        shape = SHAPES["drawn chain"]
        return tuple(tally.finish(target, drafter, controlled(rows, name, shape), shape, CHEAP)[0].tokens)

    drafter = DRAFTERS[kind](target, near)
    assert distance(law_of(run), expected_law(model, prompt, NARROW, 4)) < EXACT
    assert tally.is_telling()


@pytest.mark.parametrize("name", [*CONTROLLERS, "auto"])
def test_greedy_tokens_are_kept_under_every_controller_and_a_batch_repeats_as_one(name):
    model, near = pair("llama-gqa")
    target, tally, alike = Target(model), Tally(), [[4, 4, 4], [1, 2, 1, 2]]
    drafter = DRAFTERS["fspad"](target, near)
    for shape in WIDE.values():
        rows = repeating(rows_of(target, PROMPTS, GREEDY, 30, dice(4)), 1)
        tally.finish(target, drafter, controlled(rows, name, shape), shape, CHEAP)
        assert [row.tokens for row in rows] == [stock_greedy("llama-gqa", tuple(p), 30) for p in PROMPTS]
        rows = repeating(rows_of(target, alike, GREEDY, 40, dice(2)), 1)
        tally.finish(target, drafter, controlled(rows, name, shape), shape, CHEAP)
        assert [row.tokens for row in rows] == [stock_greedy("llama-gqa", tuple(p), 40) for p in alike]
    assert tally.is_telling() and tally.all > 0
    assert tally.both == 0, "beside controllers all rows repeat, or none"


class Noting(Controller):
    """Drafts to the limit, and counts what it is told."""

    def __init__(self) -> None:
        super().__init__(CHEAP, 8, torch.Generator())
        self.observed = 0

    def decide(self, confidences, nodes):
        return True

    def observe(self, confidences, accepted, tokens, seconds):
        self.observed += 1


class NotedCosts(Costs):
    observed = 0

    def observe_round(self, *args, **kwargs):
        self.observed += 1
        super().observe_round(*args, **kwargs)


def test_controllers_and_costs_are_told_of_the_drafters_rounds_alone(monkeypatch):
    model, near = pair("llama-gqa")
    target = Target(model)
    drafter, tally, costs, shape = DRAFTERS["fspad"](target, near), Tally(), NotedCosts(), WIDE["chain"]
    (row,) = repeating(rows_of(target, PROMPTS[2:3], GREEDY, 40, dice(1)), 1)
    row.controller = noting = Noting()
    tally.finish(target, drafter, [row], shape, costs)
    assert tally.is_telling()
    assert noting.observed == costs.observed == tally.others
    told: list[int] = []
    observe = ShapeChoice.observe
    monkeypatch.setattr(ShapeChoice, "observe", lambda self, *args: (told.append(1), observe(self, *args)))
    tally = Tally()
    (row,) = controlled(repeating(rows_of(target, PROMPTS[2:3], GREEDY, 40, dice(1)), 1), "auto", shape)
    tally.finish(target, drafter, [row], shape, CHEAP)
    assert tally.repeated > 0 and len(told) == tally.others


class Resting(Noting):
    """Drafts in the first round only; half of the time it is not even asked."""

    def decide(self, confidences, nodes):
        self.resting = 1
        return self.observed == 0

    def rest(self):
        self.resting = 0


def test_short_repetitions_that_do_not_pay_are_drafted_rarely_and_again_once_they_do():
    luck = Luck()
    worth = [luck.worth(0.4) for _ in range(3)]
    assert all(worth), "drafts are tried first"
    drafted = 0
    for _ in range(320):
        if luck.worth(0.4):
            drafted += 1
            luck.observe(0)
    assert 15 <= drafted <= 20
    while not luck.worth(0.4):
        pass
    for _ in range(8):
        luck.observe(2)
    assert luck.worth(0.4) and not luck.worth(1.9)


def test_where_a_drafter_rests_a_greedy_row_drafts_shorter_repetitions(monkeypatch):
    model, near = pair("llama-gqa")
    target, seen = Target(model), {}
    drafter, costs = DRAFTERS["fspad"](target, near), CHEAP
    for sampling, least in ((GREEDY, 1), (GREEDY, 3), (SHAPED, 1), (SHAPED, 3)):
        monkeypatch.setattr(ngrams, "IDLE_LEAST", least)
        (row,) = repeating(rows_of(target, PROMPTS[2:3], sampling, 40, dice(1)), 3, 6)
        row.controller = noting = Resting()
        Tally().finish(target, drafter, [row], WIDE["chain"], costs)
        seen[sampling is GREEDY, least] = row.statistics.repeats, row.tokens
        assert noting.observed > 1, "rounds without the drafter are told to the controller"
    assert seen[True, 1][0] > seen[True, 3][0]
    assert seen[True, 1][1] == seen[True, 3][1] == stock_greedy("llama-gqa", tuple(PROMPTS[2]), 40)
    assert seen[False, 1] == seen[False, 3], "a seed's text does not depend on what rests"


class Refusing(Noting):
    """Never drafts."""

    def decide(self, confidences, nodes):
        return False


@pytest.mark.parametrize("sampling", [GREEDY, SHAPED], ids=["greedy", "sampled"])
def test_repetitions_are_drafted_where_the_drafter_never_read_the_prompt(sampling):
    model, near = pair("llama-gqa")
    target = Target(model)
    drafter = DRAFTERS["fspad"](target, near)
    (row,) = repeating(rows_of(target, PROMPTS[2:3], sampling, 40, dice(1)), 2, 6)
    row.controller = Refusing()
    Tally().finish(target, drafter, [row], WIDE["chain"], CHEAP)
    assert row.statistics.repeats > 0 and drafter.first_drafts == 0
    if sampling is GREEDY:
        assert row.tokens == stock_greedy("llama-gqa", tuple(PROMPTS[2]), 40)


def test_a_drafter_that_looks_back_may_be_given_repetitions_all_the_same():
    """Nobody asks for it, but nothing breaks."""
    target, tally = Target(pair("llama-gqa")[0]), Tally()
    rows = repeating(rows_of(target, PROMPTS, GREEDY, 20, dice(4)), 2)
    tally.finish(target, PromptLookup(longest=1), rows, WIDE["chain"])
    assert [row.tokens for row in rows] == [stock_greedy("llama-gqa", tuple(p), 20) for p in PROMPTS]
