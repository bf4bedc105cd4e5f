"""The lossless rule, proved: the law of what is emitted, summed over every draw, is the target's own law.

Target and drafter are random tables from prefix to logits, so any tree can be verified without a model. The draws of
the tree are enumerated too: that candidates come from the law that is declared for them is part of the proof. Planted
faults show that the same check fails where it must.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor

import outdraft.core.verify as rule
from enumeration import Law, ScriptedChance, all_runs, distance, sequence_law
from outdraft.core.dice import Dice
from outdraft.core.sampling import Warper
from outdraft.core.sampling_settings import SamplingSettings
from outdraft.core.shape import TreeShape
from outdraft.core.tree import Tree
from outdraft.core.verify import verify
from outdraft.drafting.base import RowContext
from outdraft.drafting.expand import grow_dynamic, grow_sampled

EXACT = 1e-10
VOCAB = 4
PROMPT = (2, 0, 3, 3)
EOS = 1
LENGTH = 3
"""Tokens of which the joint law is compared: what was emitted, then plain sampling."""

SETTINGS = {
    "plain": SamplingSettings(temperature=1),
    "temperature": SamplingSettings(temperature=0.6),
    "top-k": SamplingSettings(temperature=1, top_k=2),
    "top-p": SamplingSettings(temperature=1, top_p=0.7),
    "min-p": SamplingSettings(temperature=1, min_p=0.3),
    "repetition": SamplingSettings(temperature=1, repetition_penalty=1.6),
    "presence": SamplingSettings(temperature=1, presence_penalty=1.1),
    "frequency": SamplingSettings(temperature=1, frequency_penalty=0.9),
    "logit-bias": SamplingSettings(temperature=1, logit_bias={1: 1.5, 3: -2.0}),
    "bad-words": SamplingSettings(temperature=1, bad_words_ids=[[2], [0, 3]]),
    "min-new-tokens": SamplingSettings(temperature=1, min_new_tokens=2),
    "everything": SamplingSettings(
        temperature=0.8,
        top_k=3,
        top_p=0.95,
        min_p=0.05,
        repetition_penalty=1.2,
        presence_penalty=0.4,
        frequency_penalty=0.3,
        logit_bias={0: 0.5},
        bad_words_ids=[[3, 3]],
        min_new_tokens=1,
    ),
    "greedy": SamplingSettings(temperature=0),
}

SHAPES = {
    "chain": TreeShape(2, 1, 4),
    "pair": TreeShape(0, 2, 3),
    "tree": TreeShape(1, 2, 5),
    "all-of-the-vocabulary": TreeShape(0, VOCAB, VOCAB + 1),
}


def table(seed: int, vocab: int = VOCAB) -> Callable[[tuple[int, ...]], Tensor]:
    """A random language model: the logits after any sequence of tokens."""

    @cache
    def logits(path: tuple[int, ...]) -> Tensor:
        generator = torch.Generator().manual_seed(hash((seed, *path)) % (1 << 62))
        return 1.5 * torch.randn(vocab, generator=generator, dtype=torch.float64)

    return logits


TARGET, DRAFTER = table(1), table(9)


def warper(settings: SamplingSettings, vocab: int = VOCAB) -> Warper:
    return Warper(settings, len(PROMPT), vocab, [EOS])


def target_law(settings: SamplingSettings) -> Callable[[tuple[int, ...]], Tensor]:
    warp = warper(settings)
    return lambda path: warp.probs_after(TARGET(path), torch.tensor(PROMPT + path))


def path_to(tree: Tree, row: int, node: int) -> tuple[int, ...]:
    """Tokens from below the root down to the node."""
    tokens: list[int] = []
    while node > 0:
        tokens.insert(0, int(tree.tokens[row, node]))
        node = int(tree.parents[row, node])
    return tuple(tokens)


def drafting(shape: TreeShape, settings: SamplingSettings) -> Callable[[ScriptedChance], Tree]:
    """A tree below the end of the prompt, grown by the library from the table drafter."""

    def grow(chance: ScriptedChance) -> Tree:
        paths: list[tuple[int, ...]] = [()]

        def step(tokens: Tensor, parents: Tensor) -> Tensor:
            nonlocal paths
            above = parents[0].tolist()
            paths = [(*paths[parent], token) for parent, token in zip(above, tokens[0].tolist(), strict=True)]
            return torch.stack([DRAFTER(path) for path in paths])[None]

        roots, logits = torch.tensor([PROMPT[-1]]), DRAFTER(())[None]
        if shape.candidates == "top-k":
            return grow_dynamic(roots, logits, step, shape)
        rows = RowContext([torch.tensor(PROMPT)], [warper(settings)], [chance])
        return grow_sampled(roots, logits, step, shape, rows)

    return grow


def emitted_law(
    grow: Callable[[ScriptedChance], Tree], settings: SamplingSettings, count: Callable[[int], None] = lambda _: None
) -> Law:
    """The joint law of `LENGTH` tokens: those that verification decides, then plain sampling.

    `count` is told, for every run, how many candidates were accepted.
    """
    next_law, law = target_law(settings), {}

    def run(new_chance: Callable[[], ScriptedChance]) -> tuple[int, ...]:
        chance = new_chance()
        tree = grow(chance)
        tree.validate()
        logits = torch.stack([TARGET(path_to(tree, 0, node)) for node in range(tree.nodes)])
        (verdict,) = verify(tree, logits[None], [warper(settings)], [torch.tensor(PROMPT)], [chance])
        assert verdict.tokens[:-1] == tree.tokens[0, verdict.path[1:]].tolist()
        assert [int(tree.parents[0, node]) for node in verdict.path] == [-1, *verdict.path[:-1]]
        count(len(verdict.path) - 1)
        return tuple(verdict.tokens[:LENGTH])

    continuation = cache(lambda start: sequence_law(next_law, LENGTH, start=start))
    for decided, probability in all_runs(run):
        for sequence, rest in continuation(decided).items():
            law[sequence] = law.get(sequence, 0.0) + probability * rest
    return law


def error(grow: Callable[[ScriptedChance], Tree], settings: SamplingSettings) -> float:
    return distance(emitted_law(grow, settings), sequence_law(target_law(settings), LENGTH))


# --- the proof -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("candidates", ["top-k", "sampled"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_emitted_tokens_have_the_targets_law(settings, shape, candidates):
    assert error(drafting(replace(shape, candidates=candidates), settings), settings) < EXACT


@pytest.mark.parametrize("shape", [SHAPES["pair"], SHAPES["tree"]], ids=["pair", "tree"])
@pytest.mark.parametrize("name", ["plain", "top-k", "everything", "greedy"])
def test_candidates_drawn_with_replacement_keep_the_targets_law(name, shape):
    shape = replace(shape, candidates="sampled-with-replacement")
    assert error(drafting(shape, SETTINGS[name]), SETTINGS[name]) < EXACT


@pytest.mark.parametrize("candidates", ["top-k", "sampled", "sampled-with-replacement"])
def test_the_proof_sees_acceptance_and_rejection_at_every_depth(candidates):
    accepted: set[int] = set()
    emitted_law(drafting(TreeShape(2, 1, 4, candidates), SETTINGS["plain"]), SETTINGS["plain"], accepted.add)
    assert accepted == {0, 1, 2, 3}


def test_a_branch_is_taken_up_after_its_sibling_was_rejected():
    paths: set[tuple[int, ...]] = set()
    tree = Tree(torch.tensor([[3, 0, 1, 2, 2]]), torch.tensor([[-1, 0, 0, 1, 2]]), [5])
    logits = torch.stack([TARGET(path_to(tree, 0, node)) for node in range(5)])[None]
    for path, _ in all_runs(
        lambda chance: tuple(
            verify(tree, logits, [warper(SETTINGS["plain"])], [torch.tensor(PROMPT)], [chance()])[0].path
        )
    ):
        paths.add(path)
    assert paths == {(0,), (0, 1), (0, 2), (0, 1, 3), (0, 2, 4)}


def test_a_drawn_tree_declared_deterministic_is_lossless_too():
    """Whatever was drawn, given it the candidates are point masses; only their acceptance is lower."""
    grow = drafting(TreeShape(1, 2, 5, "sampled"), SETTINGS["plain"])
    assert error(lambda chance: replace(grow(chance), candidates="point", draft_probs=None), SETTINGS["plain"]) < EXACT


@hypothesis_settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_any_deterministic_tree_is_lossless(data):
    """Siblings in any order, the same token twice, branches of any depth."""
    nodes = data.draw(st.integers(1, 8))
    parents = [-1] + [data.draw(st.integers(0, node - 1)) for node in range(1, nodes)]
    tokens = [PROMPT[-1]] + [data.draw(st.integers(0, VOCAB - 1)) for _ in range(1, nodes)]
    settings = SETTINGS[data.draw(st.sampled_from(["plain", "top-k", "everything", "greedy"]))]
    tree = Tree(torch.tensor([tokens]), torch.tensor([parents]), [nodes])
    assert error(lambda _: tree, settings) < EXACT


def test_a_vocabulary_of_eight():
    settings, target, draft = SamplingSettings(temperature=0.9), table(5, 8), table(6, 8)
    for without in (True, False):

        def grow(chance, without=without):
            q = draft(()).softmax(-1)
            left, tokens = q.clone(), [0]
            for _ in range(2):
                tokens.append(chance.draw(left))
                if without:
                    left[tokens[-1]] = 0
            laws = torch.zeros(1, 3, 8, dtype=torch.float64)
            laws[0, 0] = q
            kind = "without_replacement" if without else "with_replacement"
            return Tree(torch.tensor([tokens]), torch.tensor([[-1, 0, 0]]), [3], kind, laws)

        law: Law = {}
        for token, probability in all_runs(
            lambda new_chance, grow=grow: (
                lambda chance: verify(
                    grow(chance), target(()).expand(1, 3, 8), [warper(settings, 8)], [torch.tensor(PROMPT)], [chance]
                )[0].tokens[0]
            )(new_chance())
        ):
            law[(token,)] = law.get((token,), 0.0) + probability
        expected = (target(()) / 0.9).softmax(-1).tolist()
        assert distance(law, {(token,): p for token, p in enumerate(expected)}) < EXACT


def test_rows_are_verified_on_their_own():
    tree = Tree(torch.tensor([[3, 1, 2], [0, 2, 0]]), torch.tensor([[-1, 0, 1], [-1, 0, 0]]), [3, 2])
    logits = torch.stack([torch.stack([TARGET((row, node)) for node in range(3)]) for row in range(2)])
    prefixes = [torch.tensor(PROMPT), torch.tensor([0, 0])]
    settings = [SETTINGS["plain"], SETTINGS["greedy"]]
    warpers = [warper(one) for one in settings]
    for seed in range(20):
        together = verify(tree, logits, warpers, prefixes, [Dice(seed), Dice(seed + 1)])
        for row in range(2):
            alone = Tree(tree.tokens[row : row + 1], tree.parents[row : row + 1], tree.counts[row : row + 1])
            (verdict,) = verify(alone, logits[row : row + 1], [warpers[row]], [prefixes[row]], [Dice(seed + row)])
            assert verdict == together[row]


def test_padding_is_never_accepted():
    tree = Tree(torch.tensor([[3, 1, 2]]), torch.tensor([[-1, 0, 0]]), [2])
    logits = torch.stack([TARGET(())] * 3)[None]
    paths = {
        tuple(path)
        for path, _ in all_runs(
            lambda chance: tuple(
                verify(tree, logits, [warper(SETTINGS["plain"])], [torch.tensor(PROMPT)], [chance()])[0].path
            )
        )
    }
    assert paths == {(0,), (0, 1)}


# --- greedy rows, all nodes at once ---------------------------------------------------------------------------------


@st.composite
def guesses(draw: st.DrawFn) -> tuple[Tree, Tensor]:
    """Ragged trees, siblings alike or not, and logits with ties that often agree with them."""
    counts = draw(st.lists(st.integers(1, 9), min_size=1, max_size=3))
    nodes = max(counts)
    parents, tokens = torch.zeros(len(counts), nodes, dtype=torch.long), torch.zeros(len(counts), nodes).long()
    parents[:, 0] = -1
    for row, count in enumerate(counts):
        for node in range(1, count):
            parents[row, node] = draw(st.integers(max(0, node - 3), node - 1))
        tokens[row] = torch.tensor(draw(st.lists(st.integers(0, 2), min_size=nodes, max_size=nodes)))
    logits = draw(st.lists(st.integers(-1, 1), min_size=3 * parents.numel(), max_size=3 * parents.numel()))
    return Tree(tokens, parents, counts), torch.tensor(logits, dtype=torch.float32).view(*parents.shape, 3)


@pytest.mark.parametrize("bias", [{}, {1: 0.5}], ids=["", "bias"])
@hypothesis_settings(max_examples=150, deadline=None, derandomize=True)
@given(seen=guesses())
def test_greedy_rows_get_what_the_rule_gives_them(bias, seen):
    tree, logits = seen
    rows = tree.rows
    warpers = [Warper(SamplingSettings(logit_bias=bias), 1, 3)] * rows
    dice, prefixes = [Dice(0)] * rows, [torch.tensor([0])] * rows
    before = dice[0].generator.get_state()
    found = verify(tree, logits, warpers, prefixes, dice)
    assert torch.equal(dice[0].generator.get_state(), before), "nothing is left to chance"
    assert found == rule.verify_greedy(tree, warpers[0].choices(logits)), "this is the way they go"
    assert tree.__dict__["lists"] == (tree.tokens.tolist(), tree.parents.tolist()), (
        "the tree came over with what was decided"
    )
    assert found == rule.verify_sampled(tree, logits, warpers, prefixes, dice)


@pytest.mark.parametrize("drawn", [False, True], ids=["point", "drawn"])
@pytest.mark.parametrize("name", ["plain", "temperature", "min-p", "logit-bias"])
def test_chains_at_once_are_what_the_rule_says_node_by_node(name: str, drawn: bool) -> None:
    generator = torch.Generator().manual_seed(8)
    lengths: set[tuple[int, ...]] = set()
    for seed in range(40):
        tokens = torch.randint(VOCAB, (3, 5), generator=generator)
        parents = torch.tensor([[-1, 0, 1, 2, 3], [-1, 0, 1, 0, 0], [-1, 0, 0, 0, 0]])
        laws = torch.rand(3, 5, VOCAB, generator=generator, dtype=torch.float64).softmax(-1) if drawn else None
        tree = Tree(tokens, parents, [5, 3, 1], "without_replacement" if drawn else "point", laws)
        logits = 2 * torch.randn(3, 5, VOCAB, generator=generator, dtype=torch.float64)
        warpers = [warper(SETTINGS[name]) for _ in range(3)]
        prefixes = [torch.tensor(PROMPT)] * 3
        found = rule.verify_chains(tree, warpers[0].probs(logits), [Dice(seed + row) for row in range(3)])
        assert found == verify(tree, logits, warpers, prefixes, [Dice(seed + row) for row in range(3)])
        expected = rule.verify_sampled(tree, logits, warpers, prefixes, [Dice(seed + row) for row in range(3)])
        assert found == expected
        lengths.add(tuple(len(verdict.path) for verdict in found))
    assert {one[0] for one in lengths} >= {1, 2, 3} and {one[1] for one in lengths} == {1, 2, 3}
    assert {one[2] for one in lengths} == {1}


def test_greedy_rows_beside_others_or_with_drawn_guesses_go_by_the_rule():
    tree = Tree(torch.tensor([[3, 1], [0, 2]]), torch.tensor([[-1, 0], [-1, 0]]), [2, 2])
    logits = torch.zeros(2, 2, VOCAB)
    logits[:, :, 1] = 50.0
    greedy, plain = warper(SETTINGS["greedy"]), warper(SETTINGS["plain"])
    prefixes = [torch.tensor(PROMPT)] * 2
    for warpers in ([Warper(SamplingSettings(), 1, VOCAB), plain], [greedy, plain], [greedy, greedy]):
        verdicts = verify(tree, logits, warpers, prefixes, [Dice(0), Dice(1)])
        assert [verdict.path for verdict in verdicts] == [[0, 1], [0]]
        assert [verdict.tokens for verdict in verdicts] == [[1, 1], [1]]
    laws = torch.full((2, 2, VOCAB), 1 / VOCAB)
    drawn = replace(tree, candidates="with_replacement", draft_probs=laws)
    verdicts = verify(drawn, logits, [Warper(SamplingSettings(), 1, VOCAB)] * 2, prefixes, [Dice(0), Dice(1)])
    assert [verdict.tokens for verdict in verdicts] == [[1, 1], [1]]


# --- the proof has teeth -------------------------------------------------------------------------------------------

PLAIN_TREE = TreeShape(1, 2, 5, "sampled")


def assert_caught(grow: Callable[[ScriptedChance], Tree], settings: SamplingSettings) -> None:
    assert error(grow, settings) > 1e-3


@pytest.mark.parametrize("candidates", ["top-k", "sampled", "sampled-with-replacement"])
def test_forgetting_the_residual_is_caught(monkeypatch, candidates):
    monkeypatch.setattr(rule, "residual", lambda p, q, x, without: (p, q))
    assert_caught(drafting(replace(PLAIN_TREE, candidates=candidates), SETTINGS["plain"]), SETTINGS["plain"])


def test_a_residual_that_only_strikes_out_the_rejected_token_is_caught(monkeypatch):
    """What is right for a point mass is wrong for a sampled candidate."""
    right = rule.residual
    monkeypatch.setattr(rule, "residual", lambda p, q, x, without: (right(p, None, x, False)[0], q))
    assert_caught(drafting(PLAIN_TREE, SETTINGS["plain"]), SETTINGS["plain"])


def test_not_renormalising_the_draft_law_without_replacement_is_caught(monkeypatch):
    right = rule.residual
    monkeypatch.setattr(rule, "residual", lambda p, q, x, without: right(p, q, x, False))
    assert_caught(drafting(PLAIN_TREE, SETTINGS["plain"]), SETTINGS["plain"])


def test_accepting_without_the_settings_is_caught(monkeypatch):
    """Acceptance by the target's law before the temperature, residual after it."""
    settings = SETTINGS["temperature"]

    right = rule.acceptance

    def untempered(p: Tensor, q: Tensor | None, x: Tensor) -> Tensor:
        soft = p**settings.temperature
        return right(soft / soft.sum(-1, keepdim=True), q, x)

    monkeypatch.setattr(rule, "acceptance", untempered)
    for candidates in ("top-k", "sampled"):
        assert_caught(drafting(replace(PLAIN_TREE, candidates=candidates), settings), settings)


def test_a_declared_law_that_was_not_drawn_from_is_caught():
    grow = drafting(PLAIN_TREE, SETTINGS["plain"])

    def declare_another(chance: ScriptedChance) -> Tree:
        tree = grow(chance)
        assert tree.draft_probs is not None
        return replace(tree, draft_probs=(tree.draft_probs + 1e-300).pow(0.5))

    assert_caught(declare_another, SETTINGS["plain"])


def test_declaring_draws_without_replacement_as_independent_is_caught():
    grow = drafting(TreeShape(0, 2, 3, "sampled"), SETTINGS["plain"])
    assert_caught(lambda chance: replace(grow(chance), candidates="with_replacement"), SETTINGS["plain"])


def test_pruning_a_drawn_candidate_for_its_probability_is_caught():
    grow = drafting(TreeShape(0, 1, 2, "sampled"), SETTINGS["plain"])

    def pruned(chance: ScriptedChance) -> Tree:
        tree = grow(chance)
        assert tree.draft_probs is not None
        improbable = tree.draft_probs[0, 0, tree.tokens[0, 1]] < 0.3
        return Tree.roots(tree.tokens[:, 0]) if improbable else tree

    assert_caught(pruned, SETTINGS["plain"])


@pytest.mark.parametrize("name", ["repetition", "presence", "frequency", "bad-words", "min-new-tokens"])
def test_a_processor_that_reads_the_wrong_prefix_is_caught(monkeypatch, name):
    """Every node judged with the root's prefix instead of its own."""
    tree = Tree(torch.tensor([[3, 0, 1, 3]]), torch.tensor([[-1, 0, 0, 1]]), [4])
    assert error(lambda _: tree, SETTINGS[name]) < EXACT
    monkeypatch.setattr(rule, "_after", lambda warper, prefixes, row, tokens: prefixes[row])
    assert_caught(lambda _: tree, SETTINGS[name])
