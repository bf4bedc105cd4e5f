"""The slot cache against a plain list of what every row should hold."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from outdraft.target.buffers import BufferPool, rounded_rows, rounded_slots
from outdraft.target.cache import SlotCache

HEADS, WIDTH = 2, 3


def states(names: Tensor, width: int = WIDTH, heads: int = HEADS) -> Tensor:
    """Keys or values `(rows, heads, tokens, width)` by which every token can be told from every other."""
    return names.double()[:, None, :, None] + torch.arange(heads * width).view(heads, 1, width) / 100


def write(cache: SlotCache, names: Tensor, layers: int = 2) -> list[tuple[Tensor, Tensor]]:
    """One forward of all layers; layer l adds 1000 l, values are the negated keys."""
    cache.reserve(names.shape[1], "cpu")
    return [cache.update(states(names + 1000 * layer), -states(names + 1000 * layer), layer) for layer in range(layers)]


def held(cache: SlotCache, row: int, layers: int = 2) -> list[list[int]]:
    """The names of a row's committed tokens, layer by layer, both keys and values checked."""
    probe = write(cache, torch.full((cache.rows, 1), 999), layers)
    cache.rollback()
    result = []
    for layer, (keys, values) in enumerate(probe):
        names = (keys[row, 0, : cache.lengths[row], 0] - 1000 * layer).round().long()
        assert torch.equal(keys[row, :, : cache.lengths[row]], states(names[None] + 1000 * layer)[0])
        assert torch.equal(values, -keys)
        result.append(names.tolist())
    return result


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_rows_hold_what_was_committed(data):
    """Any number of forwards before any commit of any path, growing as it must, rows leaving and doubling."""
    cache = SlotCache(3, 2, data.draw(st.integers(1, 6)))
    expected: list[list[int]] = [[], [], []]
    fresh = 1
    for _ in range(data.draw(st.integers(1, 5))):
        forwards = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
        pending: list[list[int]] = [[] for _ in expected]
        for count in forwards:
            names = torch.arange(fresh, fresh + len(expected) * count).view(len(expected), count)
            fresh += names.numel()
            for row, new in enumerate(names.tolist()):
                pending[row] += new
            for layer, (keys, _) in enumerate(write(cache, names)):
                assert keys.shape[2] == cache.extent
                for row in range(len(expected)):
                    visible = (keys[row, 0, :, 0] - 1000 * layer).round().long().tolist()
                    mine = expected[row] + pending[row]
                    assert visible[: len(mine)] == mine
        if data.draw(st.booleans()):
            paths = [
                sorted(data.draw(st.sets(st.integers(0, sum(forwards) - 1), max_size=sum(forwards)))) for _ in expected
            ]
            cache.commit(paths)
            for row, path in enumerate(paths):
                expected[row] += [pending[row][offset] for offset in path]
        else:
            cache.rollback()
        if data.draw(st.booleans()):
            rows = data.draw(st.lists(st.integers(0, len(expected) - 1), min_size=1, max_size=3))
            cache.select_rows(rows)
            expected = [list(expected[row]) for row in rows]
        assert cache.lengths == [len(row) for row in expected]
        for row in range(len(expected)):
            assert held(cache, row) == [expected[row]] * 2


def test_capacity_doubles_and_nothing_is_lost():
    cache = SlotCache(1, 2, 4)
    for name in range(20):
        write(cache, torch.tensor([[name]]))
        cache.commit([[0]])
    assert cache.capacity == 32
    assert held(cache, 0) == [list(range(20))] * 2


def test_whole_buffers_are_those_that_hold_the_tokens_after_growth():
    cache = SlotCache(1, 1, 2)
    write(cache, torch.tensor([[1, 2]]), 1)
    cache.commit([[0, 1]])
    probe = states(torch.zeros(1, 1))
    before = cache.whole(probe, probe, 0)
    assert cache.whole(probe, probe, 0) is before
    write(cache, torch.tensor([[3, 4]]), 1)
    keys, values = cache.whole(probe, probe, 0)
    assert keys[0, 0, :4, 0].tolist() == [1, 2, 3, 4] == (-values[0, 0, :4, 0]).tolist()


def test_layers_of_different_shapes_have_their_own_place():
    """More heads, wider keys than values, wider values than keys."""
    shapes = {0: (2, 4, 4), 1: (1, 4, 4), 2: (2, 4, 4), 3: (2, 6, 4), 4: (2, 3, 5)}  # heads, key width, value width
    cache = SlotCache(2, 5, 2)

    def forward(names: Tensor) -> dict[int, tuple[Tensor, Tensor]]:
        cache.reserve(names.shape[1], "cpu")
        return {
            layer: cache.update(states(names + 10 * layer, k, heads), -states(names + 10 * layer, v, heads), layer)
            for layer, (heads, k, v) in shapes.items()
        }

    forward(torch.tensor([[1, 2, 3], [4, 5, 6]]))
    cache.commit([[0, 2], [1]])
    for layer, (keys, values) in forward(torch.tensor([[7], [8]])).items():
        heads, k, v = shapes[layer]
        for row, names in enumerate([[1, 3, 7], [5, 8]]):
            expected = torch.tensor([names]) + 10 * layer
            assert torch.equal(keys[row, :, : len(names)], states(expected, k, heads)[0])
            assert torch.equal(values[row, :, : len(names)], -states(expected, v, heads)[0])


def test_a_forward_that_was_not_reserved_is_refused():
    cache = SlotCache(1, 2, 4)
    names = torch.tensor([[1, 2]])
    with pytest.raises(RuntimeError, match="reserved"):
        cache.update(states(names), states(names), 0)
    write(cache, names)
    cache.commit([[0, 1]])
    with pytest.raises(RuntimeError, match="reserved"):
        cache.update(states(names), states(names), 0)
    cache.reserve(1, "cpu")
    with pytest.raises(RuntimeError, match="2 tokens written, 1 reserved"):
        cache.update(states(names), states(names), 0)


def test_lengths_as_transformers_asks_for_them():
    cache = SlotCache(2, 2, 4)
    assert not cache.is_initialized and cache.nbytes == 0
    write(cache, torch.tensor([[1, 2, 3], [4, 5, 6]]))
    assert cache.is_initialized and cache.nbytes > 0
    assert cache.get_seq_length() == 0 and cache.get_mask_sizes(3) == (3, 0)
    cache.commit([[0, 1, 2], [0]])
    assert cache.get_seq_length() == 3
    cache.reserve(2, "cpu")
    assert cache.get_seq_length() == 3 and cache.get_mask_sizes(2) == (5, 0)
    assert cache.max_batch_size == 2


# --- buffers that outlive their caches ---------------------------------------------------------------------------


def test_sizes_are_rounded_so_that_few_differ():
    assert [rounded_rows(rows) for rows in range(10)] == [0, 1, 2, 4, 4, 8, 8, 8, 8, 16]
    slots = (1, 512, 513, 768, 769, 1024, 1025, 1536, 1537, 3072, 3073, 4096)
    assert [rounded_slots(count) for count in slots] == [
        512, 512, 768, 768, 1024, 1024, 1536, 1536, 2048, 3072, 4096, 4096
    ]  # fmt: skip


def test_a_buffer_comes_back_when_its_cache_ends_and_serves_the_next():
    pool = BufferPool()
    cache = SlotCache(3, 2, 7, pool)
    assert (cache.rows, cache.room, cache.capacity) == (3, 4, 512)
    write(cache, torch.tensor([[1, 2], [3, 4], [5, 6]]))
    cache.commit([[0], [0, 1], []])
    assert [held(cache, row)[0] for row in range(3)] == [[1], [3, 4], []]
    place, shape = cache.addresses, cache._buffers[0].shape
    assert not pool._free
    del cache
    assert [buffer.shape for buffer in pool._free] == [shape]
    again = SlotCache(4, 2, 500, pool)
    write(again, torch.tensor([[7], [8], [9], [10]]))
    assert again.addresses == place and not pool._free
    beside = SlotCache(4, 2, 500, pool)
    write(beside, torch.tensor([[7], [8], [9], [10]]))
    assert beside.addresses != place, "lent to one at a time"


def test_a_cache_that_grows_gives_its_old_buffer_back():
    pool = BufferPool()
    cache = SlotCache(1, 2, 4, pool)
    write(cache, torch.arange(300)[None])
    cache.commit([range(300)])
    first = cache.addresses
    cache.room_for(212)
    assert cache.addresses == first, "512 slots are enough"
    cache.room_for(213)
    assert cache.capacity == 768 and held(cache, 0) == [list(range(300))] * 2
    assert [buffer.data_ptr() for buffer in pool._free] == [first[2]]
    cache.join(SlotCache(2, 2, 4, pool))
    assert (cache.rows, cache.room, cache.capacity) == (3, 4, 768) and held(cache, 0)[0] == list(range(300))


def test_buffers_that_a_batch_has_grown_through_are_kept_and_no_more_memory_than_thrice_the_largest() -> None:
    pool, like = BufferPool(), torch.empty(0)
    buffers = [pool.take((size,), like) for size in (1, 1, 2, 4, 8)]
    pool.give_back(buffers)
    assert len(pool._free) == 5 and pool.take((2,), like) is buffers[2]
    assert pool.take((8,), torch.empty(0, dtype=torch.float64)) is not buffers[4], "in another precision"
    pool.give_back([torch.empty(8), torch.empty(2), torch.empty(8)])
    assert [len(buffer) for buffer in pool._free] == [8, 2, 8], "those that were given back last"


def test_unused_buffers_give_way_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = BufferPool()
    pool.give_back([torch.empty(4)])
    made = torch.Tensor.new_zeros

    def short(like: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        if pool._free:
            raise torch.OutOfMemoryError
        return made(like, shape)

    monkeypatch.setattr(torch.Tensor, "new_zeros", short)
    assert pool.take((8,), torch.empty(0)).shape == (8,) and not pool._free


def test_tokens_written_behind_the_committed_ones_may_be_committed_afterwards():
    cache = SlotCache(2, 1, 8)
    write(cache, torch.tensor([[1, 2], [3, 4]]), 1)
    cache.commit([[0, 1], [0]])
    probe = states(torch.zeros(2, 1))
    keys, values = cache.whole(probe, probe, 0)
    assert keys.shape == values.shape == (2, HEADS, 8, WIDTH)
    keys[0, :, 2:4], values[0, :, 2:4] = states(torch.tensor([[5, 6]]))[0], -states(torch.tensor([[5, 6]]))[0]
    keys[1, :, 1:2], values[1, :, 1:2] = states(torch.tensor([[7]]))[0], -states(torch.tensor([[7]]))[0]
    cache.advance([2, 1])
    assert [held(cache, row, 1) for row in range(2)] == [[[1, 2, 5, 6]], [[3, 7]]]
