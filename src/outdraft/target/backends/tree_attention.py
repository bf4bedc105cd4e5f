"""Tree attention over a cache, with lengths read on the device, as a recorded forward needs it.

Every pending token sees all committed tokens of its row and, of the pending tokens, those in its ancestor mask. No mask
over the whole cache is made and no host number is needed, so one recording serves every length. On a GPU one Triton
kernel does it (`tree_kernels.py`); elsewhere plain operations, which define what the kernel computes.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from outdraft.core.tensors import current
from outdraft.target.cache import LayerCache

ATTENTION = "outdraft_tree"
"""The name under which `transformers` finds our attention."""


@lru_cache(maxsize=1)
def has_triton() -> bool:
    """Return True if Triton is installed."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True


@dataclass
class Pending:
    """The pending tokens of a forward, for its attentions; all tensors on the device.

    Attributes:
        lengths: `(rows,)` committed tokens of every row; pending ones lie in the slots after them, in order.
        seen: `(rows, tokens, m)` ancestor mask: which of the `m` pending tokens each of the forward's own, the last
            ones, sees.
        positions: `(rows, m)` positions of the pending tokens.
        windows: sliding window of every kind of layer, None for everything.
        cache: a cache that has `whole`.
        views: the tokens as other kernels read them, made once for all layers.
    """

    lengths: Tensor
    seen: Tensor
    positions: Tensor
    windows: tuple[int | None, ...]
    cache: Any
    views: dict[Any, Any] = field(default_factory=dict)

    @property
    def slots(self) -> Tensor:
        """`(rows, tokens)` slots of the forward's tokens."""
        tokens, pending = self.seen.shape[1:]
        own = torch.arange(pending - tokens, pending, device=self.lengths.device)
        return self.lengths[:, None].long() + own

    def window(self, mask: Tensor | None) -> int | None:
        """Return the window of the kind of layer that got this stand-in for a mask."""
        return self.windows[0 if mask is None else mask.shape[-1] - 1]

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, scale: float, mask: Tensor | None) -> Tensor:
        """Return `(rows, tokens, heads * width)` attention of `(rows, heads, tokens, width)` queries on a cache."""
        window = self.window(mask)
        return tree_attention(query, keys, values, self.lengths, self.seen, self.positions, scale, window)

    def held(self, key_states: Tensor, value_states: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Return a layer's buffers of keys and of values, each `(rows, kv_heads, capacity, width)`."""
        keys, values = self.cache.whole(key_states, value_states, layer)
        return keys[: len(self.lengths)], values[: len(self.lengths)]


def tree_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    seen: Tensor,
    positions: Tensor,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """Compute attention of the last pending tokens over committed tokens and the pending tokens that they see.

    Args:
        query: `(rows, heads, tokens, width)`.
        keys, values: `(rows, kv_heads, capacity, width)`; a row's pending tokens lie after its committed ones.
        lengths: `(rows,)` committed tokens, int32.
        seen: `(rows, tokens, m)` bool.
        positions: `(rows, m)` positions of the pending tokens; those of committed ones are their slots.
        window: only positions less than this far back are seen.

    Returns:
        `(rows, tokens, heads * width)`.
    """
    if query.is_cuda:
        from outdraft.target.backends import tree_kernels

        return tree_kernels.attend(query, keys, values, lengths, seen, positions, scale, window)
    rows, heads, tokens, width = query.shape
    (kv_heads, capacity), pending = keys.shape[1:3], seen.shape[2]
    slot = torch.arange(capacity, device=query.device)
    newer = slot - lengths[:, None].long()
    place = newer.clamp(0, pending - 1)
    told = seen.gather(2, place[:, None].expand(-1, tokens, -1)) & ((newer >= 0) & (newer < pending))[:, None]
    visible = told | (newer < 0)[:, None]
    if window is not None:
        at = torch.where(newer < 0, slot, positions.gather(1, place))
        visible &= positions[:, -tokens:, None] - at[:, None] < window
    groups = heads // kv_heads
    folded = query.reshape(rows, kv_heads, groups * tokens, width)
    added = torch.zeros(visible.shape, dtype=query.dtype, device=query.device).masked_fill_(~visible, -torch.inf)
    added = added[:, None].repeat(1, 1, groups, 1)
    out = F.scaled_dot_product_attention(folded, keys, values, added, scale=scale)
    return out.view(rows, heads, tokens, -1).transpose(1, 2).flatten(2)


def rotated_and_stored(
    mixed: Tensor, angles: tuple[Tensor, Tensor], keys: Tensor, values: Tensor, pending: Pending
) -> Tensor:
    """Rotate queries and keys by their positions; write keys and values to the cache.

    Args:
        mixed: `(rows, tokens, heads + 2 * kv_heads, width)` queries, keys and values.
        angles: cosines and sines `(rows or 1, tokens, width)`, as `transformers` makes them.
        keys, values: as `Pending.held`.

    Returns:
        `(rows, heads, tokens, width)` rotated queries.
    """
    if mixed.is_cuda:
        from outdraft.target.backends import tree_kernels

        cos, sin = (table.contiguous() for table in angles)
        own = mixed.contiguous()
        return tree_kernels.rotate_and_store(own, cos, sin, keys, values, pending.lengths, pending.seen.shape[2])
    kv_heads = keys.shape[1]
    straight, value = mixed[:, :, :-kv_heads], mixed[:, :, -kv_heads:]
    one, other = straight.chunk(2, -1)
    cos, sin = (table[:, :, None] for table in angles)
    turned = straight * cos + torch.cat([-other, one], dim=-1) * sin
    _store(keys, values, turned[:, :, -kv_heads:], value, pending.slots)
    return turned[:, :, :-kv_heads].transpose(1, 2)


def normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Apply root mean square normalisation over the last dimension; on a GPU only."""
    from outdraft.target.backends import tree_kernels

    return tree_kernels.rms_norm(x.contiguous(), weight, eps)


def gated(both: Tensor) -> Tensor:
    """Map `(..., 2 * width)` gates and gated values, side by side, to `(..., width)`; on a GPU only."""
    from outdraft.target.backends import tree_kernels

    return tree_kernels.gate(both)


def _store(keys: Tensor, values: Tensor, new_keys: Tensor, new_values: Tensor, slots: Tensor) -> None:
    """Write `(rows, tokens, kv_heads, width)` to these `(rows, tokens)` slots."""
    row = torch.arange(len(slots), device=slots.device)[:, None]
    keys[row, :, slots] = new_keys
    values[row, :, slots] = new_values


# --- as modules of `transformers` see it -----------------------------------------------------------------------


class _Now(threading.local):
    """The pending tokens of the forward that runs in this thread."""

    pending: Pending | None = None


_now = _Now()


def running() -> Pending | None:
    """Return the pending tokens of this thread's forward; None if attention is that of `transformers`."""
    return _now.pending


@contextmanager
def running_over(pending: Pending) -> Iterator[None]:
    """Set the pending tokens of attention in this thread, and their device as the current one."""
    before, _now.pending = _now.pending, pending
    try:
        with current(pending.lengths.device):
            yield
    finally:
        _now.pending = before


class Storing(LayerCache):
    """The cache that layers get: it writes keys and values to the pending tokens' slots."""

    def __init__(self) -> None:
        super().__init__(layers=[])

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        pending = running()
        assert pending is not None  # only forwards over pending tokens are given this cache
        keys, values = pending.held(key_states, value_states, layer_idx)
        _store(keys, values, key_states.transpose(1, 2), value_states.transpose(1, 2), pending.slots)
        return keys, values

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0


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
    """Run `transformers`' SDPA attention; over pending tokens, tree attention."""
    pending = running()
    if pending is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    for name in ("position_bias", "s_aux", "softcap"):
        if kwargs.get(name) is not None:
            raise NotImplementedError(f"attention with {name}")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = pending.attend(query, key, value, scale, attention_mask)
    return out.view(*out.shape[:2], query.shape[1], -1), None


AttentionInterface.register(ATTENTION, attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
