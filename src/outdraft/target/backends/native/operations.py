"""Our CPU kernels as functions of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import POINTER, Structure, byref, c_float, c_int64, c_void_p, pointer
from typing import Any

import torch
from torch import Tensor

from outdraft.target.backends.native.build import kernels
from outdraft.target.backends.native.weights import CWeight, Weight
from outdraft.target.backends.tree_attention import Pending

LANES = 16
"""Numbers of the largest vector; heads and halves of an MLP must be multiples of it."""

ACTIVATIONS = ("silu", "gelu_tanh")


class CHeads(Structure):
    """`Heads` of pending.h."""

    _fields_ = [
        *((name, c_int64) for name in ("heads", "kv_heads", "width")),
        ("scale", c_float),
        *((name, c_void_p) for name in ("q_norm", "k_norm")),
        *((name, c_float) for name in ("q_eps", "k_eps")),
    ]


class CPending(Structure):
    """`Pending` of pending.h."""

    _fields_ = [
        *((name, c_int64) for name in ("rows", "tokens", "pending")),
        *((name, c_void_p) for name in ("lengths", "seen", "positions", "cos", "sin")),
        *((name, c_int64) for name in ("angles_row", "row_stride", "head_stride", "slot_stride", "window")),
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


class CFusion(Structure):
    """`Fusion` of layers.cpp."""

    _fields_ = [
        *((name, CWeight) for name in ("joined", "gate", "up", "down")),
        ("norm", c_void_p),
        ("eps", c_float),
    ]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Apply root mean square normalisation over the last dimension; the weight has the dtype of x."""
    x = x.contiguous()
    out = torch.empty_like(x)
    width = x.shape[-1]
    kernels().outdraft_norm(
        int(x.dtype == torch.bfloat16), c_void_p(x.data_ptr()), c_void_p(weight.data_ptr()), c_float(eps),
        c_int64(x.numel() // width), c_int64(width), c_void_p(out.data_ptr()),
    )  # fmt: skip
    return out


class PendingView:
    """Pending tokens as the kernels read them; one for all layers of a forward that have the same window.

    Args:
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
            0 if cos.shape[0] == 1 else cos.stride(0), 0, 0, 0, window or 0,
        )  # fmt: skip

    def over(self, keys: Tensor) -> Any:
        """Return the tokens over buffers `(rows, kv_heads, slots, width)` that lie like these keys."""
        own = self.struct
        own.row_stride, own.head_stride, own.slot_stride = keys.stride()[:3]
        return byref(own)


class Layer:
    """A layer for the kernels: norm, attention, norm, gated MLP, both with what comes in added; `Stack` runs it.

    Args:
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
        self.weights, self._kept = (qkv, o, gate_up, down), norms
        at = [None if tensor is None else tensor.data_ptr() for tensor, _ in norms]
        first, second, q_eps, k_eps = (eps for _, eps in norms)
        self.struct = CLayer(
            CHeads(heads, kv_heads, width, scale, at[2], at[3], q_eps, k_eps),
            qkv.struct, o.struct, gate_up.struct, down.struct, at[0], at[1], first, second,
            ACTIVATIONS.index(activation),
        )  # fmt: skip
        self.probe = torch.empty(1, kv_heads, 1, width, dtype=qkv.dtype)
        """Keys of a token, for their shape."""


class Stack:
    """Layers for the kernels, one after the other as one call.

    Args:
        layers: at least one, with keys of one shape.
    """

    def __init__(self, layers: Sequence[Layer]):
        self.layers, self.probe = tuple(layers), layers[0].probe
        self._at = (POINTER(CLayer) * len(layers))(*(pointer(layer.struct) for layer in layers))
        qkv, *_, down = layers[-1].weights
        self._half, self._outputs, self._addresses = qkv.half, down.outputs, c_void_p * len(layers)

    def __call__(
        self, x: Tensor, tokens: PendingView, caches: Sequence[tuple[Tensor, Tensor]], residual: Tensor | None = None
    ) -> Tensor:
        """Run the layers.

        Args:
            x: `(rows, tokens, width)` input.
            caches: every layer's buffers of keys and of values, `(rows, kv_heads, slots, width)` with equal strides.
            residual: `(rows, tokens, hidden)` what is added to the first attention's output, in place of the input.

        Returns:
            `(rows, tokens, outputs of the last down)`.
        """
        x = x.contiguous()
        out = x.new_empty(*x.shape[:-1], self._outputs)
        beside = None if residual is None else residual.contiguous()
        keys, values = (self._addresses(*(part.data_ptr() for part in parts)) for parts in zip(*caches, strict=True))
        kernels().outdraft_layers(
            self._half, torch.get_num_threads(), self._at, c_int64(len(self.layers)), tokens.over(caches[0][0]), keys,
            values, c_void_p(x.data_ptr()), None if beside is None else c_void_p(beside.data_ptr()),
            c_void_p(out.data_ptr()),
        )  # fmt: skip
        return out


class Fusion:
    """FSPAD's fusion of embeddings and features as one call (`methods.fspad.network.Fusion`, equations 1 to 3).

    Args:
        joined: the product of both, side by side.
        gate, up, down: products of the embedding, of the norm's output and of both gated.
        norm: weight and epsilon.
    """

    def __init__(self, joined: Weight, gate: Weight, up: Weight, down: Weight, norm: tuple[Tensor, float]):
        weight, eps = norm[0].detach().to(joined.dtype).contiguous(), norm[1]
        self._kept = (joined, gate, up, down, weight)
        parts = (part.struct for part in (joined, gate, up, down))
        self.struct = CFusion(*parts, weight.data_ptr(), eps)
        self._at, self._half = byref(self.struct), joined.half

    def __call__(self, embeddings: Tensor, features: Tensor) -> Tensor:
        """Fuse `(tokens, hidden)` embeddings and features of the same width to `(tokens, hidden)`."""
        embeddings, features = embeddings.contiguous(), features.contiguous()
        out = torch.empty_like(features)
        kernels().outdraft_fusion(
            self._half, torch.get_num_threads(), self._at, c_void_p(embeddings.data_ptr()),
            c_void_p(features.data_ptr()), c_int64(len(features)), c_void_p(out.data_ptr()),
        )  # fmt: skip
        return out
