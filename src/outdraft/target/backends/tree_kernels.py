"""Triton kernels of a forward over trees on a GPU; `tree_attention.py` defines what they compute and calls them.

A row's length is read on the device, so one recorded launch serves every length.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

SPLIT = 256
"""Fewest keys that are worth a program of their own."""

PROGRAMS = 264
"""Programs that fill a large GPU twice; keys are split until there are as many, or more is not worthwhile."""


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    seen: Tensor,
    positions: Tensor,
    scale: float,
    window: int | None,
) -> Tensor:
    """Compute `tree_attention` on tensors whose last dimension is contiguous."""
    rows, heads, tokens, width = query.shape
    kv_heads, pending = keys.shape[1], seen.shape[2]
    folded = heads // kv_heads * tokens
    block_m = max(16, min(128, triton.next_power_of_2(folded)))
    blocks = triton.cdiv(folded, block_m)
    splits = max(1, min(PROGRAMS // (rows * kv_heads * blocks), keys.shape[2] // SPLIT, 64))
    splits = 1 << (splits.bit_length() - 1)
    out = query.new_empty(rows, tokens, heads, width)
    parts = out if splits == 1 else query.new_empty((splits, rows, tokens, heads, width), dtype=torch.float32)
    sums = query.new_empty((splits, rows, tokens, heads), dtype=torch.float32)
    block_d = triton.next_power_of_2(width)
    settings: dict[str, Any] = {"HEADS": heads, "D": width, "BLOCK_D": block_d}
    _attend[(blocks, rows * kv_heads, splits)](
        query,
        keys,
        values,
        lengths,
        seen.view(torch.uint8),
        positions,
        parts,
        sums,
        *query.stride()[:3],
        *keys.stride()[:3],
        *values.stride()[:3],
        *seen.stride(),
        positions.stride(0),
        rows,
        tokens,
        pending,
        splits,
        scale * 1.4426950408889634,  # exponents of 2 are cheaper than of e
        **settings,
        GROUPS=heads // kv_heads,
        BLOCK_M=block_m,
        BLOCK_N=64 if block_d <= 128 else 32,
        WINDOW=window or 0,
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
        num_warps=8 if block_m == 128 else 4,
    )
    if splits > 1:
        _merge[(rows * tokens * heads,)](parts, sums, out, rows * tokens * heads, **settings, SPLITS=splits)
    return out.flatten(2)


@triton.jit
def _block(
    q, k_base, v_base, seen_row, positions_row, q_position, most, whole, found, base, end, length,
    k_slot, v_slot, s_token, s_slot, token, real, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, WINDOW: tl.constexpr, PRECISION: tl.constexpr,
    NEWEST: tl.constexpr,
):  # fmt: skip
    """Update the queries' running results with one more block of keys; all keys are committed unless NEWEST."""
    slot = base + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    k_at = k_base + slot[:, None] * k_slot + d[None, :]
    v_at = v_base + slot[:, None] * v_slot + d[None, :]
    inside = slot < end
    if NEWEST:
        k = tl.load(k_at, mask=inside[:, None] & (d < D)[None, :], other=0.0)
    elif BLOCK_D == D:
        k = tl.load(k_at)
    else:
        k = tl.load(k_at, mask=(d < D)[None, :], other=0.0)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    if NEWEST:
        newer = slot - length
        among = (newer >= 0) & inside
        sees = tl.load(
            seen_row + token[:, None] * s_token + newer[None, :] * s_slot, mask=among[None, :] & real[:, None], other=0
        )
        visible = (inside & (newer < 0))[None, :] | (sees != 0)
        if WINDOW > 0:
            of_newer = tl.load(positions_row + newer, mask=among, other=0).to(tl.int32)
            k_position = tl.where(newer < 0, slot, of_newer)
            visible = visible & (q_position[:, None] - k_position[None, :] < WINDOW)
        scores = tl.where(visible, scores, float("-inf"))
    elif WINDOW > 0:
        scores = tl.where(q_position[:, None] - slot[None, :] < WINDOW, scores, float("-inf"))
    higher = tl.maximum(most, tl.max(scores, 1))
    finite = tl.where(higher == float("-inf"), 0.0, higher)  # a block may hold nothing that is seen
    weights = tl.exp2(scores - finite[:, None])
    faded = tl.exp2(most - finite)
    whole = whole * faded + tl.sum(weights, 1)
    if NEWEST:
        v = tl.load(v_at, mask=inside[:, None] & (d < D)[None, :], other=0.0)
    elif BLOCK_D == D:
        v = tl.load(v_at)
    else:
        v = tl.load(v_at, mask=(d < D)[None, :], other=0.0)
    found = found * faded[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
    return higher, whole, found


# Not one more compilation for every number of tokens and of splits.
@triton.jit(do_not_specialize=["s_row", "s_token", "p_row", "rows", "tokens", "pending", "splits"])
def _attend(
    query,
    keys,
    values,
    lengths,
    seen,
    positions,
    parts,
    sums,
    q_row,
    q_head,
    q_token,
    k_row,
    k_head,
    k_slot,
    v_row,
    v_head,
    v_slot,
    s_row,
    s_token,
    s_slot,
    p_row,
    rows,
    tokens,
    pending,
    splits,
    scale,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute one block of queries, of all heads that share keys, over one share of one row's keys."""
    kv_heads: tl.constexpr = HEADS // GROUPS
    row = tl.program_id(1) // kv_heads
    head = tl.program_id(1) % kv_heads
    split = tl.program_id(2)
    length = tl.load(lengths + row).to(tl.int32)
    total = length + pending
    share = tl.cdiv(tl.cdiv(total, splits), BLOCK_N) * BLOCK_N
    start = split * share
    end = tl.minimum(start + share, total)
    place = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    real = place < GROUPS * tokens
    group = place // tokens
    token = place % tokens
    own_head = head * GROUPS + group
    d = tl.arange(0, BLOCK_D)
    wide = d < D
    q_at = row.to(tl.int64) * q_row + own_head[:, None] * q_head + token[:, None] * q_token + d[None, :]
    q = tl.load(query + q_at, mask=real[:, None] & wide[None, :], other=0.0)
    if WINDOW > 0:
        q_position = tl.load(positions + row * p_row + pending - tokens + token, mask=real, other=0)
        nearest = tl.min(tl.where(real, q_position, 2147483647), 0)
        first = tl.maximum(0, nearest - WINDOW + 1)  # committed tokens lie at their positions
        start = tl.minimum(end, tl.maximum(start, tl.minimum(first, length) // BLOCK_N * BLOCK_N))
    else:
        q_position = place  # not read
    most = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    whole = tl.zeros([BLOCK_M], dtype=tl.float32)
    found = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    k_base = keys + row.to(tl.int64) * k_row + head * k_head
    v_base = values + row.to(tl.int64) * v_row + head * v_head
    seen_row = seen + row * s_row
    positions_row = positions + row * p_row
    # Blocks of committed tokens only, which all are seen, then those that hold the newest.
    middle = tl.maximum(start, tl.minimum(end, length) // BLOCK_N * BLOCK_N)
    for base in range(start, middle, BLOCK_N):
        most, whole, found = _block(
            q, k_base, v_base, seen_row, positions_row, q_position, most, whole, found, base, end, length,
            k_slot, v_slot, s_token, s_slot, token, real, scale, D, BLOCK_D, BLOCK_N, WINDOW, PRECISION, False,
        )  # fmt: skip
    for base in range(middle, end, BLOCK_N):
        most, whole, found = _block(
            q, k_base, v_base, seen_row, positions_row, q_position, most, whole, found, base, end, length,
            k_slot, v_slot, s_token, s_slot, token, real, scale, D, BLOCK_D, BLOCK_N, WINDOW, PRECISION, True,
        )  # fmt: skip
    found = found / tl.where(whole == 0.0, 1.0, whole)[:, None]
    at = ((split * rows + row) * tokens + token) * HEADS + own_head
    to = at.to(tl.int64)[:, None] * D + d[None, :]
    tl.store(parts + to, found.to(parts.dtype.element_ty), mask=real[:, None] & wide[None, :])
    tl.store(sums + at, tl.where(whole == 0.0, float("-inf"), most + tl.log2(whole)), mask=real)


@triton.jit(do_not_specialize=["count"])
def _merge(parts, sums, out, count, HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, SPLITS: tl.constexpr):
    """Merge the results of the shares of one query's keys, weighted by the softmax sum of each share."""
    place = tl.program_id(0)
    split = tl.arange(0, SPLITS)
    d = tl.arange(0, BLOCK_D)
    wide = d < D
    share = tl.load(sums + split * count + place)
    weight = tl.exp2(share - tl.max(share, 0))
    at = (split.to(tl.int64)[:, None] * count + place) * D + d[None, :]
    part = tl.load(parts + at, mask=wide[None, :], other=0.0)
    whole = tl.sum(part * weight[:, None], 0) / tl.sum(weight, 0)
    tl.store(out + place.to(tl.int64) * D + d, whole.to(out.dtype.element_ty), mask=wide)


def rotate_and_store(
    mixed: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, pending: int
) -> Tensor:
    """Compute `rotated_and_stored` on contiguous `mixed`."""
    rows, tokens, total, width = mixed.shape
    kv_heads = keys.shape[1]
    heads = total - 2 * kv_heads
    query = mixed.new_empty(rows, tokens, heads, width)
    _rotate_and_store[(rows * tokens, total)](
        mixed,
        cos,
        sin,
        keys,
        values,
        lengths,
        query,
        cos.stride(0) if cos.shape[0] > 1 else 0,
        *keys.stride()[:3],
        *values.stride()[:3],
        tokens,
        pending - tokens,
        HEADS=heads,
        KV_HEADS=kv_heads,
        D=width,
        BLOCK_D=triton.next_power_of_2(width),
        num_warps=1,
    )
    return query.transpose(1, 2)


@triton.jit(do_not_specialize=["c_row", "tokens", "before"])
def _rotate_and_store(
    mixed,
    cos,
    sin,
    keys,
    values,
    lengths,
    query,
    c_row,
    k_row,
    k_head,
    k_slot,
    v_row,
    v_head,
    v_slot,
    tokens,
    before,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Rotate one head of one token if it is a query or a key, and write it to its place."""
    row = tl.program_id(0) // tokens
    token = tl.program_id(0) % tokens
    head = tl.program_id(1)
    d = tl.arange(0, BLOCK_D)
    wide = d < D
    source = mixed + (tl.program_id(0).to(tl.int64) * (HEADS + 2 * KV_HEADS) + head) * D
    x = tl.load(source + d, mask=wide, other=0.0).to(tl.float32)
    slot = tl.load(lengths + row).to(tl.int64) + before + token
    if head < HEADS + KV_HEADS:
        half: tl.constexpr = D // 2
        other = tl.load(source + tl.where(d < half, d + half, d - half), mask=wide, other=0.0).to(tl.float32)
        angle = row * c_row + token * D + d
        c = tl.load(cos + angle, mask=wide, other=0.0).to(tl.float32)
        s = tl.load(sin + angle, mask=wide, other=0.0).to(tl.float32)
        x = x * c + tl.where(d < half, -other, other) * s
    if head < HEADS:
        to = query + (tl.program_id(0).to(tl.int64) * HEADS + head) * D + d
        tl.store(to, x.to(query.dtype.element_ty), mask=wide)
    elif head < HEADS + KV_HEADS:
        to = keys + row.to(tl.int64) * k_row + (head - HEADS) * k_head + slot * k_slot + d
        tl.store(to, x.to(keys.dtype.element_ty), mask=wide)
    else:
        to = values + row.to(tl.int64) * v_row + (head - HEADS - KV_HEADS) * v_head + slot * v_slot + d
        tl.store(to, x.to(values.dtype.element_ty), mask=wide)


def gate(both: Tensor) -> Tensor:
    """Map `(..., 2 * width)` gates and gated values, side by side, to `(..., width)` SiLU(gate) * value."""
    width = both.shape[-1] // 2
    out = both.new_empty((*both.shape[:-1], width))
    block = 1024
    _gate[(out.numel() // width, triton.cdiv(width, block))](both, out, width, BLOCK=block)
    return out


@triton.jit
def _gate(both, out, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = d < width
    g = tl.load(both + row * 2 * width + d, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(both + row * 2 * width + width + d, mask=inside, other=0.0)
    silu = (g / (1.0 + tl.exp(-g))).to(out.dtype.element_ty)
    tl.store(out + row * width + d, (silu * up).to(out.dtype.element_ty), mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise contiguous `(..., width)` by the root mean square, in single precision, times `(width,)` weights."""
    width = x.shape[-1]
    out = torch.empty_like(x)
    block = triton.next_power_of_2(width)
    warps = max(1, min(16, block // 512))
    _rms_norm[(x.numel() // width,)](x, weight, out, eps, WIDTH=width, BLOCK=block, num_warps=warps)
    return out


@triton.jit
def _rms_norm(x, weight, out, eps, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * WIDTH
    d = tl.arange(0, BLOCK)
    inside = d < WIDTH
    own = tl.load(x + row + d, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(own * own, 0) / WIDTH + eps)
    normed = (own * scale).to(out.dtype.element_ty)
    tl.store(out + row + d, normed * tl.load(weight + d, mask=inside, other=0.0), mask=inside)
