"""How a text is searched for repetitions, how they are put beside drafted trees, and how users ask for them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from outdraft_lookahead.drafter import Lookahead
from typer.testing import CliRunner, Result

import outdraft
from cli_fixtures import Folders, make_folders
from models import perturbed, tiny
from outdraft.api.draft_settings import DraftSettings
from outdraft.api.generation import SpeculativeModel
from outdraft.cli import app
from outdraft.core.tree import Tree
from outdraft.drafting.ngrams import NgramSettings, Text, spliced
from outdraft.engine.rows import History
from outdraft.errors import UserError
from outdraft.methods.prompt_lookup.drafter import PromptLookup
from outdraft.serving.server import drafting
from outdraft.target.target import Target
from test_exact import drafter_of, near_ties
from test_exact import plain as plainly_decoded
from test_losslessness import DRAFTERS
from test_tree import trees, way_up

# --- searching a text ------------------------------------------------------------------------------------------------

TEXTS = st.lists(st.integers(0, 2), max_size=24)


def latest(tokens: Sequence[int], longest: int, shortest: int) -> tuple[int, int]:
    """By trying every length and place."""
    count = len(tokens)
    for n in range(longest, shortest - 1, -1):
        ends = [end for end in range(n, count) if n < count and tokens[end - n : end] == tokens[count - n :]]
        if ends:
            return n, ends[-1]
    return 0, count


@settings(max_examples=300, deadline=None)
@given(TEXTS, st.integers(1, 4), st.integers(0, 3))
def test_the_latest_occurrence_of_the_longest_ngram_is_found(tokens, shortest, more):
    text = Text(tokens, shortest + more, shortest)
    assert text.match() == latest(tokens, shortest + more, shortest)


@settings(max_examples=200, deadline=None)
@given(st.lists(TEXTS, max_size=5), st.integers(1, 3), st.integers(0, 2))
def test_a_text_that_comes_in_pieces_is_the_text_at_once(pieces, shortest, more):
    text, tokens = Text([], shortest + more, shortest), list[int]()
    for piece in pieces:
        text.extend(piece)
        tokens += piece
        assert text.tokens == tokens
        assert text.match() == Text(tokens, shortest + more, shortest).match()


@settings(max_examples=300, deadline=None)
@given(TEXTS, st.integers(0, 23), st.integers(0, 12))
def test_tokens_alike_are_counted_backwards_and_continuations_go_round(tokens, end, most):
    assume(end < len(tokens))
    text = Text(tokens, 2, 1)
    here, there = tokens[::-1], tokens[:end][::-1]
    same = next((i for i, (a, b) in enumerate(zip(here, there, strict=False)) if a != b), len(there))
    assert text.alike(end, most) == min(most, same)
    going = list(tokens)
    while len(going) < end + most:
        going.append(going[len(going) - (len(tokens) - end)])
    assert text.after(end, most) == going[end : end + most]
    assert text.after(len(tokens), most) == []


@settings(max_examples=300, deadline=None)
@given(TEXTS, st.integers(1, 3), st.integers(1, 6), st.integers(0, 8))
def test_candidates_follow_what_was_found_and_are_no_more_than_asked_for(tokens, least, most, limit):
    ngrams = NgramSettings(least, most)
    found = ngrams.candidates(ngrams.text(tokens), limit)
    n, end = latest(tokens, least, least)
    assert len(found) == (min(limit, most, 2 * Text(tokens, 1, 1).alike(end, most)) if n else 0)
    assert found[:1] == (tokens[end : end + 1] if n else [])[: min(1, limit)]
    prefix = History(tokens[:5], 30, torch.device("cpu"), ngrams)
    prefix.append(tokens[5:])
    assert prefix.repeated(limit) == found and prefix.tokens.tolist() == tokens


def test_a_prefix_without_repetitions_has_none():
    assert History([1, 1, 1, 1, 1], 4, torch.device("cpu")).repeated(4) == []


# --- beside drafted trees --------------------------------------------------------------------------------------------

CHAINS = st.lists(st.lists(st.integers(0, 40), max_size=14), min_size=3, max_size=3)


def cut_to_roots(tree: Tree, rows: Sequence[int], drawn: bool) -> Tree:
    """These rows with nothing but their roots, and laws for all."""
    counts = [1 if row in rows else count for row, count in enumerate(tree.counts)]
    nodes = max(counts)
    parents = tree.parents[:, :nodes].clone()
    for row in rows:
        parents[row, 1:] = 0
    laws = torch.rand(3, nodes, 41, dtype=torch.float64) if drawn else None
    return Tree(tree.tokens[:, :nodes], parents, counts, "without_replacement" if drawn else "point", laws)


@settings(max_examples=150, deadline=None)
@given(trees(), CHAINS, st.booleans())
def test_a_spliced_tree_has_the_chains_and_leaves_other_rows_bit_for_bit(tree, chains, drawn):
    tree = cut_to_roots(tree, [row for row, chain in enumerate(chains) if chain], drawn)
    before = (tree.tokens.clone(), tree.parents.clone(), None if tree.draft_probs is None else tree.draft_probs.clone())
    made = spliced(tree, chains)
    made.validate()
    assert torch.equal(tree.tokens, before[0]) and torch.equal(tree.parents, before[1])
    assert tree.draft_probs is None or torch.equal(tree.draft_probs, before[2])
    assert made.nodes == max(made.counts) and made.candidates == tree.candidates
    for row, chain in enumerate(chains):
        own, count = made.counts[row], tree.counts[row]
        assert own == (1 + len(chain) if chain else count)
        depths = [len(way_up(made, row, node)) - 1 for node in range(own)]
        assert made.deepest[row] == max(depths)
        assert (made.parents[row, own:] == 0).all()
        if chain:
            assert made.tokens[row, :own].tolist() == [tree.tokens[row, 0].item(), *chain]
            assert depths == list(range(own))
        else:
            assert torch.equal(made.tokens[row, :own], tree.tokens[row, :own])
            assert torch.equal(made.parents[row, :own], tree.parents[row, :own])
        if made.draft_probs is None or tree.draft_probs is None:
            continue
        assert made.draft_probs.dtype == tree.draft_probs.dtype and made.draft_probs.shape[1] == made.nodes
        if chain:
            assert made.draft_probs[row, : own - 1].argmax(-1).tolist() == chain
            assert (made.draft_probs[row, : own - 1].sum(-1) == 1).all() and (made.draft_probs[row] > 0).sum() == len(
                chain
            )
            assert not made.draft_probs[row, own - 1 :].any()
        else:
            kept = min(made.nodes, tree.nodes)
            assert (
                torch.equal(made.draft_probs[row, :kept], tree.draft_probs[row, :kept])
                and not made.draft_probs[row, kept:].any()
            )


@pytest.mark.parametrize("levels", [None, 1, 9])
def test_levels_of_a_spliced_tree_bound_its_depth(levels):
    tree = Tree(torch.tensor([[1, 2, 3], [4, 0, 0]]), torch.tensor([[-1, 0, 0], [-1, 0, 0]]), [3, 1], levels=levels)
    made = spliced(tree, [[], [5, 6, 7, 8]])
    assert made.levels == (None if levels is None else max(4, levels))
    assert made.deepest == [1, 4] and made.counts == [3, 5]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.integers(0, 40), min_size=1, max_size=9), min_size=1, max_size=4))
def test_listed_chains_are_trees(chains):
    tree = Tree.listed(chains, torch.device("cpu"))
    tree.validate()
    assert tree.counts == [len(chain) for chain in chains] and tree.draft_probs is None
    assert tree.deepest == [len(chain) - 1 for chain in chains]
    for row, chain in enumerate(chains):
        assert tree.tokens[row, : len(chain)].tolist() == chain
        assert tree.depths[row, : len(chain)].tolist() == list(range(len(chain)))


# --- settings --------------------------------------------------------------------------------------------------------

REPETITIVE = [[1, 2, 3, 4, 5] * 4, [7, 8] * 6, [9, 9, 9, 9, 9, 9]]
LONG = {"max_new_tokens": 40, "num_speculative_tokens": 3}


@pytest.fixture(scope="module")
def fast() -> SpeculativeModel:
    model = tiny("llama-gqa", max_position_embeddings=96)
    near = perturbed(model, lambda: tiny("llama-gqa", max_position_embeddings=96), 0.1)
    target = Target(model)
    return SpeculativeModel(target, DRAFTERS["draft-model"](target, near))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"prompt_lookup_min": -1}, r"prompt_lookup_min must be 0 \(never\) or more, not -1"),
        ({"prompt_lookup_min": 2.5}, "prompt_lookup_min must be a whole number"),
        ({"prompt_lookup_min": "x"}, "prompt_lookup_min must be a whole number"),
        ({"prompt_lookup_num_tokens": 0}, "prompt_lookup_num_tokens must be at least 1, not 0"),
        ({"prompt_lookup_num_tokens": -3}, "prompt_lookup_num_tokens must be at least 1, not -3"),
    ],
)
def test_impossible_settings_are_refused_in_one_line(fast, given, says):
    with pytest.raises(UserError, match=says) as error:
        fast.generate([REPETITIVE[0]], **given)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("given", [{"prompt_lookup_min": 3}, {"prompt_lookup_num_tokens": 3}])
def test_settings_that_would_do_nothing_are_refused_in_one_line(fast, given):
    for drafter, who in (
        (None, "with a drafter; give one"),
        (PromptLookup(), "beside prompt-lookup.*; num_speculative_tokens is the length of its drafts"),
        (Lookahead(window=5, ngram=3, pool=3), "beside lookahead.*; num_speculative_tokens"),
    ):
        with pytest.raises(UserError, match=who) as error:
            fast.with_drafter(drafter).generate([REPETITIVE[0]], **given)
        assert "\n" not in str(error.value)


def test_zero_is_never_and_none_is_the_default(fast):
    plain = fast.with_drafter(None).generate(REPETITIVE, max_new_tokens=40).tokens
    found = {
        name: fast.generate(REPETITIVE, prompt_lookup_min=least, **LONG)
        for name, least in (("never", 0), ("default", None), ("two", 2))
    }
    left_out = fast.generate(REPETITIVE, **LONG)
    assert all(out.tokens == plain for out in (*found.values(), left_out))
    assert left_out.statistics.repeats == found["default"].statistics.repeats
    assert found["never"].statistics.repeats == 0 < found["two"].statistics.repeats < found["two"].statistics.rounds
    assert left_out.statistics.as_dict()["repeats"] == left_out.statistics.repeats


def test_a_row_alone_drafts_long_repetitions_and_no_longer_ones_than_asked_for(fast):
    for most in (2, 9):
        out = fast.generate(
            REPETITIVE[:1], prompt_lookup_min=1, prompt_lookup_num_tokens=most, max_new_tokens=60, tree_depth=0
        )
        assert out.statistics.repeats > 0
        assert max(out.statistics.depths) == most


def test_exact_mode_keeps_its_tokens_and_drafts_no_more_than_its_shape():
    target = near_ties(torch.float32, "eager")[0]
    model = SpeculativeModel(target, drafter_of("draft-model", torch.float32, "eager"))
    expected = plainly_decoded(torch.float32, "eager")
    prompts = [[5, 9, 9, 3, 5, 9], [7], [1, 2, 3, 4, 1, 2, 3, 4], [30, 8, 30]]
    given: dict[str, Any] = {"exact": True, "max_new_tokens": 32, "prompt_lookup_min": 1}
    out = model.generate(prompts, **given)
    alone = model.generate(prompts[:1], **given, prompt_lookup_num_tokens=9)
    assert out.tokens == expected and alone.tokens == expected[:1]
    for statistics in (out.statistics, alone.statistics):
        assert 0 < statistics.repeats < statistics.rounds and max(statistics.depths) == 3


def test_custom_generate_takes_the_settings():
    model = tiny("llama-gqa")
    near = perturbed(model, lambda: tiny("llama-gqa"), 0.1)
    ids = torch.tensor([REPETITIVE[0]])
    common: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 30, "pad_token_id": 0}
    stock = model.generate(ids, do_sample=False, **common)
    for lookup in ({"prompt_lookup_min": 1, "prompt_lookup_num_tokens": 3}, {"prompt_lookup_min": 0}, {}):
        custom = outdraft.custom_generate(near, **lookup)
        assert torch.equal(model.generate(ids, do_sample=False, custom_generate=custom, **common), stock)
    with pytest.raises(UserError, match="prompt_lookup_min must be 0"):
        model.generate(ids, custom_generate=outdraft.custom_generate(near, prompt_lookup_min=-1), **common)
    with pytest.raises(UserError, match="beside prompt-lookup"):
        wrong = outdraft.custom_generate(None, method="prompt-lookup", prompt_lookup_min=3)
        model.generate(ids, custom_generate=wrong, **common)


def test_a_server_drafts_repetitions_too(fast):
    assert drafting(fast, DraftSettings()).ngrams == NgramSettings()
    assert drafting(fast, DraftSettings(prompt_lookup_min=2)).ngrams == NgramSettings(2)
    assert drafting(fast, DraftSettings(prompt_lookup_min=0)).ngrams is None
    assert drafting(fast.with_drafter(PromptLookup()), DraftSettings()).ngrams is None


# --- the command line ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return make_folders(tmp_path_factory.mktemp("cli"))


def run(*args: object) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args])


def parsed(*args: object) -> Any:
    result = run(*args, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def test_generate_drafts_repetitions_unless_told_otherwise(folders):
    common = ("generate", "one two " * 12, "--raw", "--model", folders.target, "--dtype", "float32")
    common = (*common, "--max-new-tokens", 60)
    plain = parsed(*common)
    by = {least: parsed(*common, "-d", folders.drafter, "--prompt-lookup-min", least) for least in (0, 1)}
    default = parsed(*common, "-d", folders.drafter)
    assert plain["tokens"] == default["tokens"] == by[0]["tokens"] == by[1]["tokens"]
    assert by[0]["repeats"] == 0 < by[1]["repeats"] and default["repeats"] > 0


def test_generate_refuses_repetitions_that_nobody_could_draft(folders):
    for more in (("--method", "prompt-lookup"), ()):
        result = run("generate", "hello", "--model", folders.target, "--prompt-lookup-min", 3, *more)
        assert result.exit_code == 2 and len(result.stderr.strip().splitlines()) == 1, result.stderr


def test_bench_compares_methods_with_and_without_repetitions(folders, tmp_path: Path):
    (tmp_path / "prompts.txt").write_text("one one one one one one\n")
    common = ("bench", "--model", folders.target, "-d", folders.drafter, "--data", tmp_path / "prompts.txt")
    common = (*common, "--max-new-tokens", 24, "--dtype", "float32")
    found = parsed(*common, "--methods", "none,fspad,fspad+lookup")["results"][0]["methods"]
    assert list(found) == ["plain", "fspad", "fspad+lookup"]
    assert found["fspad"]["identical"] is found["fspad+lookup"]["identical"] is True
    for wrong in ("prompt-lookup+lookup", "none+lookup", "fspad+nothing"):
        result = run(*common, "--methods", wrong)
        assert result.exit_code == 2 and len(result.stderr.strip().splitlines()) == 1, result.stderr
        assert f"unknown method '{wrong}'" in result.stderr
