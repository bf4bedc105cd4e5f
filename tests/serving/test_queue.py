"""Rows are admitted in turn between requests and never beyond the room; nobody starves."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from outdraft.serving.queue import Capacity, RequestQueue


def job(name: str, rows: int) -> Any:
    return SimpleNamespace(name=name, answers=[f"{name}{row}" for row in range(rows)])


def drained(waiting: RequestQueue) -> list[str]:
    order = []
    while (first := waiting.first()) is not None:
        order.append(first[1])
        waiting.pop()
    return order


def test_requests_take_turns_row_by_row() -> None:
    waiting = RequestQueue()
    for one in (job("a", 3), job("b", 1), job("c", 2)):
        waiting.add(one)
    assert drained(waiting) == ["a0", "b0", "c0", "a1", "c1", "a2"]


def test_a_cancelled_request_waits_no_longer() -> None:
    waiting, gone = RequestQueue(), job("a", 2)
    waiting.add(gone)
    waiting.add(job("b", 2))
    waiting.pop()
    waiting.remove(gone)
    assert len(waiting) == 1 and drained(waiting) == ["b0", "b1"]


def test_rows_stand_side_by_side_as_wide_as_the_longest() -> None:
    room = Capacity(slots=100, rows=4)
    assert room.fits([20, 20], 33) and not room.fits([20, 20], 34)
    assert not room.fits([34, 34], 1), "a short row takes as much as a long one beside it"
    assert not room.fits([1, 1, 1, 1], 1), "no more rows than allowed"


@given(st.lists(st.integers(1, 60), max_size=12))
def test_what_is_admitted_never_exceeds_the_room(sizes: list[int]) -> None:
    room, taken = Capacity(slots=100, rows=5), list[int]()
    for size in sizes:
        if room.fits(taken, size):
            taken.append(size)
        assert room.used(taken) <= 100 and len(taken) <= 5
