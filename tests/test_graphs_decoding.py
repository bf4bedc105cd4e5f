"""Decoding on backend `graphs` says, row by row and token by token, what decoding on stock modules says."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from outdraft_lookahead.drafter import Lookahead

import outdraft.target.cache as cache_module
from drafters.test_draft_vocabulary import reduced
from drafters.test_exit_folder import saved as saved_exit
from enumeration import ScriptedChance, distance, law_of
from models import tiny
from outdraft.api.generation import SpeculativeModel, load
from outdraft.core.dice import Dice
from outdraft.core.sampling import Warper
from outdraft.core.sampling_settings import SamplingSettings
from outdraft.core.shape import TreeShape
from outdraft.drafting.base import Drafter, RowContext, Update
from outdraft.engine.continuous import Decoder
from outdraft.methods import recorded as recorded_drafts
from outdraft.methods.draft_model.drafter import DraftModel
from outdraft.methods.eesd.drafter import EarlyExit
from outdraft.methods.fspad.drafter import FeatureDrafter, FeatureDraftState
from outdraft.target.backends.fused import FusedAttention
from outdraft.target.target import Target
from outdraft.target.views import Reads
from test_joining import LENGTHS, SETTINGS, alone, in_company
from test_joining import rows_of as joining_rows
from test_losslessness import (
    CHAIN,
    NARROW,
    PLAIN,
    PROMPT,
    TREE,
    exit_drafter,
    expected_law,
    feature_drafter,
    finish,
    medusa_drafter,
    pair,
    rows_of,
    small,
)

CLOSE_LAW = 1e-6
"""Stock norms compute in single precision whatever the model does."""

PROMPTS = [[5, 9, 9, 3, 5, 9], [7], [1, 2, 3, 4, 1, 2, 3, 4, 1, 2, 3, 4]]

NETWORKS: dict[str, Callable[[Target], Any]] = {
    "fspad": lambda target: feature_drafter(target, True, True).head,
    "eagle": lambda target: feature_drafter(target, False, False).head,
    "fspad-taps": lambda target: feature_drafter(target, True, True, (1,), True).head,
    "fspad-vocabulary": lambda target: reduced(target, list(range(0, 32, 2))).head,
    "eesd": lambda target: exit_drafter(target).exit_layer,
    "eesd-own-head": lambda target: exit_drafter(target, own_head=True).exit_layer,
    "medusa": lambda target: medusa_drafter(target).heads,
}
KINDS = ["none", *NETWORKS, "prompt-lookup", "lookahead", "draft-model"]


@cache
def loaded(kind: str, backend: str) -> SpeculativeModel:
    model, near = pair("llama-gqa")
    if kind in NETWORKS:
        return load(model, NETWORKS[kind](Target(model)), backend=backend)
    plain = load(model, backend=backend)
    drafters: dict[str, Callable[[], Drafter | None]] = {
        "none": lambda: None,
        "prompt-lookup": lambda: load(model, method="prompt-lookup", backend=backend).drafter,
        "lookahead": lambda: Lookahead(window=5, ngram=3, pool=3),
        "draft-model": lambda: DraftModel(Target(near, backend=backend), plain.target),
    }
    return plain.with_drafter(drafters[kind]())


def recorded(model: SpeculativeModel) -> dict[str, int]:
    """Recordings of every forward that this method makes, and of whole drafts."""
    drafter: Any = model.drafter
    runs: dict[str, Any] = {"target": model.target._run}
    if isinstance(drafter, FeatureDrafter):
        alone = drafter.reads == Reads()
        read = runs["target"] if alone else model.target.reader(drafter.reads)._last._run
        runs = {"target": read, "drafts": drafter.recorded}
    if isinstance(drafter, EarlyExit):
        reader: Any = model.target.reader(drafter.reads)
        runs = {"lower": reader._first._run, "upper": reader._last._run, "levels": drafter.shortcut._run}
        runs["drafts"] = drafter.recorded
    if isinstance(drafter, DraftModel):
        runs["draft model"] = drafter.model._run
    return {name: len(run.recordings) for name, run in runs.items()}


@pytest.fixture(autouse=True)
def unwarned() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*recorded|.*graphs")
        yield


GREEDY_SETTINGS: list[dict[str, Any]] = [
    {"tree_depth": 2, "tree_top_k": 4, "tree_size": 12},
    {"num_speculative_tokens": 3},
]
DRAWN_SETTINGS: list[dict[str, Any]] = [
    {"tree_depth": 2, "tree_top_k": 4, "tree_size": 12},
    {"num_speculative_tokens": 3, "top_k": 12},
    {"tree_depth": 1, "tree_top_k": 3, "tree_size": 7, "candidates": "sampled-with-replacement"},
    {"tree_depth": 1, "tree_top_k": 3, "tree_size": 7, "candidates": "sampled"},
    {"tree_depth": 1, "tree_top_k": 2, "tree_size": 5, "frequency_penalty": 0.4},
]
ROUNDS = [*GREEDY_SETTINGS, *({"temperature": 0.8, "seed": 3, **drawn} for drawn in DRAWN_SETTINGS)]


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_those_of_stock_modules_token_by_token(kind: str) -> None:
    """One row, then three of uneven lengths, some of which end early: the same tokens, and of them the same drafted."""
    graphs, eager = loaded(kind, "graphs"), loaded(kind, "eager")
    accepted = 0
    for settings in ROUNDS:
        if kind in ("prompt-lookup", "lookahead") and settings.get("candidates"):
            continue
        if kind == "none":
            settings = {name: settings[name] for name in settings.keys() & {"temperature", "seed", "frequency_penalty"}}
        end = loaded("none", "eager").generate(PROMPTS[2], max_new_tokens=9).tokens[0][6]
        for prompts in (PROMPTS[:1], PROMPTS) if "candidates" not in settings else (PROMPTS,):
            ours, stock = (
                m.generate(prompts, max_new_tokens=12, eos_token_id=end, **settings) for m in (graphs, eager)
            )
            assert (ours.tokens, ours.accepted) == (stock.tokens, stock.accepted)
            assert ours.finish_reasons == stock.finish_reasons
            accepted += ours.statistics.accepted
    assert graphs.target.backend == "graphs" and all(recorded(graphs).values())
    assert (accepted > 0) == (kind != "none")


@pytest.mark.parametrize("kind", ["fspad", "eesd"])
def test_drafts_are_recorded_where_nothing_forbids_it(kind: str) -> None:
    """Paces, penalties and chains without replacement are not."""
    graphs = loaded(kind, "graphs")
    drafter: Any = graphs.drafter
    counts = []
    for settings in [*ROUNDS, {**ROUNDS[0], "controller": "confidence"}]:
        drafter.recorded.recordings.clear()
        graphs.generate(PROMPTS, max_new_tokens=8, **settings)
        counts.append(len(drafter.recorded.recordings))
    assert [count > 0 for count in counts] == [True, True, True, True, True, False, True, False]


def test_paces_and_repetitions_change_nothing_of_what_is_said() -> None:
    for kind in ("fspad", "eesd"):
        graphs, stock = loaded(kind, "graphs"), loaded("none", "eager").generate(PROMPTS, max_new_tokens=30).tokens
        for controller in ("calibrated", "confidence"):
            ours = graphs.generate(PROMPTS, max_new_tokens=30, controller=controller)
            assert ours.tokens == stock
            assert ours.statistics.drafted > 0 or controller == "calibrated"  # which goes by the clock
        ours = graphs.generate(PROMPTS, max_new_tokens=30, prompt_lookup_min=1)
        assert ours.tokens == stock and ours.statistics.repeats > 0


@pytest.mark.parametrize("kind", ["fspad", "eesd", "draft-model"])
@pytest.mark.parametrize("law", SETTINGS)
def test_rows_that_join_late_say_what_they_say_alone(kind: str, law: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Buffers begin small here, so that every join makes them grow; some rows leave early."""
    monkeypatch.setattr(cache_module, "rounded_slots", lambda slots: slots)
    settings = SETTINGS["greedy"] if law == "greedy" else SamplingSettings(temperature=0.8, top_k=12)
    shape = TreeShape(2, 2, 6) if law == "greedy" else TreeShape.chain(3, candidates="sampled")
    graphs, eager = loaded(kind, "graphs"), loaded(kind, "eager")
    rows = joining_rows(graphs.target, [settings] * len(LENGTHS))
    expected = alone(eager.target, eager.drafter, rows, shape)
    in_company(Decoder(graphs.target, graphs.drafter, shape), rows, pieces=7)
    assert [row.tokens for row in rows] == expected
    assert sum(row.statistics.accepted for row in rows) > 0 and all(recorded(graphs).values())


# --- what is recorded -------------------------------------------------------------------------------------------


def test_the_next_answer_finds_the_same_buffers_and_the_same_recordings() -> None:
    for kind in ("fspad", "eesd"):
        model = loaded(kind, "graphs")
        seen = []
        for prompts in (PROMPTS, PROMPTS, PROMPTS[::-1]):
            model.generate(prompts, max_new_tokens=9)
            pool: Any = model.target.pool
            seen.append((recorded(model), sorted(buffer.data_ptr() for buffer in pool._free)))
        assert seen[0] == seen[1] == seen[2] and len(seen[0][1]) >= 2, "the target's and the drafter's"


@pytest.mark.parametrize(
    "shape",
    [
        TreeShape.chain(3, candidates="sampled"),
        TreeShape(2, 2, 7, "sampled-with-replacement"),
        TreeShape(2, 2, 6, "sampled-with-replacement"),
        TreeShape(1, 4, 3, "sampled-with-replacement"),
    ],
)
def test_recorded_drafts_are_drawn_as_others_are(shape: TreeShape, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same candidates, declared with the same laws, for as many throws of the same dice; whatever the tree is."""
    drafter: Any = loaded("fspad", "graphs").drafter
    made = []
    for records in (True, False):
        monkeypatch.setattr(drafter.recorded, "records", records)
        before = len(drafter.recorded.recordings)
        state, dice = FeatureDraftState(drafter, 3, 40), [Dice(seed) for seed in range(3)]
        warpers = [Warper(SamplingSettings(temperature=1.2, top_k=9), 4, 32) for _ in dice]
        trees = []
        with torch.inference_mode():
            for counts in ([4, 6, 3], [1, 3, 2], [2, 1, 1]):
                given = torch.Generator().manual_seed(sum(counts))
                tokens = torch.randint(32, (3, max(counts)), generator=given)
                taps = torch.randn(3, max(counts), 32, generator=given, dtype=torch.float64)
                context = RowContext([torch.empty(0)] * 3, warpers, dice)
                trees.append(state.propose(Update(tokens, taps, counts), shape, context))
        assert len(drafter.recorded.recordings) - before == (2 if records else 0), "prompts are not"
        made.append((trees, [one.uniform() for one in dice], state.cache.lengths))
    (ours, after, lengths), (others, *same) = made
    assert same == [after, lengths]
    for one, other in zip(ours, others, strict=True):
        assert (one.counts, one.candidates, one.levels) == (other.counts, other.candidates, other.levels)
        for name in ("tokens", "parents", "depths", "ancestors", "draft_probs"):
            torch.testing.assert_close(getattr(one, name), getattr(other, name))


def test_drafts_that_cannot_be_recorded_are_made_unrecorded(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*given: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(recorded_drafts._Draft, "record", refuse)
    model = load(pair("llama-gqa")[0], NETWORKS["fspad"](Target(pair("llama-gqa")[0])), backend="graphs")
    with pytest.warns(UserWarning, match="drafts cannot be recorded .out of memory") as warned:
        ours = [model.generate(PROMPTS, max_new_tokens=12, num_speculative_tokens=3) for _ in range(2)]
    stock = loaded("fspad", "eager").generate(PROMPTS, max_new_tokens=12, num_speculative_tokens=3)
    assert len(warned) == 1 and [(one.tokens, one.accepted) for one in ours] == [(stock.tokens, stock.accepted)] * 2


def test_an_exit_layer_from_a_folder_has_its_doubles(tmp_path: Path) -> None:
    model = load(tiny("llama-gqa"), saved_exit(tmp_path), backend="graphs")
    assert isinstance(model.drafter, EarlyExit)
    assert isinstance(model.drafter.exit_layer.layer.self_attn, FusedAttention)
    eager = load(tiny("llama-gqa"), tmp_path, backend="eager")
    ours, stock = (one.generate(PROMPTS, max_new_tokens=12) for one in (model, eager))
    assert (ours.tokens, ours.accepted) == (stock.tokens, stock.accepted)


# --- the law ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "settings", "shape"),
    [
        ("fspad", PLAIN, CHAIN),
        ("fspad", PLAIN, TREE),
        ("fspad", NARROW, TreeShape(1, 1, 3, "sampled")),
        ("fspad", NARROW, TreeShape(1, 2, 5, "sampled-with-replacement")),
        ("eesd", PLAIN, CHAIN),
        ("eesd", PLAIN, TREE),
        ("eesd", NARROW, TreeShape(1, 2, 5, "sampled")),
    ],
)
def test_the_law_is_kept_exactly(kind: str, settings: SamplingSettings, shape: TreeShape) -> None:
    """Chances that are no dice cannot be thrown ahead: candidates drawn by them are drafted unrecorded."""
    drawn = shape.candidates != "top-k"
    vocab, prompt, length = (4, (0, 2, 1, 3), 2) if drawn else (3, PROMPT, 3)
    model = small(vocab)[0]
    network = (
        exit_drafter(Target(model)).exit_layer if kind == "eesd" else feature_drafter(Target(model), True, True).head
    )
    on_graphs = load(model, network, backend="graphs")
    accepted = 0

    def run(new_chance: Callable[[], ScriptedChance]) -> tuple[int, ...]:
        nonlocal accepted
        rows = rows_of(on_graphs.target, [prompt], settings, length, [new_chance()])
        (row,) = finish(on_graphs.target, on_graphs.drafter, rows, shape)
        accepted += row.statistics.accepted
        return tuple(row.tokens)

    assert distance(law_of(run), expected_law(model, prompt, settings, length)) < CLOSE_LAW
    made = recorded(on_graphs)
    assert (made.pop("drafts", 0) > 0) == (not drawn)
    assert accepted > 0 and all(made.values())
