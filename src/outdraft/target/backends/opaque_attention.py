"""Attention and the cache of a compiled forward, which stay outside of its graphs.

A graph sees one line of tokens, whichever rows they belong to, and one opaque operation for each attention. What the
operation does with queries, keys and values (write to the cache, attend under the rows' masks) is looked up when it
runs. So a graph knows nothing of rows, of lengths or of the cache's size: none of them makes torch compile again, and
tokens that only fill up a graph's shape never reach the cache.

`transformers` finds the attention by name. Knows where a cache takes keys and values; nothing of models.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, library
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ATTENTION = "outdraft_outside"
"""The name under which `transformers` finds our attention."""


class _Now(threading.local):
    """What the forward that is running in this thread looks at."""

    def __init__(self) -> None:
        self.rows = self.tokens = self.calls = 0
        self.masks: list[Tensor] = []
        self.cache: Cache | None = None


_now = _Now()


@contextmanager
def looking_at(rows: int, tokens: int, masks: Sequence[Tensor], cache: Cache) -> Iterator[_Now]:
    """Attention in this thread is of so many rows of so many tokens, under these masks, over this cache."""
    _now.rows, _now.tokens, _now.masks, _now.cache, _now.calls = rows, tokens, list(masks), cache, 0
    try:
        yield _now
    finally:
        _now.masks, _now.cache = [], None


class Outside(Cache):
    """What a graph's layers take for their cache: it hands back what it is given."""

    def __init__(self) -> None:
        super().__init__(layers=[])

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def get_query_offset(self, layer_idx: int | None = None) -> int:
        return 0


def stand_in_masks(count: int, device: torch.device) -> list[Tensor]:
    """Masks that a graph hands on in place of the real ones; the width of each says which one it stands for."""
    return [torch.ones(1, 1, 1, 1 + place, dtype=torch.bool, device=device) for place in range(count)]


# Neither a kernel of its own nor free of effects: CUDA graphs leave it out, and record what lies between.
_operators = library.Library("outdraft", "FRAGMENT")
_operators.define(
    "attend(Tensor query, Tensor key, Tensor value, int layer, int mask, float? scaling) -> Tensor",
    tags=[torch.Tag.cudagraph_unsafe],
)


def _attend(query: Tensor, key: Tensor, value: Tensor, layer: int, mask: int, scaling: float | None) -> Tensor:
    """`(1, tokens, heads, width)` what `(1, heads, tokens, width)` queries read; tokens of padding read zeros."""
    rows, tokens, cache = _now.rows, _now.tokens, _now.cache
    assert cache is not None  # graphs are run by `CompiledForward`
    count, padded = rows * tokens, query.shape[2]
    if padded > count:
        query, key, value = query[:, :, :count], key[:, :, :count], value[:, :, :count]
    if rows > 1:
        query, key, value = (x[0].unflatten(1, (rows, tokens)).transpose(0, 1) for x in (query, key, value))
    key, value = cache.update(key, value, layer)
    _now.calls += 1
    seen = _now.masks[mask]
    if seen.dtype == torch.bool:  # every layer would turn it into what is added to scores
        seen = torch.zeros_like(seen, dtype=query.dtype).masked_fill_(~seen, -torch.inf)
        _now.masks[mask] = seen
    grouped = query.shape[1] != key.shape[1]
    out = F.scaled_dot_product_attention(query, key, value, seen, scale=scaling, enable_gqa=grouped)
    out = out.transpose(1, 2).reshape(1, count, query.shape[1], -1)
    return out if padded == count else F.pad(out, (0, 0, 0, 0, 0, padded - count))


def _shape_of_attend(query: Tensor, key: Tensor, value: Tensor, layer: int, mask: int, scaling: float | None) -> Tensor:
    return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3])


for _device in ("CPU", "CUDA"):
    _operators.impl("attend", _attend, _device)
_operators.impl("attend", _shape_of_attend, "Meta")


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """`transformers`' SDPA attention; in a graph that is being made, one operation whose inside stays out of it."""
    if not torch.compiler.is_compiling():
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if attention_mask is None or kwargs.get("position_bias") is not None or kwargs.get("s_aux") is not None:
        raise NotImplementedError("attention with position biases or sinks, or without our mask")
    place = attention_mask.shape[-1] - 1
    return torch.ops.outdraft.attend(query, key, value, module.layer_idx, place, scaling), None


AttentionInterface.register(ATTENTION, attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
