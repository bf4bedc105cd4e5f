"""The arranged forward that drafts is the trained network's, and its masks are those of `attention_mask`."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor

from models import tiny
from outdraft.core.tree import attention_mask
from outdraft.drafting.draft_cache import HIDDEN, DraftMask, RunAhead, causal_mask
from outdraft.methods.fspad import drafter as draft_step
from outdraft.methods.fspad import layer_step
from outdraft.methods.fspad.drafter import DraftStep, FeatureDrafter
from outdraft.methods.fspad.network import FeatureHead, FeatureHeadConfig
from outdraft.target.backends import accelerate
from outdraft.target.cache import SlotCache
from outdraft.target.target import Target

D, VOCAB, POSITIONS = 12, 9, 32
SWITCHES = [field.name for field in fields(FeatureHeadConfig) if field.type == "bool"]
"""All there are: a switch that the arranged forward does not know must fail here."""


def network(dtype: torch.dtype, **switches: Any) -> FeatureHead:
    config = FeatureHeadConfig(D, 20, 4, 2, 6, VOCAB, **switches, rope_theta=100.0, max_position_embeddings=POSITIONS)
    torch.manual_seed(7)
    head = FeatureHead(config)
    with torch.no_grad():
        for weight in head.parameters():
            weight.add_(0.3 * torch.randn_like(weight))
    return head.to(dtype).eval()


def embedding(dtype: torch.dtype) -> Tensor:
    return torch.randn(VOCAB, D, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(dtype)


@torch.inference_mode()
def both_ways(head: FeatureHead, on: FeatureHead, dtype: torch.dtype, lengths: Sequence[int]) -> list[tuple]:
    """Pairs of outputs (trained network, arranged step): a piece of decided tokens, then two levels of a tree."""
    table, generator = embedding(dtype), torch.Generator().manual_seed(1)
    step = DraftStep(on, lambda ids: table[ids], VOCAB)
    rows, found = len(lengths), []
    stock_cache, own_cache = SlotCache(rows, 1, 4), SlotCache(rows, 1, 4)

    def compare(
        count: int, seen: Tensor, positions: Tensor, slots: Tensor, angles: tuple, mask: Tensor | None, decided: bool
    ) -> None:
        tokens = torch.randint(0, VOCAB, (rows, count), generator=generator)
        width = (1 + len(head.config.tap_layers)) * D if decided else D
        features = torch.randn(rows, count, width, generator=generator, dtype=torch.float64).to(dtype)
        full = attention_mask(seen, slots, stock_cache.lengths, stock_cache.extent, positions)
        stock = head(table[tokens], features, positions[:, -count:], full, stock_cache)
        own = step(tokens, features, angles, mask, own_cache)
        found.extend(zip(stock, own, strict=True))

    for total in (max(lengths), 3):  # the second piece begins after committed ones
        slots = stock_cache.reserve(total, "cpu")
        angles = step.angles(own_cache.lengths, total)
        own_cache.reserve(total, "cpu")
        mask = causal_mask(own_cache, total, step.dtype, step.device)
        seen = torch.ones(total, total, dtype=torch.bool).tril().expand(rows, -1, -1)
        compare(total, seen, slots, slots, angles, mask, True)
        kept = [range(n) for n in lengths] if not stock_cache.lengths[0] else [range(1)] * rows
        stock_cache.commit(kept)
        own_cache.commit(kept)
    ahead, sight = RunAhead(stock_cache, POSITIONS - 1), DraftMask(own_cache, step.dtype, step.device)
    for level, parents in enumerate(([[0, 0, 0]] * rows, [[2, 0, 2]] * rows)):
        above = torch.tensor(parents)
        positions, seen, slots = ahead.place(above, above)
        mask = sight.level(above)
        compare(3, seen, positions, slots, step.angles([n + level for n in own_cache.lengths], 1), mask, False)
    return found


@pytest.mark.parametrize("lengths", [[5], [5, 5], [5, 2]], ids=["one", "even", "ragged"])
@pytest.mark.parametrize("taps", [(), (1, 3)], ids=["feature", "taps"])
@pytest.mark.parametrize("values", list(itertools.product([True, False], repeat=len(SWITCHES))))
def test_every_switch_is_the_trained_network(monkeypatch, values, taps, lengths):
    head = network(torch.float64, tap_layers=taps, **dict(zip(SWITCHES, values, strict=True)))
    monkeypatch.setattr(draft_step, "TABLE_BYTES", 2**20 * (sum(values) % 2))
    for stock, own in both_ways(head, head, torch.float64, lengths):
        real = [slice(0, n) for n in ([stock.shape[1]] if len(lengths) == 1 else lengths)]
        for row, part in enumerate(real):  # what stands after a row's own end means nothing
            torch.testing.assert_close(own[row, part], stock[row, part], atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("small", [True, False], ids=["small", "large"])
@pytest.mark.parametrize("backend", ["eager", "packed"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.06)])
@pytest.mark.parametrize("table", [True, False], ids=["table", "no-table"])
def test_low_precision_and_packed_weights_are_near(monkeypatch, table, dtype, tolerance, backend, small):
    """Against the float64 network with the same rounded weights, so that either side may round as it likes."""
    monkeypatch.setattr(draft_step, "TABLE_BYTES", 2**20 if table else 0)
    monkeypatch.setattr(layer_step, "SMALL", 2**20 if small else 0)
    head = network(dtype)
    exact = network(dtype).double()
    for (stock, _), (rough, own) in zip(
        both_ways(exact, exact, torch.float64, [5, 5]),
        both_ways(head, accelerate(head, backend), dtype, [5, 5]),
        strict=True,
    ):
        scale = stock.abs().mean()
        assert (own.double() - stock).abs().mean() < tolerance * scale
        # no worse than the network as it was trained, in the same precision
        assert (own.double() - stock).abs().mean() < 2 * (rough.double() - stock).abs().mean() + 1e-5 * scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fusion_on_native_kernels_is_one_call_and_the_same(monkeypatch, dtype):
    monkeypatch.setattr(draft_step, "TABLE_BYTES", 0)
    config = FeatureHeadConfig(64, 96, 4, 2, 16, VOCAB, max_position_embeddings=POSITIONS)
    torch.manual_seed(2)
    head = FeatureHead(config).to(dtype).eval()
    on = accelerate(head, "native")
    embeddings = torch.randn(VOCAB, 64).to(dtype)
    step = DraftStep(on, lambda ids: embeddings[ids], VOCAB)
    assert step._one_fusion is not None
    for tokens in (torch.tensor([4]), torch.arange(VOCAB).repeat(3)):
        features = torch.randn(len(tokens), 64).to(dtype)
        with torch.inference_mode():
            expected = head.fusion(embeddings[tokens], features).double()
            found = step._fuse(tokens, features)
            alone = torch.cat([step._fuse(tokens[i : i + 1], features[i : i + 1]) for i in range(len(tokens))])
        assert torch.equal(found, alone)
        least = 1e-5 if dtype == torch.float32 else 0.02  # bits of drafters' weights beside a target in bfloat16
        assert (found.double() - expected).norm() < least * expected.norm()


def test_the_table_keeps_its_bound(monkeypatch):
    head, table = network(torch.float32), embedding(torch.float32)
    needed = VOCAB * (D + 20) * 4
    for bound, there in ((needed, True), (needed - 1, False)):
        monkeypatch.setattr(draft_step, "TABLE_BYTES", bound)
        assert (DraftStep(head, lambda ids: table[ids], VOCAB)._table is not None) == there


def test_drafting_runs_the_arranged_forward_and_no_other(monkeypatch):
    target = Target(tiny("llama-gqa", dtype=torch.float32))
    head = FeatureHead(FeatureHeadConfig(target.hidden_size, 24, 2, 1, 8, target.vocab_size)).eval()
    drafter = FeatureDrafter(head, target)
    monkeypatch.setattr(FeatureHead, "forward", None)
    out = drafter.step(
        torch.tensor([[3]]), torch.zeros(1, 1, target.hidden_size), drafter.step.angles([0], 1), None, reserved(1)
    )
    assert out.p.shape == (1, 1, target.hidden_size) and not torch.equal(out.p, out.r)


def reserved(count: int) -> SlotCache:
    cache = SlotCache(1, 1, 8)
    cache.reserve(count, "cpu")
    return cache


def test_positions_stop_at_the_last_one():
    step = DraftStep(network(torch.float64), lambda ids: embedding(torch.float64)[ids], VOCAB)
    cos, _ = step.angles([POSITIONS - 2], 4)
    assert torch.equal(cos[0, 1], cos[0, 2]) and torch.equal(cos[0, 1], cos[0, 3])
    assert not torch.equal(cos[0, 0], cos[0, 1])
    ragged, _ = step.angles([POSITIONS - 2, 0], 2)
    assert torch.equal(ragged[0], cos[0, :2]) and torch.equal(ragged[1], step.angles([0], 2)[0][0])


@pytest.mark.parametrize("lengths", [[4], [4, 4], [4, 1, 2]], ids=["one", "even", "ragged"])
@pytest.mark.parametrize("widths", [[3, 3, 3], [1, 1, 1], [1, 3, 2]], ids=["tree", "chain", "widening"])
def test_masks_are_those_of_the_whole_tree(lengths, widths):
    rows, generator = len(lengths), torch.Generator().manual_seed(0)
    one, other = SlotCache(rows, 1, 32), SlotCache(rows, 1, 32)
    one.lengths, other.lengths = list(lengths), list(lengths)
    ahead, sight = RunAhead(one, 31), DraftMask(other, torch.float32, torch.device("cpu"))
    above, hidden_any = 1, False
    for width in widths:
        parents = torch.randint(0, above, (rows, width), generator=generator)
        positions, seen, slots = ahead.place(parents, parents)
        expected = attention_mask(seen, slots, one.lengths, one.extent, positions)
        mask = sight.level(parents)
        if mask is None:
            mask = torch.zeros(())
        else:
            hidden_any = True
        assert torch.equal((mask == 0).expand_as(expected), expected)
        assert ((mask == 0) | (mask == HIDDEN)).all()
        above = width
    assert hidden_any == (len(set(lengths)) > 1 or max(widths) > 1), "a chain of even rows needs no mask"
