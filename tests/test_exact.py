"""Exact mode: tokens, and bits, of plain decoding where rounding parts ordinary drafting from it.

The models have pairs of tokens whose logits are all but equal, in low precision, so that the last bits decide.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cache
from typing import Any

import pytest
import torch
from outdraft_lookahead.drafter import Lookahead
from torch import Tensor, nn
from transformers import PreTrainedModel
from typer.testing import CliRunner

import outdraft.target.exact.invariance as kernels
from models import perturbed, tiny
from outdraft.api.generation import SpeculativeModel
from outdraft.cli import app
from outdraft.control import ControlSettings, Costs, Pacer
from outdraft.core.shape import TreeShape
from outdraft.core.statistics import Statistics
from outdraft.drafting.base import Drafter
from outdraft.engine.round import decode
from outdraft.errors import UserError
from outdraft.methods.draft_model.drafter import DraftModel
from outdraft.methods.eesd.drafter import EarlyExit
from outdraft.methods.prompt_lookup.drafter import PromptLookup
from outdraft.target.exact import attention as exact_attention
from outdraft.target.exact.target import PerRowTarget, exactly
from outdraft.target.target import Target
from test_losslessness import DRAFTERS, GREEDY, dice, exit_drafter, finish, rows_of

PROMPTS = [[5, 9, 9, 3, 5, 9], [7], [1, 2, 3, 4, 1, 2, 3, 4], [30, 8, 30]]
SHAPES = {"chain": TreeShape.chain(3), "tree": TreeShape(2, 3, 7)}
KINDS = (
    *("fspad", "fspad-beyond", "eagle3", "dflash", "dspark", "fspad-1f"),
    *("eesd", "medusa", "draft-model", "prompt-lookup"),
)
LENGTH = 32


def build(dtype: torch.dtype) -> PreTrainedModel:
    return tiny("llama-gqa", dtype=dtype, head_dim=16, num_hidden_layers=3, max_position_embeddings=160)


@cache
def near_ties(dtype: torch.dtype, backend: str) -> tuple[Target, PreTrainedModel, Target]:
    """A target whose every second token is nearly the one before it, a draft model, and the target unpacked."""
    model = build(dtype)
    weight = model.get_output_embeddings().weight
    noise = torch.randn(len(weight) // 2, weight.shape[1], generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        weight[1::2] = weight[0::2] * (1 + (0.01 if dtype == torch.bfloat16 else 1e-6) * noise).to(dtype)
    near = perturbed(model, lambda: build(dtype), 0.05)
    return Target(model, backend=backend), near, Target(model)


def drafter_of(kind: str, dtype: torch.dtype, backend: str) -> Drafter:
    target, near, unpacked = near_ties(dtype, backend)
    if kind == "eesd":
        return EarlyExit(exit_drafter(unpacked).exit_layer, target)
    return DRAFTERS[kind](target, near)


@cache
def plain(dtype: torch.dtype, backend: str) -> list[list[int]]:
    """Every prompt alone, without a drafter."""
    target = near_ties(dtype, backend)[0]
    return [
        finish(target, None, rows_of(target, [prompt], GREEDY, LENGTH, dice(1)), SHAPES["chain"])[0].tokens
        for prompt in PROMPTS
    ]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("dtype", "backend"),
    [(torch.bfloat16, "packed"), (torch.bfloat16, "eager"), (torch.float32, "eager")],
    ids=["bfloat16-packed", "bfloat16-eager", "float32-eager"],
)
def test_exact_tokens_are_those_of_plain_decoding_where_ordinary_drafting_parts(kind, dtype, backend):
    """Alone and in a batch, whose rows leave at different times; chains and trees."""
    target, drafter, expected = near_ties(dtype, backend)[0], drafter_of(kind, dtype, backend), plain(dtype, backend)
    exact, parted, statistics = exactly(target), 0, []
    for shape in SHAPES.values():
        for prompt, tokens in zip(PROMPTS, expected, strict=True):
            ordinary = finish(target, drafter, rows_of(target, [prompt], GREEDY, LENGTH, dice(1)), shape)
            parted += ordinary[0].tokens != tokens
        alone = rows_of(exact, PROMPTS[:1], GREEDY, LENGTH, dice(1))
        assert finish(exact, drafter, alone, shape)[0].tokens == expected[0]
        rows = rows_of(exact, PROMPTS, GREEDY, LENGTH, dice(4))
        for place, row in enumerate(rows):
            row.max_new_tokens -= 5 * place
        finish(exact, drafter, rows, shape)
        assert [row.tokens for row in rows] == [t[: row.max_new_tokens] for t, row in zip(expected, rows, strict=True)]
        statistics += [row.statistics for row in rows]
    total = Statistics.sum(statistics)
    assert parted > 0
    assert 0 < total.accepted < total.drafted


def test_a_batch_without_a_drafter_equals_its_rows_alone():
    exact = exactly(near_ties(torch.bfloat16, "packed")[0])
    rows = finish(exact, None, rows_of(exact, PROMPTS, GREEDY, LENGTH, dice(4)), SHAPES["chain"])
    assert [row.tokens for row in rows] == plain(torch.bfloat16, "packed")


def test_a_controller_and_an_end_of_sequence_change_nothing():
    target = near_ties(torch.bfloat16, "packed")[0]
    exact, drafter = exactly(target), drafter_of("draft-model", torch.bfloat16, "packed")
    expected = plain(torch.bfloat16, "packed")
    end = expected[0][20]
    pacer = Pacer(ControlSettings("beta"))
    rows = rows_of(exact, PROMPTS, GREEDY, LENGTH, dice(4), [end])
    for row in rows:
        row.controller = pacer.controller(4, 0)
    for _ in decode(exact, drafter, rows, SHAPES["chain"], Costs()):
        pass
    for row, tokens in zip(rows, expected, strict=True):
        assert row.tokens == tokens[: tokens.index(end) + 1 if end in tokens else LENGTH]


@pytest.mark.parametrize("family", ["mistral-sliding", "gemma2", "qwen3", "gpt2", "llama-mha", "mixtral"])
def test_exact_mode_across_families(family):
    """Sliding windows, capped logits, norms of queries, convolutions as layers, keys unshared, experts."""
    model = tiny(family, dtype=torch.float32)
    target = Target(model)
    exact = exactly(target)
    for drafter in (PromptLookup(longest=2), DraftModel(target, target)):
        rows = finish(exact, drafter, rows_of(exact, PROMPTS[:3], GREEDY, 20, dice(3)), SHAPES["tree"])
        for row, prompt in zip(rows, PROMPTS, strict=False):
            (alone,) = finish(target, None, rows_of(target, [prompt], GREEDY, 20, dice(1)), SHAPES["chain"])
            assert row.tokens == alone.tokens
    assert exact.exactness.checks > 1


def test_the_context_may_end_inside_a_tree():
    target, drafter = near_ties(torch.bfloat16, "packed")[0], drafter_of("draft-model", torch.bfloat16, "packed")
    exact, prompt = exactly(target), list(range(30)) * 5
    (alone,) = finish(target, None, rows_of(target, [prompt], GREEDY, 99, dice(1)), SHAPES["chain"])
    (row,) = finish(exact, drafter, rows_of(exact, [prompt], GREEDY, 99, dice(1)), SHAPES["tree"])
    assert (row.tokens, row.finish_reason) == (alone.tokens, "context")


# --- what is reported ------------------------------------------------------------------------------------------------


def test_the_output_says_by_what_it_is_exact():
    target = near_ties(torch.bfloat16, "packed")[0]
    model = SpeculativeModel(target, drafter_of("draft-model", torch.bfloat16, "packed"))
    settings = {"max_new_tokens": LENGTH, "num_speculative_tokens": 3}
    assert model.generate(PROMPTS, **settings).exactness is None
    output = model.generate(PROMPTS, exact=True, **settings)
    assert output.tokens == plain(torch.bfloat16, "packed")
    first = output.exactness
    assert str(first) == "by construction"
    # Three layers of four linears (some joined), two norms and an activation; final norm, rotary embedding and head.
    assert first.stacked + first.one_by_one == 3 * 7 + 3
    assert first.checks > 0 and first.check_seconds > 0
    assert model.generate(PROMPTS, exact=True, **settings).exactness == first  # nothing is checked twice
    assert max(model.generate(PROMPTS[:1], exact=True, max_new_tokens=20).statistics.depths) == 3  # a chain by default
    assert model.with_drafter(None).generate(PROMPTS[:1], exact=True, **settings | {"num_speculative_tokens": None})
    assert set(asdict(first)) == {"guarantee", "stacked", "one_by_one", "checks", "check_seconds"}


def test_the_command_line_knows_exact() -> None:
    def run(*more: str) -> dict[str, Any]:
        common = ["generate", "Why is the sky blue?", "--draft-model", "reference", "--max-new-tokens", "12", "--json"]
        result = CliRunner().invoke(app, [*common, *more])
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    exact, without = run("--exact", "--num-speculative-tokens", "3"), run("--method", "none")
    assert exact["tokens"] == without["tokens"] and exact["drafted"] > 0
    assert exact["exactness"]["guarantee"] == "by construction" and without["exactness"] is None


def refusals() -> dict[str, tuple[str, Callable[[], object]]]:
    def narrow() -> PreTrainedModel:
        return tiny("llama-gqa", dtype=torch.bfloat16)

    def lookahead() -> None:
        target = near_ties(torch.bfloat16, "packed")[0]
        SpeculativeModel(target, Lookahead.for_device(target.device)).generate([[1, 2]], exact=True)

    def sampled(**settings: object) -> None:
        SpeculativeModel(near_ties(torch.bfloat16, "packed")[0]).generate([[1, 2]], exact=True, **settings)

    def hooked() -> PreTrainedModel:
        model = build(torch.float32)
        layer = model.model.layers[0]
        layer.forward = layer.forward  # as accelerate's hooks do
        return model

    return {
        "temperature": ("exact=True is for greedy decoding", lambda: sampled(temperature=0.5)),
        "do_sample": ("exact=True is for greedy decoding", lambda: sampled(do_sample=True)),
        "eager attention": (
            "needs attn_implementation='sdpa'",
            lambda: exactly(Target(tiny("llama-gqa", attention="eager"))),
        ),
        "own attention": ("attention of its own", lambda: exactly(Target(tiny("falcon")))),
        "unaligned": ("multiple of 32 bytes, not 16", lambda: exactly(Target(narrow()))),
        "hooks": ("neither quantised nor hooked", lambda: exactly(Target(hooked()))),
        "unknown run": ("does not cover this method", lookahead),
    }


@pytest.mark.parametrize("case", refusals())
def test_what_cannot_be_promised_is_refused_in_one_line(case):
    message, attempt = refusals()[case]
    with pytest.raises(UserError, match=message) as error:
        attempt()
    assert "\n" not in str(error.value)


def test_a_device_that_was_not_measured_is_refused(monkeypatch):
    monkeypatch.setattr(Target, "device", torch.device("cuda"))
    with pytest.raises(UserError, match="not offered on cuda"):
        exactly(Target(build(torch.float32)))


# --- the checks have teeth -------------------------------------------------------------------------------------------


def summed(x: Tensor, order: Sequence[int]) -> Tensor:
    """`(rows, tokens, width)` to sums over the width in this order."""
    total = torch.zeros(x.shape[:-1], dtype=torch.float32)
    for place in order:
        total = total + x[..., place].float()
    return total[..., None].to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_cancelling_numbers_show_another_order_of_summation(dtype):
    """Which ordinary random numbers hide in 16 bits."""
    made, x = kernels.cancelling(nn.Linear(48, 3, bias=False), torch.zeros(1, 4, 48, dtype=dtype), torch.Generator())

    def by_rows(x: Tensor) -> Tensor:
        order = range(48) if x.shape[1] == 1 else range(47, -1, -1)
        return summed(x * made.weight[0], order)

    assert (made.weight.double() @ x[0].double().T).abs().max() < 1e-9
    assert not kernels.same_alone(by_rows, x)
    assert kernels.same_alone(lambda x: summed(x * made.weight[0], range(48)), x)


def test_an_activation_that_treats_remainders_differently_is_found():
    def activation(x: Tensor) -> Tensor:
        return x + 1 if x.numel() > kernels.PIECE else (x.float() + 1.001).to(x.dtype)

    assert not kernels._same_in_remainders(activation, torch.bfloat16)
    assert kernels._same_in_remainders(lambda x: x * 2, torch.bfloat16)


def test_one_by_one_gives_every_token_a_call_of_its_own():
    shapes = []

    def function(x: Tensor, places: Tensor, kind: str) -> tuple[Tensor, Tensor]:
        shapes.append((x.shape, places.shape, kind))
        return x * 2, places + 1

    x, places = torch.arange(24.0).view(2, 3, 4), torch.arange(6).view(2, 3)
    doubled, next_places = kernels.one_by_one(function, x, places, kind="full")
    assert torch.equal(doubled, x * 2) and torch.equal(next_places, places + 1)
    assert shapes == [((1, 1, 4), (1, 1), "full")] * 6
    assert torch.equal(kernels.one_by_one(lambda x: x + 1, x[0]), x[0] + 1)


def test_a_forward_that_is_not_exact_is_an_error_before_any_answer(monkeypatch):
    """Keys in a tree's order rather than the path's, or kernels taken to be what they are not."""

    def muddled(module: object, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **settings: object) -> object:
        return exact_attention.attend(module, query, key, value, mask, **settings | {"scaling": 0.24})

    exact_attention.AttentionInterface.register(exact_attention.ATTENTION, muddled)
    try:
        with pytest.raises(UserError, match=r"a forward over 1 x 4 tokens gives other keys \(layer 1\)"):
            PerRowTarget(Target(build(torch.float32)))
    finally:
        exact_attention.AttentionInterface.register(exact_attention.ATTENTION, exact_attention.attend)


def test_the_model_is_left_as_it_was():
    model = build(torch.bfloat16)
    before = {name: type(module) for name, module in model.named_modules()}
    exactly(Target(model))
    assert model.config._attn_implementation == "sdpa"
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert not any("_outdraft_now" in module.__dict__ for module in model.modules())
