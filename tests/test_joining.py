"""Rows that join late, and rows whose neighbours leave, say what they say when decoded alone, with every drafter."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch

from models import perturbed, tiny
from outdraft.control import Controller, ControlSettings, Costs, Pacer
from outdraft.core.dice import Dice
from outdraft.core.sampling import Warper
from outdraft.core.sampling_settings import SamplingSettings
from outdraft.core.shape import TreeShape
from outdraft.drafting.base import Drafter
from outdraft.engine.continuous import Decoder
from outdraft.engine.drafts import Drafts
from outdraft.engine.round import decode
from outdraft.engine.rows import Row, compacted
from outdraft.target.cache import SlotCache
from outdraft.target.target import Target
from test_losslessness import DRAFTERS

PROMPTS = [[5, 6, 7, 5, 6, 7, 5, 6], [1, 2, 1, 2, 1], [9], list(range(1, 31)), [3, 3, 3]]
LENGTHS = [20, 9, 17, 6, 13]
SETTINGS = {
    "greedy": SamplingSettings(),
    "sampling": SamplingSettings(temperature=0.8, top_k=12, frequency_penalty=0.3),
}


def pair(name: str | None, dtype: torch.dtype) -> tuple[Target, Drafter | None]:
    model = tiny("llama-gqa", seed=3, dtype=dtype)
    target = Target(model)
    near = perturbed(model, lambda: tiny("llama-gqa", dtype=dtype), 0.1)
    return target, None if name is None else DRAFTERS[name](target, near)


def rows_of(target: Target, settings: Sequence[SamplingSettings]) -> list[Row]:
    return [
        Row(list(prompt), Warper(one, len(prompt), target.vocab_size), Dice(7 + place), length)
        for place, (prompt, length, one) in enumerate(zip(PROMPTS, LENGTHS, settings, strict=True))
    ]


def alone(target: Target, drafter: Drafter | None, rows: Sequence[Row], shape: TreeShape) -> list[list[int]]:
    return [row.tokens for row in decoded_alone(target, drafter, rows, shape)]


def decoded_alone(target: Target, drafter: Drafter | None, rows: Sequence[Row], shape: TreeShape) -> list[Row]:
    rows = copy.deepcopy(list(rows))
    for row in rows:
        for _ in decode(target, drafter, [row], shape):
            pass
    return rows


def in_company(decoder: Decoder, rows: Sequence[Row], pieces: int) -> None:
    """One row more every third turn, a piece of a prompt and a round each turn."""
    turn = 0
    while decoder.rows or turn <= 3 * len(rows):
        if turn % 3 == 0 and turn // 3 < len(rows):
            decoder.add([rows[turn // 3]])
        decoder.prefill(pieces)
        decoder.round()
        turn += 1


@pytest.mark.parametrize("kind", ["greedy", "sampling", "mixed"])
@pytest.mark.parametrize("name", [None, *DRAFTERS])
def test_a_row_that_joins_late_says_what_it_says_alone(name: str | None, kind: str) -> None:
    dtype = torch.float32 if kind == "greedy" else torch.float64
    target, drafter = pair(name, dtype)
    mixed = [SETTINGS["greedy"], SETTINGS["sampling"], SETTINGS["sampling"], SETTINGS["greedy"], SETTINGS["sampling"]]
    settings = mixed if kind == "mixed" else [SETTINGS[kind]] * len(PROMPTS)
    sampled = kind != "greedy" and drafter is not None and drafter.limits.probs
    shape = TreeShape(2, 2, 6) if not sampled else TreeShape(2, 2, 7, candidates="sampled")
    rows = rows_of(target, settings)
    expected = decoded_alone(target, drafter, rows, shape)
    in_company(Decoder(target, drafter, shape), rows, pieces=7)
    assert [row.tokens for row in rows] == [row.tokens for row in expected]
    if kind == "sampling":  # what it drafts follows from the whole prompt, read ahead or in the first draft
        assert [row.statistics.accepted for row in rows] == [row.statistics.accepted for row in expected]
    assert all(row.finish_reason == "length" for row in rows)
    if drafter is not None:
        assert sum(row.statistics.drafted for row in rows) > sum(row.statistics.accepted for row in rows) > 0


class Pausing(Controller):
    """Drafts two levels in two of four rounds, and nothing in its first ones."""

    def __init__(self, place: int):
        super().__init__(Costs.fixed(1, 1, 1, 1), 3, torch.Generator())
        self.rounds = -place

    def decide(self, confidences: Sequence[float], nodes: int) -> bool:
        return self.rounds % 4 > 1 and len(confidences) < 2

    def observe(self, confidences: Sequence[float], accepted: int, tokens: int, seconds: float) -> None:
        self.rounds += 1


@pytest.mark.parametrize("name", ["fspad", "eesd", "draft-model", "lookahead"])
def test_rows_whose_controllers_pause_drafting_join_as_well(name: str) -> None:
    """A row may come in before its drafter has read its prompt, beside rows whose drafter has waited for rounds."""
    target, drafter = pair(name, torch.float64)
    shape = TreeShape(2, 2, 6)
    rows = rows_of(target, [SETTINGS["greedy"]] * len(PROMPTS))
    expected = alone(target, drafter, rows, shape)
    for place, row in enumerate(rows):
        row.controller = Pausing(place)
    in_company(Decoder(target, drafter, shape), rows, pieces=64)
    assert [row.tokens for row in rows] == expected
    depths = [depth for row in rows for depth in row.statistics.depths]
    assert 0 in depths and max(depths) > 0, "some rounds drafted, some did not"


@pytest.mark.parametrize("name", ["fspad", "eesd", "draft-model"])
def test_prompts_are_read_only_where_the_drafter_does_not_rest(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once drafts pay again, whatever was left unread is read."""
    target, drafter = pair(name, torch.float64)
    shape = TreeShape.chain(2)
    rows = rows_of(target, [SETTINGS["greedy"]] * len(PROMPTS))
    expected = alone(target, drafter, rows, shape)
    read: list[int] = []
    whole = Drafts.read
    monkeypatch.setattr(Drafts, "read", lambda self: read.append(self.pending) or whole(self))
    pacer = Pacer(ControlSettings("auto"))
    dear, cheap = (Costs.fixed(begin=cost, step=cost, verify_base=1.0, verify_per_node=0.0) for cost in (9.0, 0.01))
    tuner = pacer.tuner(shape, len(rows))
    assert tuner is not None
    tuner.costs = dear
    for row in rows:
        row.controller = pacer.controller(2, None)
    decoder = Decoder(target, drafter, shape)
    for row in rows:
        decoder.add([row])
        while decoder.prefilling:
            decoder.prefill(64)
        decoder.round()
    assert len(decoder.rows) == len(rows)
    assert read == [8, 5, 1, 3], "all but the fourth one's: one, two, three and five rows had not been timed yet"
    tuner.costs = cheap
    while decoder.rows:
        tuner._bests.clear()
        decoder.round()
    assert [row.tokens for row in rows] == expected
    assert all(row.statistics.drafted for row in rows[2:3]), "it has drafted after all"


def test_several_rows_come_in_together_and_others_are_taken_out() -> None:
    target, drafter = pair("fspad", torch.float64)
    shape = TreeShape(2, 2, 6)
    rows = rows_of(target, [SETTINGS["greedy"]] * len(PROMPTS))
    expected = alone(target, drafter, rows, shape)
    decoder = Decoder(target, drafter, shape)
    decoder.add(rows[:2])
    decoder.add(rows[2:])
    while rows[0] not in decoder.prefill(4):
        pass
    decoder.remove(rows[3], "cancelled")  # amid its prompt
    decoder.remove(rows[1], "cancelled")  # after its first token
    for _ in range(60):
        decoder.prefill(4)
        decoder.round()
    assert [rows[place].tokens for place in (0, 2, 4)] == [expected[place] for place in (0, 2, 4)]
    assert len(rows[1].tokens) == 1 and rows[1].finish_reason == "cancelled"
    assert rows[3].tokens == [] and rows[3].finish_reason == "cancelled"
    assert not decoder.rows and decoder._running is None, "nothing is kept of rows that have gone"


def test_a_long_prompt_holds_nobody_up() -> None:
    """Between two of its pieces the running rows have a round."""
    target, drafter = pair("fspad", torch.float64)
    rows = rows_of(target, [SETTINGS["greedy"]] * len(PROMPTS))
    running, long = rows[0], rows[3]
    decoder = Decoder(target, drafter, TreeShape.chain(1))
    decoder.add([running])
    for _ in range(3):  # its prompt, its first token, its own first round
        decoder.prefill(64)
    decoder.add([long])
    lengths = [len(running.tokens)]
    while not long.tokens:
        decoder.prefill(5)
        decoder.round()
        lengths.append(len(running.tokens))
    assert len(lengths) - 1 == 7, "thirty tokens, five at a time, and the first token decided"
    assert all(before < after for before, after in pairwise(lengths))


def test_the_tree_may_change_from_round_to_round() -> None:
    target, drafter = pair("fspad", torch.float64)
    rows = rows_of(target, [SETTINGS["greedy"]] * len(PROMPTS))
    expected = alone(target, drafter, rows, TreeShape(2, 2, 6))
    decoder = Decoder(target, drafter, TreeShape(3, 2, 9))
    shapes = [TreeShape.chain(2), TreeShape(3, 2, 9), TreeShape.chain(1)]
    decoder.add(rows)
    turn = 0
    while decoder.rows:
        decoder.shape = shapes[turn % 3]
        decoder.prefill(64)
        decoder.round()
        turn += 1
    assert [row.tokens for row in rows] == expected


def test_leaving_rows_are_replaced_by_the_last_ones() -> None:
    assert compacted([True, False, True, False, True]) == [0, 4, 2]
    assert compacted([False, False, True]) == [2]
    assert compacted([True, True]) == [0, 1] and compacted([False]) == []


def filled(cache: SlotCache, lengths: Sequence[int], first: float) -> Any:
    count = max(lengths)
    cache.reserve(count, "cpu")
    for layer in range(2):
        keys = first + layer * 100 + torch.arange(len(lengths) * count * 4, dtype=torch.float64).view(-1, 1, count, 4)
        cache.update(keys, -keys, layer)
    cache.commit([range(length) for length in lengths])


def held(cache: SlotCache, row: int) -> list[list[float]]:
    return [
        cache._buffers[buffer][place, 0, row, 0, : cache.lengths[row]].flatten().tolist()
        for buffer, place in cache._located.values()
    ]


def test_a_cache_takes_rows_in_and_copies_no_more_than_it_must() -> None:
    one, other, empty = SlotCache(2, 2, 6), SlotCache(3, 2, 9), SlotCache(1, 2, 4)
    filled(one, [2, 5], 0.0)
    filled(other, [7, 1, 3], 1000.0)
    expected = [held(one, 0), held(one, 1), held(other, 0), held(other, 1), held(other, 2)]
    one.join(other)
    assert one.lengths == [2, 5, 7, 1, 3] and [held(one, row) for row in range(5)] == expected
    assert one.capacity == 9
    storage = one._buffers[0].data_ptr()
    one.select_rows([0, 4, 2])
    assert [held(one, row) for row in range(3)] == [expected[0], expected[4], expected[2]]
    one.join(SlotCache(2, 2, 3))
    assert one.lengths == [2, 3, 7, 0, 0] and one._buffers[0].data_ptr() == storage, "rows are used again"
    empty.join(other)
    assert empty.lengths == [0, 7, 1, 3] and held(empty, 1) == expected[2]
    one.reserve(1, "cpu")
    with pytest.raises(RuntimeError, match="pending"):
        one.join(other)
