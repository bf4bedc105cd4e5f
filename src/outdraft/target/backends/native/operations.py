"""Our CPU kernels as functions of tensors."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from ctypes import Structure, byref, c_float, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from outdraft.target.backends.native.build import library
from outdraft.target.backends.tree_attention import Pending

TYPES = (torch.float32, torch.bfloat16)
LANES = 16
"""Numbers of the largest vector; heads and halves of an MLP must be multiples of it."""

GROUP = 32
"""Inputs of a quantised matrix that share a scale."""

ACTIVATIONS = ("silu", "gelu_tanh")


class CWeight(Structure):
    """`Weight` of weights.h."""

    _fields_ = [
        *((name, c_void_p) for name in ("lines", "scales", "bias")),
        *((name, c_int64) for name in ("outputs", "inputs", "bits")),
    ]


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


class CFusion(Structure):
    """`Fusion` of layers.cpp."""

    _fields_ = [
        *((name, CWeight) for name in ("joined", "gate", "up", "down")),
        ("norm", c_void_p),
        ("eps", c_float),
    ]


def why_not_native() -> str | None:
    """Return why this machine has no kernels, None if it has."""
    found = library()
    if isinstance(found, str):
        return found
    narrow = found.outdraft_lanes() < 8 and platform.machine() not in ("arm64", "aarch64")
    return "this processor has no AVX2, and oneDNN is faster without" if narrow else None


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
        bits: 8 or 4 quantises the weight, a multiple of `GROUP` inputs; None keeps it.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, gated: bool = False, bits: int | None = None):
        weight = weight.detach()
        self.outputs, self.inputs = weight.shape
        self.dtype, self.half, self.bits = weight.dtype, int(weight.dtype == torch.bfloat16), bits
        order, lanes = torch.arange(self.outputs), _kernels().outdraft_lanes()
        if gated:  # panels of gates and of gated values in turn
            order = order.view(2, -1, lanes).transpose(0, 1).flatten()
        padded = weight.new_zeros(-(-self.outputs // lanes) * lanes, self.inputs)
        padded[: self.outputs] = weight[order]
        self._order, self.scales = order, None
        panels = padded.view(-1, lanes, self.inputs)
        if bits is None:
            words = panels.unflatten(2, (-1, 1 + self.half)).transpose(1, 2).contiguous()
            self.lines = words.view(torch.int32)
        else:
            numbers, self.scales = quantised(panels, bits)
            self.lines = blocks(numbers, bits)
        self.bias = None if bias is None else bias.detach().float()[order].contiguous()
        kept = (self.lines, self.scales, self.bias)
        self.struct = CWeight(*(None if part is None else part.data_ptr() for part in kept), *weight.shape, bits or 0)
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

    @property
    def nbytes(self) -> int:
        """Bytes that a product reads."""
        return sum(part.nbytes for part in (self.lines, self.scales, self.bias) if part is not None)

    def dense(self) -> Tensor:
        """Return the `(outputs, inputs)` matrix that the kernels multiply with."""
        if self.scales is None:
            panels = self.lines.view(self.dtype).view(*self.lines.shape[:3], -1).transpose(1, 2)
        else:
            numbers = unblocked(self.lines, self.bits or 0).unflatten(2, (-1, GROUP))
            scale, *offset = (part.transpose(1, 2)[..., None].float() for part in self.scales.unbind(2))
            panels = (numbers * scale + (offset[0] if offset else 0)).to(self.dtype)
        rows = panels.reshape(-1, self.inputs)[: self.outputs]
        return torch.empty_like(rows).index_copy_(0, self._order, rows)


def quantised(panels: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Quantise groups of `GROUP` inputs: eight bits to -127 ... 127 with a scale, four to 0 ... 15 with an offset too.

    Args:
        panels: `(panels, LANES, inputs)`.
        bits: 8 or 4.

    Returns:
        `(panels, LANES, inputs)` int8, and `(panels, groups, 1 or 2, LANES)` bfloat16 scales and offsets.
    """
    groups = panels.float().unflatten(2, (-1, GROUP))
    most = 127 if bits == 8 else 15
    offset = torch.zeros(()) if bits == 8 else groups.amin(3).to(torch.bfloat16).float()
    reach = groups.abs().amax(3) if bits == 8 else groups.amax(3) - offset
    scale = (reach / most).to(torch.bfloat16).float()
    # A scale that was rounded down is made larger, so that the largest weight is not cut.
    scale = torch.where(scale * most < reach, scale * (1 + 2**-7), scale).to(torch.bfloat16)
    numbers = (groups - offset[..., None]) / scale.float().clamp(min=1e-30)[..., None]
    whole = numbers.round().clamp(-127 if bits == 8 else 0, most).to(torch.int8)
    kept = [scale] if bits == 8 else [scale, offset.to(torch.bfloat16)]
    return whole.flatten(2), torch.stack(kept, dim=1).permute(0, 3, 1, 2).contiguous()


def blocks(numbers: Tensor, bits: int) -> Tensor:
    """Arrange `(panels, LANES, inputs)` whole numbers in blocks as weights.h reads them."""
    shape = (-1, 8 // bits, 2, 2) if bits == 4 else (-1, 2, 2)  # blocks, halves of bytes, lines, inputs of a pair
    parts = numbers.view(torch.uint8).unflatten(1, (-1, 4)).unflatten(3, shape)
    if bits == 4:
        parts = parts[:, :, :, :, 0] | parts[:, :, :, :, 1] << 4
    return parts.permute(0, 3, 1, 4, 2, 5).contiguous()


def unblocked(lines: Tensor, bits: int) -> Tensor:
    """Return the `(panels, LANES, inputs)` whole numbers of `blocks`."""
    parts = lines.permute(0, 2, 4, 1, 3, 5)  # (panels, lanes / 4, 4, blocks, lines, inputs of a pair)
    if bits == 4:
        parts = torch.stack([parts & 15, parts >> 4], dim=4)
    return parts.flatten(3).flatten(1, 2).contiguous().view(torch.int8)


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
        self.weights, self._kept = (qkv, o, gate_up, down), norms
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
        _kernels().outdraft_fusion(
            self._half, torch.get_num_threads(), self._at, c_void_p(embeddings.data_ptr()),
            c_void_p(features.data_ptr()), c_int64(len(features)), c_void_p(out.data_ptr()),
        )  # fmt: skip
        return out
