"""Our CPU kernels as functions of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import Structure, byref, c_float, c_int, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from outdraft.target.backends.native.build import library
from outdraft.target.backends.tree_attention import Pending

TYPES = (torch.float32, torch.bfloat16)
LANES = 16
"""Numbers of a vector; heads and halves of an MLP must be multiples of it."""

ACTIVATIONS = ("silu", "gelu_tanh")


class CWeight(Structure):
    """`Weight` of products.h."""

    _fields_ = [("lines", c_void_p), ("bias", c_void_p), ("outputs", c_int64), ("inputs", c_int64)]


class CHeads(Structure):
    """`Heads` of attention.h."""

    _fields_ = [
        *((name, c_int64) for name in ("heads", "kv_heads", "width")),
        ("scale", c_float),
        *((name, c_void_p) for name in ("q_norm", "k_norm")),
        *((name, c_float) for name in ("q_eps", "k_eps")),
    ]


class CPending(Structure):
    """`Pending` of attention.h."""

    _fields_ = [
        *((name, c_int64) for name in ("rows", "tokens", "pending")),
        *((name, c_void_p) for name in ("lengths", "seen", "positions", "cos", "sin")),
        ("angles_row", c_int64),
        *((name, c_void_p) for name in ("keys", "values")),
        *((name, c_int64) for name in ("row_stride", "head_stride", "slot_stride", "window")),
    ]


class CLayer(Structure):
    """`Layer` of layers.cpp."""

    _fields_ = [
        ("heads", CHeads),
        *((name, CWeight) for name in ("qkv", "o", "gate_up", "down")),
        *((name, c_void_p) for name in ("attention_norm", "mlp_norm")),
        *((name, c_float) for name in ("attention_eps", "mlp_eps")),
        ("activation", c_int64),
    ]


def why_not_native() -> str | None:
    """Return why this machine has no kernels, None if it has."""
    found = library()
    return found if isinstance(found, str) else None


def _kernels() -> Any:
    found = library()
    assert not isinstance(found, str), found
    return found


class Weight:
    """A matrix in the kernels' layout.

    Args:
        weight: `(outputs, inputs)` float32 or bfloat16; an even number of inputs.
        bias: `(outputs,)` or None.
        gated: True if the first half of the outputs are gates of the second; each a multiple of `LANES`.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, gated: bool = False):
        weight = weight.detach().contiguous()
        outputs, inputs = weight.shape
        self.half = int(weight.dtype == torch.bfloat16)
        words = inputs // (1 + self.half)
        self.lines = torch.empty(-(-outputs // LANES), words, LANES, dtype=torch.int32)
        _kernels().outdraft_pack(
            c_int(self.half), c_void_p(weight.data_ptr()), c_int64(outputs), c_int64(inputs), c_int64(gated),
            c_void_p(self.lines.data_ptr()),
        )  # fmt: skip
        self.bias = None if bias is None else bias.detach().float()
        if gated and self.bias is not None:  # as the panels lie
            self.bias = self.bias.view(2, -1, LANES).transpose(0, 1)
        self.bias = None if self.bias is None else self.bias.contiguous()
        bias_at = None if self.bias is None else self.bias.data_ptr()
        self.outputs, self.inputs, self.dtype = outputs, inputs, weight.dtype
        self.struct = CWeight(self.lines.data_ptr(), bias_at, outputs, inputs)
        self._at = byref(self.struct)

    def __call__(self, x: Tensor, added: Tensor | None = None) -> Tensor:
        """Return `(..., outputs)` products of `(..., inputs)`, plus `added`."""
        x = x.contiguous()
        out = x.new_empty(*x.shape[:-1], self.outputs)
        beside = None if added is None else added.contiguous()
        _kernels().outdraft_linear(
            self.half, torch.get_num_threads(), self._at, c_void_p(x.data_ptr()), c_int64(x.numel() // self.inputs),
            c_void_p(out.data_ptr()), None if beside is None else c_void_p(beside.data_ptr()),
        )  # fmt: skip
        return out

    def dense(self) -> Tensor:
        """Return the `(outputs, inputs)` matrix."""
        if self.half:
            pairs = self.lines.view(torch.bfloat16).view(*self.lines.shape, 2)
            return pairs.permute(0, 2, 1, 3).reshape(-1, self.inputs)[: self.outputs]
        return self.lines.view(torch.float32).permute(0, 2, 1).reshape(-1, self.inputs)[: self.outputs]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Apply root mean square normalisation over the last dimension; the weight has the dtype of x."""
    x = x.contiguous()
    out = torch.empty_like(x)
    width = x.shape[-1]
    _kernels().outdraft_norm(
        int(x.dtype == torch.bfloat16), c_void_p(x.data_ptr()), c_void_p(weight.data_ptr()), c_float(eps),
        c_int64(x.numel() // width), c_int64(width), c_void_p(out.data_ptr()),
    )  # fmt: skip
    return out


class PendingView:
    """Pending tokens as the kernels read them; one for all layers of a forward that have the same window.

    Args:
        pending: the tokens.
        angles: cosines and sines `(rows or 1, tokens, width)`.
        window: sliding window, None for everything.
    """

    def __init__(self, pending: Pending, angles: tuple[Tensor, Tensor], window: int | None):
        seen, positions = pending.seen.contiguous(), pending.positions.contiguous()
        cos, sin = (table.contiguous() for table in angles)
        self._kept = (pending.lengths, seen, positions, cos, sin)  # while kernels know their addresses
        rows, tokens, count = seen.shape
        self.struct = CPending(
            rows, tokens, count, *(tensor.data_ptr() for tensor in self._kept),
            0 if cos.shape[0] == 1 else cos.stride(0), None, None, 0, 0, 0, window or 0,
        )  # fmt: skip

    def over(self, keys: Tensor, values: Tensor) -> Any:
        """Return the tokens over a layer's `(rows, kv_heads, slots, width)` buffers."""
        own = self.struct
        own.keys, own.values = keys.data_ptr(), values.data_ptr()
        own.row_stride, own.head_stride, own.slot_stride = keys.stride()[:3]
        return byref(own)


class Layer:
    """A layer for the kernels: norm, attention, norm, gated MLP, both with what comes in added.

    Args:
        qkv, o, gate_up, down: its products.
        heads, kv_heads: numbers of heads.
        scale: scale of the scores.
        attention_norm, mlp_norm: weight and epsilon; without the first, attention reads the input itself.
        head_norms: weights and epsilons of the norms of single queries and keys, if there are any.
        activation: one of `ACTIVATIONS`.
    """

    def __init__(
        self,
        qkv: Weight,
        o: Weight,
        gate_up: Weight,
        down: Weight,
        heads: int,
        kv_heads: int,
        scale: float,
        attention_norm: tuple[Tensor, float] | None,
        mlp_norm: tuple[Tensor, float],
        head_norms: Sequence[tuple[Tensor, float]] = (),
        activation: str = "silu",
    ):
        width = qkv.outputs // (heads + 2 * kv_heads)
        none = (None, 0.0)
        norms = [
            (tensor if tensor is None else tensor.detach().to(qkv.dtype).contiguous(), eps)
            for tensor, eps in (attention_norm or none, mlp_norm, *(head_norms or (none, none)))
        ]
        self._kept = (qkv, o, gate_up, down, norms)
        at = [None if tensor is None else tensor.data_ptr() for tensor, _ in norms]
        first, second, q_eps, k_eps = (eps for _, eps in norms)
        self.struct = CLayer(
            CHeads(heads, kv_heads, width, scale, at[2], at[3], q_eps, k_eps),
            qkv.struct, o.struct, gate_up.struct, down.struct, at[0], at[1], first, second,
            ACTIVATIONS.index(activation),
        )  # fmt: skip
        self._at, self._half, self._outputs = byref(self.struct), qkv.half, down.outputs
        self.probe = torch.empty(1, kv_heads, 1, width, dtype=qkv.dtype)
        """Keys of a token, for their shape."""

    def __call__(self, x: Tensor, tokens: Any, residual: Tensor | None = None) -> Tensor:
        """Run the layer.

        Args:
            x: `(rows, tokens, width)` input.
            tokens: what `PendingView.over` returns.
            residual: `(rows, tokens, hidden)` what is added to attention's output, in place of the input.

        Returns:
            `(rows, tokens, outputs of down)`.
        """
        x = x.contiguous()
        out = x.new_empty(*x.shape[:-1], self._outputs)
        beside = None if residual is None else residual.contiguous()
        _kernels().outdraft_layer(
            self._half, torch.get_num_threads(), self._at, tokens, c_void_p(x.data_ptr()),
            None if beside is None else c_void_p(beside.data_ptr()), c_void_p(out.data_ptr()),
        )  # fmt: skip
        return out
