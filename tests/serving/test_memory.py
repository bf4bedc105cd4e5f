"""How many tokens the cache may hold is asked of the memory, not of how buffers are rounded."""

from __future__ import annotations

from models import tiny
from outdraft.target.limits import cache_slots, slot_bytes
from outdraft.target.target import Target


def test_a_token_takes_the_same_where_buffers_are_rounded_up() -> None:
    plain, pooled = (Target(tiny("llama-gqa"), backend=backend) for backend in ("eager", "graphs"))
    config = plain.config
    both = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * plain.dtype.itemsize
    assert slot_bytes(plain) == slot_bytes(pooled) == both


def test_half_the_slots_where_buffers_are_rounded_up(monkeypatch) -> None:
    monkeypatch.setitem(cache_slots.__globals__, "free_bytes", lambda device: 10**6)
    plain, pooled = (Target(tiny("llama-gqa"), backend=backend) for backend in ("eager", "graphs"))
    one, other = (cache_slots(target, 10**6, 16, 4) for target in (plain, pooled))
    assert one > 100 and abs(one - 2 * other) <= 1
