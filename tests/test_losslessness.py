"""Whole decoding says what the target alone says: its exact law by enumeration, its exact tokens when greedy.

The expected side never touches the library's forward, cache or verification: laws and tokens come from the stock
model, called on whole sequences or through its own `generate`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any

import pytest
import torch
from outdraft_lookahead.drafter import Lookahead
from transformers import PreTrainedModel

import outdraft.target.runner as run_module
from enumeration import Law, ScriptedChance, distance, law_of, sequence_law
from models import CONTEXT, FAMILIES, VOCAB, perturbed, tiny
from outdraft.core.dice import Chance, Dice
from outdraft.core.sampling import Warper
from outdraft.core.sampling_settings import SamplingSettings
from outdraft.core.shape import TreeShape
from outdraft.core.statistics import Statistics
from outdraft.core.tree import Tree
from outdraft.drafting import draft_cache
from outdraft.drafting.base import Drafter, DraftState, RowContext, Update
from outdraft.drafting.expand import grow_dynamic
from outdraft.engine.round import decode
from outdraft.engine.rows import Row
from outdraft.errors import UserError
from outdraft.methods.dflash.drafter import DFlash
from outdraft.methods.dflash.network import DFlashConfig, DFlashNetwork
from outdraft.methods.draft_model.drafter import DraftModel
from outdraft.methods.eagle3.drafter import Eagle3Config, Eagle3Drafter, Eagle3Head
from outdraft.methods.eesd.drafter import EarlyExit
from outdraft.methods.eesd.network import ExitLayer, ExitLayerConfig
from outdraft.methods.fspad.drafter import FeatureDrafter
from outdraft.methods.fspad.network import FeatureHead, FeatureHeadConfig
from outdraft.methods.fspad_1f.drafter import OneForward
from outdraft.methods.fspad_1f.network import OneForwardConfig, OneForwardHead
from outdraft.methods.medusa.drafter import Medusa, MedusaConfig, MedusaHeads
from outdraft.methods.prompt_lookup.drafter import PromptLookup
from outdraft.target.cache import SlotCache
from outdraft.target.runner import ModelRunner
from outdraft.target.target import Target

EXACT = 1e-10
GREEDY = SamplingSettings()
PLAIN = SamplingSettings(temperature=1)
SHAPED = SamplingSettings(temperature=0.7, top_p=0.9, repetition_penalty=1.3)
NARROW = SamplingSettings(temperature=1, top_k=2)


def feature_drafter(
    target: Target,
    feature_sampling: bool,
    partial_alignment: bool,
    tap_layers: tuple[int, ...] = (),
    norm: bool = False,
) -> FeatureDrafter:
    """A drafter of random weights."""
    shapes = (target.hidden_size, 24, 2, 1, 8, target.vocab_size)
    beyond = {"tap_layers": tap_layers, "state_norm": norm}
    torch.manual_seed(3)
    head = FeatureHead(FeatureHeadConfig(*shapes, feature_sampling, partial_alignment, **beyond))
    if head.fusion.taps is not None:  # as they begin they change nothing
        torch.nn.init.normal_(head.fusion.taps.proj.weight, std=0.2)
    return FeatureDrafter(head.to(target.dtype).eval(), target)


def eagle3_drafter(target: Target, kept: bool = True, **switches: bool) -> Eagle3Drafter:
    """A drafter of random weights on three layers, which may be one and the same; all tokens but the first."""
    taps = (1, target.num_layers - 1, max(1, target.num_layers // 2))
    shapes = (target.hidden_size, 24, 2, 1, 8, target.vocab_size, target.hidden_size)
    config = Eagle3Config(*shapes, tap_ids=taps, tap_unit="input", **switches)  # type: ignore[arg-type]
    config.draft_vocab_size = target.vocab_size - 1 if kept else 0
    torch.manual_seed(3)
    head = Eagle3Head(config)
    if head.draft_tokens is not None:
        head.draft_tokens += 1
    return Eagle3Drafter(head.to(target.dtype).eval(), target)


def block_drafter(target: Target, **switches: Any) -> DFlash:
    """Two layers of random weights, the second one with a window, over two layers of the target; three candidates."""
    shapes = (target.hidden_size, 24, 2, 1, 8, target.vocab_size, target.hidden_size)
    more: dict[str, Any] = {
        "num_hidden_layers": 2,
        "block_size": 4,
        "tap_ids": (1, target.num_layers - 1),
        "tap_unit": "input",
        "num_taps": 2,
    }
    config = DFlashConfig(*shapes, mask_token_id=1, causal=(False, True), windows=(0, 4), **{**more, **switches})
    torch.manual_seed(9)
    network = DFlashNetwork(config)
    if network.draft_tokens is not None:
        network.draft_tokens += 1
    return DFlash(network.to(target.dtype).eval(), target)


def anchor_first_drafter(target: Target) -> DFlash:
    """DSpark's: a Markov head, a head of its own over all tokens but the first."""
    own: dict[str, Any] = {"own_head": True, "own_embedding": True, "draft_vocab_size": target.vocab_size - 1}
    return block_drafter(target, kind="dspark", anchor_first=True, block_size=3, markov_rank=4, **own)


def one_forward_drafter(target: Target, kept: bool = False, **switches: Any) -> OneForward:
    """FSPAD's random weights, two mask rows, and a transition that matters; all tokens but the first."""
    shapes = (target.hidden_size, 24, 2, 1, 8, target.vocab_size)
    more: dict[str, Any] = {"block_size": 3, "transition_rank": 4, "slot_candidates": 3}
    torch.manual_seed(3)
    head = OneForwardHead(
        OneForwardConfig(*shapes, draft_vocab_size=target.vocab_size - 1 if kept else 0, **more, **switches)
    )
    torch.nn.init.normal_(head.transition.after.weight)
    torch.nn.init.normal_(head.transition.basis)
    if head.draft_tokens is not None:
        head.draft_tokens += 1
    return OneForward(head.to(target.dtype).eval(), target)


def exit_drafter(target: Target, own_head: bool = False) -> EarlyExit:
    """Half of the target's layers, at least one, and a copy of its last layer a little off."""
    config = ExitLayerConfig(max(1, target.num_layers // 2), own_head)
    exit_layer = ExitLayer.beginning(target.model, config).to(target.dtype).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for weight in exit_layer.parameters():
            weight.add_(
                0.1 * torch.randn(weight.shape, generator=generator, dtype=weight.dtype) * weight.std(correction=0)
            )
    return EarlyExit(exit_layer, target)


def medusa_drafter(target: Target, own_head: bool = False) -> Medusa:
    """Three heads of random weights: beyond them no tree goes."""
    config = MedusaConfig(target.hidden_size, target.vocab_size, 3, 1, own_head)
    heads = MedusaHeads.beginning(target.model, config).to(target.dtype).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in heads.parameters():
            weight.add_(0.1 * torch.randn(weight.shape, generator=generator, dtype=weight.dtype))
    return Medusa(heads, target)


DRAFTERS: dict[str, Callable[[Target, PreTrainedModel], Drafter]] = {
    "fspad": lambda target, _: feature_drafter(target, True, True),
    "eagle": lambda target, _: feature_drafter(target, False, False),
    "feature-sampling-only": lambda target, _: feature_drafter(target, True, False),
    "partial-alignment-only": lambda target, _: feature_drafter(target, False, True),
    "fspad-beyond": lambda target, _: feature_drafter(target, True, True, tuple(range(1, target.num_layers)), True),
    "eagle3": lambda target, _: eagle3_drafter(target),
    "eagle3.1": lambda target, _: eagle3_drafter(target, False, tap_norms=True, norm_output=True, head_norms=True),
    "dflash": lambda target, _: block_drafter(target),
    "dspark": lambda target, _: anchor_first_drafter(target),
    "fspad-1f": lambda target, _: one_forward_drafter(target),
    "fspad-1f-marginal": lambda target, _: one_forward_drafter(target, True, second_layer=False, marginal=True),
    "prompt-lookup": lambda *_: PromptLookup(longest=2),
    "draft-model": lambda target, near: DraftModel(Target(near), target),
    "eesd": lambda target, _: exit_drafter(target),
    "eesd-own-head": lambda target, _: exit_drafter(target, own_head=True),
    "medusa": lambda target, _: medusa_drafter(target),
    "medusa-own-head": lambda target, _: medusa_drafter(target, own_head=True),
    "lookahead": lambda *_: Lookahead(window=5, ngram=3, pool=3),
}


def rows_of(
    target: Target,
    prompts: Sequence[Sequence[int]],
    settings: SamplingSettings,
    max_new_tokens: int,
    chances: Sequence[Chance],
    ends: Sequence[int] = (),
) -> list[Row]:
    return [
        Row(
            list(prompt),
            Warper(settings, len(prompt), target.vocab_size, ends),
            chance,
            max_new_tokens,
            frozenset(ends),
        )
        for prompt, chance in zip(prompts, chances, strict=True)
    ]


def finish(target: Target, drafter: Drafter | None, rows: list[Row], shape: TreeShape) -> list[Row]:
    for _ in decode(target, drafter, rows, shape):
        pass
    return rows


# --- the law ---------------------------------------------------------------------------------------------------------


@cache
def small(vocab: int) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A target of two layers, and a draft model near it."""

    def build() -> PreTrainedModel:
        return tiny("llama-gqa", vocab_size=vocab, hidden_size=16, initializer_range=0.3, seed=4)

    return build(), perturbed(build(), build, 0.5)


def expected_law(
    model: PreTrainedModel, prompt: tuple[int, ...], settings: SamplingSettings, length: int, ends: Sequence[int] = ()
) -> Law:
    warper = Warper(settings, len(prompt), model.config.vocab_size, ends)

    @torch.inference_mode()
    def next_law(path: tuple[int, ...]) -> torch.Tensor:
        ids = torch.tensor(prompt + path)
        return warper.probs_after(model(ids[None], use_cache=False).logits[0, -1], ids)

    return sequence_law(next_law, length, frozenset(ends))


def decoded_law(
    kind: str | None,
    vocab: int,
    prompt: tuple[int, ...],
    settings: SamplingSettings,
    length: int,
    shape: TreeShape,
    ends: Sequence[int] = (),
) -> tuple[Law, Statistics]:
    model, near = small(vocab)
    target = Target(model)
    drafter = DRAFTERS[kind](target, near) if kind is not None else None
    everything: list[Statistics] = []

    def run(new_chance: Callable[[], ScriptedChance]) -> tuple[int, ...]:
        rows = rows_of(target, [prompt], settings, length, [new_chance()], ends)
        (row,) = finish(target, drafter, rows, shape)
        everything.append(row.statistics)
        assert row.finish_reason == ("eos" if row.tokens[-1] in ends else "length")
        return tuple(row.tokens)

    return law_of(run), Statistics.sum(everything)  # type: ignore[return-value]


def assert_same_law(kind, vocab, prompt, settings, length, shape, ends=()) -> Statistics:
    law, statistics = decoded_law(kind, vocab, prompt, settings, length, shape, ends)
    assert distance(law, expected_law(small(vocab)[0], prompt, settings, length, ends)) < EXACT
    assert statistics.drafted > 0
    return statistics


CHAIN, TREE = TreeShape.chain(2), TreeShape(1, 2, 5)
PROMPT = (0, 2, 1, 0, 2)


@pytest.mark.parametrize("ends", [(), (0,)], ids=["", "eos"])
@pytest.mark.parametrize("shape", [CHAIN, TREE], ids=["chain", "tree"])
@pytest.mark.parametrize("settings", [PLAIN, SHAPED, GREEDY], ids=["plain", "shaped", "greedy"])
@pytest.mark.parametrize(
    "kind",
    [
        "fspad",
        "fspad-beyond",
        "eagle",
        "eagle3",
        "eagle3.1",
        "dflash",
        "dspark",
        "fspad-1f",
        "fspad-1f-marginal",
        "prompt-lookup",
        "draft-model",
        "eesd",
        "eesd-own-head",
        "medusa",
        "medusa-own-head",
    ],
)
def test_deterministic_candidates_keep_the_law(kind, settings, shape, ends):
    statistics = assert_same_law(kind, 3, PROMPT, settings, 3, shape, ends)
    if settings is PLAIN:
        assert 0 < statistics.accepted < statistics.drafted


@pytest.mark.parametrize("settings", [NARROW, SHAPED], ids=["top-k", "shaped"])
@pytest.mark.parametrize("candidates", ["sampled", "sampled-with-replacement"])
@pytest.mark.parametrize(
    "kind",
    [
        *("fspad", "fspad-beyond", "eagle", "eagle3", "eagle3.1", "dflash", "dspark", "fspad-1f", "fspad-1f-marginal"),
        *("draft-model", "eesd", "medusa"),
    ],
)
def test_a_drawn_tree_keeps_the_law(kind, candidates, settings):
    """Two chains of two candidates where two tokens are left to decide: the tree reaches past `max_new_tokens`."""
    statistics = assert_same_law(kind, 4, (0, 2, 1, 3), settings, 2, TreeShape(1, 2, 5, candidates))
    assert 0 < statistics.accepted < statistics.drafted


@pytest.mark.parametrize("kind", ["fspad", "dspark", "draft-model", "eesd", "medusa"])
@pytest.mark.parametrize("width", [1, 2])
def test_drawn_candidates_keep_the_law_over_two_rounds(kind, width):
    shape = TreeShape(0, width, width + 1, "sampled")
    assert_same_law(kind, 4, (0, 2, 1, 3), NARROW, 3, shape, ends=(1,))


@pytest.mark.parametrize("settings", [PLAIN, NARROW, SHAPED], ids=["plain", "top-k", "shaped"])
@pytest.mark.parametrize("kind", ["fspad-1f", "fspad-1f-marginal"])
def test_a_drawn_spine_with_chosen_siblings_keeps_the_law(kind, settings):
    statistics = assert_same_law(kind, 3, PROMPT, settings, 3, TreeShape(1, 2, 6, "spine"))
    assert 0 < statistics.accepted < statistics.drafted


@pytest.mark.parametrize("kind", ["dflash", "dspark", "fspad-1f"])
def test_drawn_blocks_keep_the_law_to_their_end(kind):
    """All candidates that a block proposes; those of the last round reach past `max_new_tokens`."""
    statistics = assert_same_law(kind, 3, PROMPT, NARROW, 3, TreeShape.chain(3, candidates="sampled"))
    assert 0 < statistics.accepted < statistics.drafted


def test_six_tokens_three_deep():
    settings = SamplingSettings(temperature=1, top_k=4)
    statistics = assert_same_law("draft-model", 6, (5, 0, 3), settings, 3, TreeShape(1, 2, 4), ends=(5,))
    assert statistics.accepted > 0


def test_plain_decoding_keeps_the_law():
    law, statistics = decoded_law(None, 4, (0, 2, 1), SHAPED, 3, CHAIN)
    assert distance(law, expected_law(small(4)[0], (0, 2, 1), SHAPED, 3)) < EXACT
    assert statistics.drafted == 0


@pytest.mark.parametrize(
    "kind",
    [
        *("fspad", "fspad-beyond", "eagle3", "dflash", "dspark", "fspad-1f"),
        *("draft-model", "eesd", "medusa", "prompt-lookup"),
    ],
)
def test_each_row_of_a_batch_keeps_its_own_law(kind):
    """Prompts, limits and settings of their own; the joint law is the product, as rows share no dice."""
    model, near = small(3)
    target = Target(model)
    drafter = DRAFTERS[kind](target, near)
    prompts = [(0, 2, 1, 0, 2), (1, 1)]

    def run(new_chance: Callable[[], ScriptedChance]) -> tuple[tuple[int, ...], ...]:
        rows = [
            *rows_of(target, prompts[:1], NARROW, 3, [new_chance()], (1,)),
            *rows_of(target, prompts[1:], PLAIN, 2, [new_chance()]),
        ]
        return tuple(tuple(row.tokens) for row in finish(target, drafter, rows, CHAIN))

    first = expected_law(model, prompts[0], NARROW, 3, (1,))
    second = expected_law(model, prompts[1], PLAIN, 2)
    product = {(a, b): p * q for a, p in first.items() for b, q in second.items()}
    assert distance(law_of(run), product) < EXACT


# --- the same tokens -------------------------------------------------------------------------------------------------

PROMPTS = [[5, 9, 9, 3, 5, 9], [7], [1, 2, 3, 4, 1, 2, 3, 4, 1, 2, 3, 4], [30, 8, 30]]
SHAPES = {
    "chain": TreeShape.chain(3),
    "tree": TreeShape(2, 4, 12),
    "drawn": TreeShape(2, 2, 7, "sampled"),
}


@cache
def pair(family: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A target and a draft model that is often right."""
    return tiny(family), perturbed(tiny(family), lambda: tiny(family), 0.1)


@cache
def stock_greedy(family: str, prompt: tuple[int, ...], count: int, end: int | None = None) -> list[int]:
    model = pair(family)[0]
    ids = torch.tensor([prompt])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=count,
        eos_token_id=end,
        pad_token_id=0,
    )
    return out[0, len(prompt) :].tolist()


def runs(families: Iterable[str]) -> list[tuple[str, str]]:
    """Families with drafters; GPT-Neo cannot be a draft model."""
    return [(family, kind) for family in families for kind in DRAFTERS if (family, kind) != ("gpt-neo", "draft-model")]


def dice(count: int) -> list[Dice]:
    return [Dice(seed) for seed in range(count)]


@pytest.mark.parametrize(("family", "kind"), runs(FAMILIES))
def test_greedy_tokens_are_those_of_stock_generate(family, kind):
    """Ragged prompts, row by row and batched, past every sliding window."""
    model, near = pair(family)
    target = Target(model)
    drafter = DRAFTERS[kind](target, near)
    expected = [stock_greedy(family, tuple(prompt), 14) for prompt in PROMPTS]
    statistics = []
    for shape in (SHAPES["chain"], SHAPES["tree"]):
        rows = finish(target, drafter, rows_of(target, PROMPTS, GREEDY, 14, dice(4)), shape)
        assert [row.tokens for row in rows] == expected
        assert {row.finish_reason for row in rows} == {"length"}
        statistics += [row.statistics for row in rows]
    total = Statistics.sum(statistics)
    assert total.drafted > 0
    if kind == "draft-model":
        assert 0 < total.accepted < total.drafted
        assert total.tau > 1.5


@pytest.mark.parametrize("kind", DRAFTERS)
def test_greedy_stops_at_the_end_of_sequence_as_stock_generate_does(kind):
    target = Target(pair("llama-gqa")[0])
    drafter = DRAFTERS[kind](target, pair("llama-gqa")[1])
    free = [stock_greedy("llama-gqa", tuple(prompt), 14) for prompt in PROMPTS]
    stopped = 0
    for end in {row[place] for row in free for place in (2, 7)}:
        rows = finish(target, drafter, rows_of(target, PROMPTS, GREEDY, 14, dice(4), [end]), SHAPES["tree"])
        assert [row.tokens for row in rows] == [stock_greedy("llama-gqa", tuple(p), 14, end) for p in PROMPTS]
        assert all((row.finish_reason == "eos") == (row.tokens[-1] == end) for row in rows)
        stopped += sum(len(row.tokens) < 14 for row in rows)
    assert stopped > 0


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 5])
def test_never_more_than_max_new_tokens(count):
    target = Target(pair("llama-gqa")[0])
    itself = DraftModel(target, target)
    for shape in SHAPES.values():
        rows = finish(target, itself, rows_of(target, PROMPTS, GREEDY, count, dice(4)), shape)
        assert [row.tokens for row in rows] == [stock_greedy("llama-gqa", tuple(p), 14)[:count] for p in PROMPTS]
        assert [len(row.accepted) for row in rows] == [count] * 4


def test_a_target_that_drafts_for_itself_is_always_right():
    target = Target(pair("llama-gqa")[0])
    rows = rows_of(target, PROMPTS, SamplingSettings(temperature=1), 13, dice(4))
    finish(target, DraftModel(target, target), rows, TreeShape.chain(3, candidates="sampled"))
    for row in rows:
        assert row.statistics.lengths == [3, 3, 3]
        assert row.statistics.acceptance_rate == 1
        assert row.accepted == [False, *([True] * 3 + [False]) * 3]


@pytest.mark.parametrize("settings", [PLAIN, SHAPED, GREEDY], ids=["plain", "shaped", "greedy"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("kind", DRAFTERS)
def test_batched_rows_equal_single_rows(kind, shape, settings):
    """With the same dice; rows leave the batch at different times."""
    target = Target(pair("llama-gqa")[0])
    drafter = DRAFTERS[kind](target, pair("llama-gqa")[1])
    limits = [9, 3, 16, 1]

    def rows(which: Sequence[int]) -> list[Row]:
        return [
            row for i in which for row in rows_of(target, [PROMPTS[i]], settings, limits[i], [Dice(100 + i)], ends=[11])
        ]

    together = finish(target, drafter, rows(range(4)), shape)
    for i, row in enumerate(together):
        (alone,) = finish(target, drafter, rows([i]), shape)
        assert (row.tokens, row.finish_reason, row.accepted) == (alone.tokens, alone.finish_reason, alone.accepted)
        assert row.statistics.lengths == alone.statistics.lengths


@pytest.mark.parametrize(("family", "kind"), runs(["llama-gqa", "gpt2", "gpt-neo", "mistral-sliding"]))
def test_decoding_ends_with_the_context(family, kind):
    """Trees may reach over the last position; the text is still the stock model's."""
    model, near = pair(family)
    target = Target(model)
    prompts = [list(range(20)) * 2, list(range(25, 30))]
    rows = rows_of(target, prompts, GREEDY, 1000, dice(2))
    finish(target, DRAFTERS[kind](target, near), rows, SHAPES["tree"])
    for row, prompt in zip(rows, prompts, strict=True):
        assert row.finish_reason == "context"
        assert row.tokens == stock_greedy(family, tuple(prompt), CONTEXT - len(prompt))


def test_a_stop_test_ends_a_row_inside_a_tree():
    target = Target(pair("llama-gqa")[0])
    free = stock_greedy("llama-gqa", tuple(PROMPTS[0]), 14)
    for place in range(1, 10):
        (row,) = rows_of(target, PROMPTS[:1], GREEDY, 14, dice(1))
        row.should_stop = lambda tokens, place=place: len(tokens) == place
        finish(target, DraftModel(target, target), [row], SHAPES["chain"])
        assert (row.tokens, row.finish_reason) == (free[:place], "stop")


def test_a_faulty_verification_would_be_seen(monkeypatch):
    """The checks above have teeth: keep every candidate, and both law and tokens are off."""
    import outdraft.core.verify as rule

    right = rule.verify_greedy

    def keeping_all(tree: Tree, choices: torch.Tensor) -> torch.Tensor:
        return choices.scatter(1, tree.parents[:, 1:], tree.tokens[:, 1:])

    monkeypatch.setattr(rule, "acceptance", lambda p, q, x: torch.ones(x.shape))
    law, _ = decoded_law("eagle", 3, PROMPT, PLAIN, 3, CHAIN)
    assert distance(law, expected_law(small(3)[0], PROMPT, PLAIN, 3)) > 1e-3
    monkeypatch.setattr(rule, "verify_greedy", lambda tree, choices: right(tree, keeping_all(tree, choices)))
    target = Target(pair("llama-gqa")[0])
    (row,) = finish(
        target, feature_drafter(target, True, True), rows_of(target, PROMPTS[:1], GREEDY, 14, dice(1)), CHAIN
    )
    assert row.tokens != stock_greedy("llama-gqa", tuple(PROMPTS[0]), 14)


@pytest.mark.parametrize("family", ["llama-gqa", "gemma2", "gpt2"])
def test_single_precision_greedy_tokens_are_those_of_stock_generate(family):
    model = tiny(family, dtype=torch.float32)
    target = Target(model)
    itself = DraftModel(target, target)
    for drafter in (itself, feature_drafter(target, True, True)):
        rows = finish(target, drafter, rows_of(target, PROMPTS, GREEDY, 14, dice(4)), SHAPES["tree"])
        for row, prompt in zip(rows, PROMPTS, strict=True):
            out = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=14, pad_token_id=0)
            assert row.tokens == out[0, len(prompt) :].tolist()


# --- what is drafted -------------------------------------------------------------------------------------------------


class Recorded(Drafter):
    """A drafter, and every tree that it proposed with the prefix it was proposed for."""

    def __init__(self, inner: Drafter):
        self.inner, self.method = inner, inner.method
        self.proposed: list[tuple[list[int], Tree]] = []

    def start(self, target: Target, cache: SlotCache) -> ModelRunner:
        return self.inner.start(target, cache)

    def slots(self, shape: TreeShape) -> int:
        return self.inner.slots(shape)

    def begin(self, prompts: Sequence[torch.Tensor], run: ModelRunner) -> DraftState:
        state = self.inner.begin(prompts, run)
        propose = state.propose

        def recording(update: Update, shape: TreeShape, rows: RowContext) -> Tree:
            tree = propose(update, shape, rows)
            self.proposed += [
                (prefix.tolist(), Tree(tree.tokens[i : i + 1], tree.parents[i : i + 1], tree.counts[i : i + 1]))
                for i, prefix in enumerate(rows.prefixes)
            ]
            return tree

        state.propose = recording  # type: ignore[method-assign]
        return state

    def default_shape(self, device: torch.device, sampling: bool = False) -> TreeShape:
        return self.inner.default_shape(device, sampling)


@torch.inference_mode()
def feature_logits(drafter: FeatureDrafter, prefix: list[int], path: list[int]) -> torch.Tensor:
    """Draft logits after a path without any cache: true features of all decided tokens, then the drafter's own."""
    tokens, layers = prefix[1:], drafter.head.config.tap_layers
    inner = drafter.target.model.base_model
    found = inner(torch.tensor([prefix[:-1]]), output_hidden_states=True, use_cache=False)
    said = torch.cat([found.last_hidden_state, *(found.hidden_states[layer] for layer in layers)], dim=-1)
    states = drafter.head.fusion.state(said)
    bare = copy.deepcopy(drafter.head)  # reads the states as they are, the target's and its own in one forward
    bare.fusion.taps = bare.fusion.state_norm = None
    for token in [*path, None]:
        p, r = bare(drafter.embed(torch.tensor([tokens])), states)
        if token is not None:
            tokens = [*tokens, token]
            states = torch.cat([states, drafter.head.fusion.state(r[:, -1:])], dim=1)
    return drafter.target.head(p[0, -1])


@pytest.mark.parametrize("chunk", [4, 1024])
@pytest.mark.parametrize(
    "switches",
    [
        (True, True),
        (False, False),
        (True, False),
        (False, True),
        (True, True, (1,)),
        (True, True, (), True),
        (False, False, (1,), True),
    ],
)
def test_a_feature_drafter_reads_the_targets_features_of_all_that_was_decided(monkeypatch, switches, chunk):
    """Round after round, in ragged batches, through its cache: what it would say of the whole text at once."""
    for module in (run_module, draft_cache):
        monkeypatch.setattr(module, "PREFILL_CHUNK", chunk)
    target = Target(pair("llama-gqa")[0])
    drafter = feature_drafter(target, *switches)
    recorded = Recorded(drafter)
    prompts = [prompt for prompt in PROMPTS if len(prompt) > 1]
    finish(target, recorded, rows_of(target, prompts, GREEDY, 9, dice(3)), SHAPES["chain"])
    assert len(recorded.proposed) > 3 * len(prompts)
    for prefix, tree in recorded.proposed:
        chain = tree.tokens[0, 1:].tolist()
        assert chain == [int(feature_logits(drafter, prefix, chain[:place]).argmax()) for place in range(3)]


@pytest.mark.parametrize("kind", ["fspad", "eagle", "draft-model"])
@torch.inference_mode()
def test_every_branch_of_a_drafted_tree_is_drafted_from_itself_alone(kind):
    """The tree grown through the drafter's cache is the one that grows when each branch is recomputed by itself."""
    model, near = pair("llama-gqa")
    target = Target(model)
    drafter = DRAFTERS[kind](target, near)
    recorded = Recorded(drafter)
    finish(target, recorded, rows_of(target, PROMPTS[2:], GREEDY, 9, dice(2)), SHAPES["tree"])
    assert len(recorded.proposed) >= 6
    for prefix, tree in recorded.proposed:

        def after(path: list[int], prefix: list[int] = prefix) -> torch.Tensor:
            if isinstance(drafter, FeatureDrafter):
                return feature_logits(drafter, prefix, path)
            return near(torch.tensor([prefix + path]), use_cache=False).logits[0, -1]

        paths: list[list[int]] = [[]]

        def step(tokens: torch.Tensor, parents: torch.Tensor, after: Callable = after) -> torch.Tensor:
            nonlocal paths
            above, new = parents[0].tolist(), tokens[0].tolist()
            paths = [[*paths[parent], token] for parent, token in zip(above, new, strict=True)]
            return torch.stack([after(path) for path in paths])[None]

        alone = grow_dynamic(torch.tensor(prefix[-1:]), after([])[None], step, SHAPES["tree"])
        assert torch.equal(tree.tokens, alone.tokens) and torch.equal(tree.parents, alone.parents)


def test_a_draft_model_says_what_it_would_say_alone():
    """Its first branch is its own greedy text after everything decided, whatever was accepted before."""
    model, near = pair("llama-gqa")
    target = Target(model)
    recorded = Recorded(DraftModel(Target(near), target))
    finish(target, recorded, rows_of(target, PROMPTS, GREEDY, 12, dice(4)), SHAPES["chain"])
    accepted = {len(prefix) for prefix, _ in recorded.proposed}
    assert len(accepted) > 4
    for prefix, tree in recorded.proposed:
        out = near.generate(torch.tensor([prefix]), do_sample=False, max_new_tokens=3, pad_token_id=0)
        assert tree.tokens[0].tolist() == [prefix[-1], *out[0, len(prefix) :].tolist()]


@pytest.mark.parametrize(
    ("text", "most", "expected"),
    [
        ([1, 2, 3, 9, 1, 2, 3], 3, [9, 1, 2]),
        ([1, 2, 3, 9, 1, 2, 3], 9, [9, 1, 2, 3, 9, 1, 2, 3, 9]),
        ([5, 7, 5, 8, 5], 1, [8]),
        ([4, 1, 6, 2, 1, 7, 4, 1], 1, [6]),
        ([1, 2, 3], 4, []),
        ([1], 4, []),
        ([3, 3, 3], 4, [3, 3, 3, 3]),
    ],
    ids=["trigram", "round-and-round", "latest", "longest-first", "nothing", "one-token", "overlap"],
)
def test_prompt_lookup_continues_the_latest_longest_match(text, most, expected):
    found = PromptLookup(longest=3).text(text)
    assert found.after(found.match()[1], most) == expected


def test_a_draft_model_must_fit_its_target():
    target = Target(pair("llama-gqa")[0])
    with pytest.raises(UserError, match="share the target's tokenizer"):
        DraftModel(Target(small(4)[0]), target)
    with pytest.raises(UserError, match="no room to run ahead"):
        DraftModel(Target(pair("gpt-neo")[0]), target)
    with pytest.raises(UserError, match="trained for a target with hidden_size 16"):
        FeatureDrafter(feature_drafter(Target(small(VOCAB)[0]), True, True).head, target)


def test_the_tiny_vocabulary_is_used_whole():
    """Guard: greedy texts of the random models are no single repeated token."""
    seen = {token for family in FAMILIES for token in stock_greedy(family, tuple(PROMPTS[0]), 14)}
    assert len(seen) > VOCAB / 2
