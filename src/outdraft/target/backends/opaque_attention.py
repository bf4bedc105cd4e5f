"""Attention and the cache of a compiled forward, which stay outside of its graphs.

A graph sees one line of tokens, whichever rows they belong to, and one opaque operation for each attention. The
operation looks up at run time what to do: write keys and values to the cache, attend under the rows' masks. So a graph
does not depend on rows, lengths or the cache's size, and none of them makes torch compile again. Tokens that only pad a
graph's shape never reach the cache.

`transformers` finds the attention by name.
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
    """The rows, masks and cache of the forward that runs in this thread."""

    def __init__(self) -> None:
        self.rows = self.tokens = self.calls = 0
        self.masks: list[Tensor] = []
        self.cache: Cache | None = None


_now = _Now()


@contextmanager
def looking_at(rows: int, tokens: int, masks: Sequence[Tensor], cache: Cache) -> Iterator[_Now]:
    """Set the number of rows and tokens, the masks and the cache of attention in this thread."""
    _now.rows, _now.tokens, _now.masks, _now.cache, _now.calls = rows, tokens, list(masks), cache, 0
    try:
        yield _now
    finally:
        _now.masks, _now.cache = [], None


class Outside(Cache):
    """The cache that a graph's layers get: it returns what it is given."""

    def __init__(self) -> None:
        super().__init__(layers=[])

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def get_query_offset(self, layer_idx: int | None = None) -> int:
        return 0


def stand_in_masks(count: int, device: torch.device) -> list[Tensor]:
    """Make the masks that a graph gets instead of the real ones; the width of each tells which one it stands for."""
    return [torch.ones(1, 1, 1, 1 + place, dtype=torch.bool, device=device) for place in range(count)]


# Neither a kernel of its own nor free of effects: CUDA graphs leave it out, and record what lies between.
_operators = library.Library("outdraft", "FRAGMENT")
_operators.define(
    "attend(Tensor query, Tensor key, Tensor value, int layer, int mask, float? scaling) -> Tensor",
    tags=[torch.Tag.cudagraph_unsafe],
)


def _attend(query: Tensor, key: Tensor, value: Tensor, layer: int, mask: int, scaling: float | None) -> Tensor:
    """Return the `(1, tokens, heads, width)` results of `(1, heads, tokens, width)` queries; zeros for padding."""
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
    """Run `transformers`' SDPA attention; in a graph that is being made, one operation whose inside is not traced."""
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
