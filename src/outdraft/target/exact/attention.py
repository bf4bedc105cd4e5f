"""Attention in exact mode: one query at a time over its own path, contiguous and in order, in the same kernel call as
plain decoding.

`transformers` finds it by name.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from outdraft.errors import UserError

ATTENTION = "outdraft_exact"
"""The name under which `transformers` finds our attention."""

ALIGNMENT = 32
"""Alignment of a token's keys (of one head) in bytes: kernels sum unaligned ones in another order."""


LENGTHS = (1, 2, 7, 16, 33, 100, 255, 511, 512, 513, 777, 1024, 1100, 2051)
"""Numbers of keys on which the layout of attention is tried."""


class Now(threading.local):
    """The paths of the forward that runs in this thread."""

    def __init__(self) -> None:
        self.paths: Paths | None = None
        self.calls = 0
        self.layouts: set[tuple[int, int, int, int, torch.dtype]] = set()


class Paths:
    """The order in which each row's queries are answered, and the keys that are moved before each query.

    The keys of committed tokens are in order already. A query's path follows them: its `j`-th pending token is moved to
    the `j`-th slot after them unless it is there. The order of queries keeps moves few.

    Args:
        mask: `(rows, tokens, m)` as in `attention_mask`.
        slots: `(rows, m)` as in `attention_mask`.
        lengths: committed tokens of every row.
    """

    def __init__(self, mask: Tensor, slots: Tensor, lengths: Sequence[int]):
        self.lengths = list(lengths)
        self.steps: list[list[tuple[int, int, list[tuple[int, int]]]]] = []  # (query, keys seen, moves to, from)
        self.moved: list[list[int]] = []
        self.visible: dict[tuple[int, int], list[int]] = {}
        columns = (slots - torch.tensor(self.lengths)[:, None]).tolist()
        for row, length in enumerate(self.lengths):
            paths = [
                [column for column, there in zip(columns[row], line, strict=True) if there]
                for line in mask[row].tolist()
            ]
            held: dict[int, int] = {}
            steps = []
            for query in sorted(range(len(paths)), key=paths.__getitem__):
                path = paths[query]
                moves = [(to, source) for to, source in enumerate(path) if held.get(to, to) != source]
                held.update(moves)
                steps.append((query, length + len(path), moves))
                self.visible[row, query] = [*range(length), *(length + place for place in path)]
            self.steps.append(steps)
            self.moved.append(sorted(held))
        self._masks: list[tuple[Tensor, dict[tuple[int, int], Tensor]]] = []

    def masks(self, given: Tensor) -> dict[tuple[int, int], Tensor]:
        """Return plain decoding's mask `(1, 1, keys)` for each (row, query); sliding windows hide some keys."""
        for known, masks in self._masks:
            if known is given:
                return masks
        masks = {
            (row, query): given[row, 0, query].index_select(0, torch.tensor(keys))[None, None]
            for (row, query), keys in self.visible.items()
        }
        self._masks.append((given, masks))
        return masks


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Run `transformers`' SDPA attention for one query at a time, over only the keys that plain decoding would have.

    Args:
        module: the attention layer, which holds the forward's paths.
        query: `(rows, heads, tokens, width)`.
        key: `(rows, kv_heads, slots, width)` of our cache itself, not a copy.
        value: as `key`.
        attention_mask: `(rows, 1, tokens, slots)` bool.
        dropout: 0, as the model is in evaluation mode.
        **kwargs: further arguments of model families; a position bias is refused.
    """
    now: Now = module._outdraft_now
    if now.paths is None or kwargs.get("position_bias") is not None or kwargs.get("s_aux") is not None:
        raise UserError("exact=True does not cover attention with position biases or sinks")
    now.calls += 1
    pitch = key.stride(2) * key.element_size()
    if pitch % ALIGNMENT:
        raise UserError(
            f"exact=True needs the keys of a head to be a multiple of {ALIGNMENT} bytes, not {pitch}: "
            "kernels round unaligned ones differently from call to call"
        )
    paths, masks = now.paths, now.paths.masks(attention_mask)
    rows, heads, tokens, _ = query.shape
    kv_heads = key.shape[1]
    groups = heads // kv_heads
    now.layouts.add((heads, kv_heads, key.shape[-1], value.shape[-1], query.dtype))
    output = query.new_empty(rows, tokens, kv_heads, groups, value.shape[-1])
    for row, (length, steps, moved) in enumerate(zip(paths.lengths, paths.steps, paths.moved, strict=True)):
        # Heads that share keys read them in place: `(kv_heads, groups, ...)` stands for `(1, heads, ...)`.
        queries = query[row].unflatten(0, (kv_heads, groups))
        keys, values = key[row], value[row]
        pending = [both[:, length:].clone() for both in (keys, values)] if moved else []
        shared = [both[:, None].expand(-1, groups, -1, -1) for both in (keys, values)]
        for node, count, moves in steps:
            for to, source in moves:
                keys[:, length + to] = pending[0][:, source]
                values[:, length + to] = pending[1][:, source]
            answer = scaled_dot_product_attention(
                queries[:, :, node : node + 1],
                shared[0][:, :, :count],
                shared[1][:, :, :count],
                attn_mask=masks[row, node].expand(kv_heads, 1, 1, -1),
                dropout_p=dropout,
                scale=scaling,
            )
            output[row, node] = answer[:, :, 0]
        if moved:
            last = length + moved[-1] + 1
            keys[:, length:last] = pending[0][:, : last - length]
            values[:, length:last] = pending[1][:, : last - length]
    return output.flatten(2, 3), None


AttentionInterface.register(ATTENTION, attend)


def reads_in_place(heads: int, kv_heads: int, width: int, value_width: int, dtype: torch.dtype, most: int) -> bool:
    """Return True if a query over shared keys in a wider buffer has the bits of one over a copy per head.

    Plain decoding makes that copy. The trial covers lengths on either side of the kernel's blocks, in this precision
    and, as 16 bits hide much, in single precision.
    """
    dice, groups = torch.Generator().manual_seed(0), heads // kv_heads
    for length in (length for length in LENGTHS if length <= most):
        for precision in {dtype, torch.float32}:
            query = torch.randn(1, heads, 1, width, generator=dice).to(precision)
            kept = [torch.randn(1, kv_heads, length + 5, w, generator=dice).to(precision) for w in (width, value_width)]
            mask = torch.ones(1, 1, 1, length, dtype=torch.bool)
            keys, values = (both[:, :, :length].repeat_interleave(groups, dim=1) for both in kept)
            expected = scaled_dot_product_attention(query, keys, values, attn_mask=mask)
            keys, values = (both[0, :, None, :length].expand(-1, groups, -1, -1) for both in kept)
            queries = query[0].unflatten(0, (kv_heads, groups))
            given = scaled_dot_product_attention(queries, keys, values, attn_mask=mask.expand(kv_heads, 1, 1, -1))
            if not torch.equal(given.flatten(0, 1), expected[0]):
                return False
    return True
