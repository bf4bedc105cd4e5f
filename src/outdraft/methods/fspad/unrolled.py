"""The attention of a drafter that is unrolled on its own features in training (HASS, arXiv 2408.15766).

At draft step j a position sees what it would see in decoding: the target's features up to j places before it, and one
feature of each of its own steps 1 .. j since. All of it with one mask would be (j + 1) times as many keys, nearly all
of them hidden; on a CPU the first part is a causal attention and every other key is one product.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def folded_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attend from `(batch, heads, queries, head_dim)` with heads that share keys as further queries of one head, so
    that the keys are read once; without a mask every query sees every key."""
    folded = q.reshape(*k.shape[:2], -1, q.shape[-1])
    mask = None if mask is None else mask.repeat(1, 1, q.shape[1] // k.shape[1], 1)
    return F.scaled_dot_product_attention(folded, k, v, mask).reshape(q.shape)


def grouped_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attend from `(batch, heads, queries, head_dim)` to fewer heads of keys and values, causally without a mask."""
    shared = q.shape[1] != k.shape[1]
    if shared and mask is not None and q.is_cuda:
        return folded_attention(q, k, v, mask)  # else torch would hold all scores in single precision
    causal = mask is None and q.shape[2] > 1
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=shared)


class Unrolled:
    """The keys and values of the draft steps so far, with gradients.

    A later step never changes what an earlier one has seen, so each runs once.
    """

    def __init__(self) -> None:
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Add the keys and values of a step and attend from its queries, position by position.

        At draft step j the first j positions are of no use: nothing was drafted there yet.

        Args:
            q: `(batch, heads, tokens, head_dim)`.
            k: `(batch, kv_heads, tokens, head_dim)`, as `v`.

        Returns:
            `(batch, heads, tokens, head_dim)`.
        """
        self._keys.append(k)
        self._values.append(v)
        if len(self._keys) == 1:
            return grouped_attention(q, k, v, None)
        return (banded if q.device.type == "cpu" else masked)(q, self._keys, self._values)


def masked(q: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor]) -> Tensor:
    """Attend at draft step j to the keys of steps 0 .. j, all of them with one mask; shapes as in `Unrolled.attend`."""
    mask = unrolled_mask(q.shape[2], len(keys) - 1, q.device)
    return grouped_attention(q, torch.cat(tuple(keys), dim=2), torch.cat(tuple(values), dim=2), mask)


def banded(q: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor]) -> Tensor:
    """Compute what `masked` does from the j-th position on, and zeros before."""
    step, length = len(keys) - 1, q.shape[2]
    if length <= step:
        return torch.zeros_like(q)
    known = [stream[0][:, :, : length - step] for stream in (keys, values)]
    # Step i drafted for the position that is step - i places before this one.
    own = [stream[i][:, :, i : length - step + i] for i in range(1, step + 1) for stream in (keys, values)]
    dtype = values[0].dtype  # autocast leaves the turned queries and keys in float32
    parts = [part.to(dtype) for part in (q[:, :, step:], *known, *own)]
    return F.pad(_Banded.apply(*parts), (0, 0, step, 0))


class _Banded(torch.autograd.Function):
    """Causal attention together with a few keys of every position's own.

    The kernel's backward asks for the result and the logarithm of the sum of exponentials; given those of the whole
    attention, it returns the gradients of its part.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, *own: Tensor) -> Tensor:
        """Attend from `(batch, heads, n, head_dim)` to n earlier keys causally, and to `own`: keys and values in turn,
        of which every position sees the one at its place. All of them are `(batch, kv_heads, n, head_dim)`."""
        groups = q.shape[1] // k.shape[1]
        wide = [stream.repeat_interleave(groups, dim=1) for stream in (k, v)]
        part, share = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, *wide, is_causal=True)
        folded, part = q.unflatten(1, (-1, groups)), part.unflatten(1, (-1, groups))
        share = share.unflatten(1, (-1, groups))
        scores = [_products(folded, key[:, :, None]) * q.shape[-1] ** -0.5 for key in own[::2]]
        whole = torch.stack([share, *scores]).logsumexp(dim=0)
        out = part * (share - whole).exp()[..., None]
        for score, value in zip(scores, own[1::2], strict=True):
            out += (score - whole).exp()[..., None] * value[:, :, None]
        out = out.to(q.dtype).flatten(1, 2)
        ctx.save_for_backward(q, *wide, out, whole, *scores, *own)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, ...]:
        q, k, v, out, whole, *rest = ctx.saved_tensors
        count, groups, scale = len(rest) // 3, whole.shape[2], q.shape[-1] ** -0.5
        scores, own = rest[:count], rest[count:]
        for_q, *for_known = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            slope, q, k, v, out, whole.flatten(1, 2), 0.0, True
        )
        folded, slopes = q.unflatten(1, (-1, groups)), slope.unflatten(1, (-1, groups))
        mean = _products(slopes, out.unflatten(1, (-1, groups)))
        more, for_own = torch.zeros_like(folded, dtype=whole.dtype), []
        for score, key, value in zip(scores, own[::2], own[1::2], strict=True):
            weight = (score - whole).exp()
            change = ((_products(slopes, value[:, :, None]) - mean) * weight * scale)[..., None]
            more += change * key[:, :, None]
            for_own += [(change * folded).sum(dim=2).to(key.dtype), (weight[..., None] * slopes).sum(dim=2).to(v.dtype)]
        known = [each.unflatten(1, (-1, groups)).sum(dim=2) for each in for_known]
        return (for_q + more.flatten(1, 2).to(q.dtype), *known, *for_own)


def _products(a: Tensor, b: Tensor) -> Tensor:
    """Return the dot products along the last axis, in float32 at least."""
    return (a * b).sum(dim=-1, dtype=torch.promote_types(a.dtype, torch.float32))


def unrolled_mask(length: int, step: int, device: torch.device | str) -> Tensor:
    """Build the `(1, 1, length, (step + 1) * length)` mask of all steps' keys: the target's features, then the features
    drafted in steps 1 .. `step`, each at its own position."""
    everything = torch.ones(length, length, dtype=torch.bool, device=device)
    drafted = [everything.tril(back).triu(back) for back in range(1 - step, 1)]
    blocks = torch.stack([everything.tril(-step), *drafted], dim=1)  # (queries, steps, keys)
    return blocks.view(1, 1, length, (step + 1) * length)
