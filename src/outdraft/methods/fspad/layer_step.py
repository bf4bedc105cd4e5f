"""One decoder layer of a drafter, arranged for the few nodes of a draft level; every draft step shares it.

Query, key and value are one product, rotated together; residuals and gates are added or multiplied inside the products
where there is a kernel for it. On backend `native` the whole layer is one call. On `packed`, small layers compute in
float32 on plain weights, whatever the target's precision: the overhead of oneDNN's low-precision products is three
times that of a whole small float32 product. It reads weights on any backend.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from outdraft.core.tensors import sent
from outdraft.methods.fspad.network import DraftOutput, RMSNorm
from outdraft.methods.fspad.unrolled import folded_attention
from outdraft.target.backends import PackedLinear
from outdraft.target.backends.fused_modules import FOLDED
from outdraft.target.backends.native.modules import view_of
from outdraft.target.backends.native.operations import LANES, Layer, Stack, rms_norm
from outdraft.target.backends.native.weights import NativeLinear, Weight, draft_bits
from outdraft.target.backends.packed import plain_linear
from outdraft.target.backends.tree_attention import rotated_and_stored, running
from outdraft.target.cache import SlotCache

SMALL = 2**20
"""The size up to which weight matrices compute in float32 on plain weights on a CPU. Up to it a product over few rows
costs less than packed in bfloat16; beyond it, reading twice the bytes costs more."""


class LayerStep:
    """The attention and gated MLP of a drafter, for drafting only.

    Args:
        head: the trained network with its `self_attn` and MLP, on any backend; weights are read once and stay as they
            are.
        frequencies: `(head_dim / 2,)` rotary frequencies.
        positions: length of the rotary tables.
        scale: factor of cosines and sines.
        beside: an output layer among the head's modules, which is no part of the step.
        layer: the layer's place in the cache.

    Attributes:
        native: the layer as one call over pending tokens, on backend `native`; else None.
    """

    def __init__(
        self,
        head: Any,
        frequencies: Tensor,
        positions: int,
        mlp_norm: RMSNorm,
        scale: float = 1.0,
        beside: nn.Module | None = None,
        layer: int = 0,
    ):
        self._layer = layer
        config, attention = head.config, head.self_attn
        self._heads, self._kv_heads = config.num_attention_heads, config.num_key_value_heads
        self._size = config.head_dim
        place = head.norm.weight
        own = [part for part in head.modules() if isinstance(part, nn.Linear | PackedLinear) and part is not beside]
        self._on_native = any(isinstance(linear, NativeLinear) for linear in own)
        self._small = not self._on_native and max(linear.out_features * linear.in_features for linear in own) <= SMALL
        widened = self._small and place.device.type == "cpu" and place.dtype != torch.float64
        self.dtype = torch.float32 if widened else place.dtype
        self.device = place.device
        projections = [self._linear(part) for part in (attention.q_proj, attention.k_proj, attention.v_proj)]
        self._qkv = [Linear.joined(projections)] if self._small else projections
        self._o = self._linear(attention.o_proj)
        norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
        self._head_norms = [self._norm(norm) for norm in norms if norm is not None]
        self._gate, self._up, self._down = map(self._linear, (head.gate_proj, head.up_proj, head.down_proj))
        self._down_outputs = head.down_proj.out_features
        self._mlp_norm = self._norm(mlp_norm)
        self._cos, self._sin = self._rotary_tables(frequencies, positions, scale)
        self._unsigned = self._cos.flatten(1), self._sin[:, :, 1:].expand(-1, -1, 2, -1).flatten(1)
        fits = self._size % LANES == 0 and head.gate_proj.out_features % LANES == 0
        self.native = self._one_call(head, mlp_norm) if self._on_native and fits else None

    def __call__(
        self, tokens: Tensor, features: Tensor, angles: tuple[Tensor, Tensor], mask: Tensor | None, cache: SlotCache
    ) -> DraftOutput:
        """Run one draft step.

        Args:
            tokens: `(rows, nodes)` ids one ahead of the features.
            features: `(rows, nodes, tap width)` the target's features and taps, or an `r` of this step in their place.
            angles: `angles` of their positions, or `turns` of them over pending tokens (`tree_attention.running_over`).
            mask: `(rows or 1, 1, nodes, keys)` added to the scores; None lets every node see every key. It is not read
                over pending tokens, which hold their own ancestor mask.
            cache: `reserve` it first; over pending tokens their own cache is used.
        """
        rows, nodes = tokens.shape
        x, residual = self._inputs(tokens, features)
        return self._outputs(self._through(x, residual, rows, nodes, angles, mask, cache))

    def read(
        self, tokens: Tensor, features: Tensor, angles: tuple[Tensor, Tensor], mask: Tensor | None, cache: SlotCache
    ) -> None:
        """Write the keys and values of nodes whose outputs nobody needs; arguments as in `__call__`."""
        rows, nodes = tokens.shape
        self.stored(self._inputs(tokens, features)[0], rows, nodes, angles, cache)

    def __len__(self) -> int:
        """Length of the rotary tables."""
        return len(self._cos)

    def angles(self, starts: Sequence[int], count: int) -> tuple[Tensor, Tensor]:
        """Return cosines and sines of the positions from every row's start on, clamped to the last position."""
        last = len(self._cos) - 1
        if len(set(starts)) == 1 and starts[0] + count - 1 <= last:
            return self._cos[None, starts[0] : starts[0] + count], self._sin[None, starts[0] : starts[0] + count]
        positions = sent(starts, self.device)[:, None] + torch.arange(count, device=self.device)
        positions.clamp_(max=last)
        return self._cos[positions], self._sin[positions]

    def turns(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosines and sines `(rows, count, head_dim)` of positions on the device, for pending tokens."""
        at = positions.clamp(max=len(self._cos) - 1)
        cos, sin = self._unsigned
        return F.embedding(at, cos), F.embedding(at, sin)

    def _inputs(self, tokens: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return the `(rows * nodes, width)` input of attention, and what is added to its output."""
        raise NotImplementedError

    def _outputs(self, out: Tensor) -> DraftOutput:
        """Return p and r of what the MLP gives."""
        raise NotImplementedError

    def _through(
        self,
        x: Tensor,
        residual: Tensor,
        rows: int,
        nodes: int,
        angles: tuple[Tensor, Tensor],
        mask: Tensor | None,
        cache: SlotCache,
    ) -> Tensor:
        """Run attention and MLP.

        Args:
            x: `(rows * nodes, width)` input of attention.
            residual: `(rows * nodes, hidden)` what is added to attention's output.

        Returns:
            `(rows, nodes, outputs)` the MLP's output plus its input, which repeats where the output is wider.
        """
        pending = running()
        if self.native is not None and pending is not None:
            caches = [pending.cache.whole(self.native.probe, self.native.probe, self._layer)]
            return self.native(x.view(rows, nodes, -1), view_of(pending, angles, None), caches, residual)
        a = self._o.plus(self._attend(x, rows, nodes, angles, mask, cache), residual)
        u = self._mlp_norm(a)
        inner = self._up.times(u, self._gate.silu(u))
        beside = a if self._down_outputs == a.shape[1] else a.repeat(1, self._down_outputs // a.shape[1])
        return self._down.plus(inner, beside).view(rows, nodes, -1)

    def _attend(
        self,
        x: Tensor,
        rows: int,
        nodes: int,
        angles: tuple[Tensor, Tensor],
        mask: Tensor | None,
        cache: SlotCache,
    ) -> Tensor:
        """Return the heads' outputs `(rows * nodes, heads * head_dim)` from the layer's input."""
        q, k, v = self.stored(x, rows, nodes, angles, cache)
        if (pending := running()) is not None:
            return pending.attend(q, k, v, self._size**-0.5, None).view(rows * nodes, -1)
        shared = self._heads > self._kv_heads
        if shared and (nodes <= FOLDED or q.is_cuda):
            out = folded_attention(q, k, v, mask)
        else:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=shared)
        return out.transpose(1, 2).reshape(rows * nodes, -1)

    def stored(
        self, x: Tensor, rows: int, nodes: int, angles: tuple[Tensor, Tensor], cache: SlotCache
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Write the keys and values of the layer's input to the cache.

        Returns:
            `(rows, heads, nodes, head_dim)` queries, and the keys and values of all slots.
        """
        heads, kv_heads, size = self._heads, self._kv_heads, self._size
        parts = [linear(x) for linear in self._qkv]
        mixed = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        mixed = mixed.view(rows, nodes, heads + 2 * kv_heads, size)
        if self._head_norms:
            q, k, v = mixed.split([heads, kv_heads, kv_heads], dim=2)
            q_norm, k_norm = self._head_norms
            mixed = torch.cat([q_norm(q), k_norm(k), v], dim=2)
        if (pending := running()) is not None:
            new = mixed[:, :, heads + kv_heads :].transpose(1, 2)  # as many and as wide as keys
            keys, values = pending.held(new, new, self._layer)
            return rotated_and_stored(mixed, angles, keys, values, pending), keys, values
        turned = mixed[:, :, : heads + kv_heads].unflatten(-1, (2, size // 2))
        cos, sin = angles
        turned = torch.addcmul(turned * cos, turned.flip(-2), sin).flatten(-2).transpose(1, 2)
        v = mixed[:, :, heads + kv_heads :].transpose(1, 2)
        return turned[:, :heads], *cache.update(turned[:, heads:], v, self._layer)

    # --- what is prepared --------------------------------------------------------------------------------------

    def _one_call(self, head: Any, mlp_norm: RMSNorm) -> Stack:
        attention = head.self_attn
        parts = (attention.q_proj, attention.k_proj, attention.v_proj), (head.gate_proj, head.up_proj)
        (qkv, qkv_bias), (gate_up, gate_up_bias) = (joined(*(plain_linear(part) for part in own)) for own in parts)
        norms = [getattr(attention, name) for name in ("q_norm", "k_norm") if self._head_norms]
        layer = Layer(
            Weight(qkv, qkv_bias, bits=draft_bits(qkv)),
            narrow(*plain_linear(attention.o_proj)),
            Weight(gate_up, gate_up_bias, gated=True, bits=draft_bits(gate_up)),
            narrow(*plain_linear(head.down_proj)),
            self._heads,
            self._kv_heads,
            self._size**-0.5,
            None,
            (mlp_norm.weight, mlp_norm.eps),
            tuple((norm.weight, norm.eps) for norm in norms),
        )
        return Stack([layer])

    def _linear(self, module: nn.Module) -> Linear:
        if isinstance(module, NativeLinear):
            return NativeProduct(*plain_linear(module))
        if isinstance(module, PackedLinear) and not self._small:
            return PackedProduct(module)
        weight, bias = plain_linear(module)
        return Linear(weight.to(self.dtype), None if bias is None else bias.to(self.dtype))

    def _norm(self, norm: RMSNorm) -> Callable[[Tensor], Tensor]:
        weight, eps = norm.weight.detach().to(self.dtype).contiguous(), norm.eps
        if self._on_native:
            return lambda x: rms_norm(x, weight, eps)
        shape = weight.shape
        return lambda x: F.rms_norm(x, shape, weight, eps)

    def _rotary_tables(self, frequencies: Tensor, positions: int, scale: float) -> tuple[Tensor, Tensor]:
        """Return `(positions, 1, 2, head_dim / 2)` cosines, and sines with the sign of each half."""
        angles = torch.arange(positions, dtype=torch.float64)[:, None] * frequencies
        cos, sin = angles.cos() * scale, angles.sin() * scale
        tables = torch.stack([cos, cos], dim=1), torch.stack([-sin, sin], dim=1)
        return tuple(table[:, None].to(self.device, self.dtype) for table in tables)  # type: ignore[return-value]


class Linear:
    """The linear map `x W^T + b` over `(rows, in)`, fused with common next operations.

    Args:
        weight: `(out, in)`.
        bias: `(out,)` or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None):
        self.weight, self.bias = weight, bias
        self._transposed = weight.T

    @classmethod
    def joined(cls, parts: Sequence[Linear]) -> Linear:
        """Return a layer whose output is that of all parts, side by side."""
        return cls(*joined(*((part.weight, part.bias) for part in parts)))

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def plus(self, x: Tensor, other: Tensor) -> Tensor:
        """Return the result plus `other`."""
        out = torch.addmm(other, x, self._transposed)
        return out if self.bias is None else out + self.bias

    def times(self, x: Tensor, other: Tensor) -> Tensor:
        """Return the result times `other`, elementwise."""
        return self(x).mul_(other)

    def silu(self, x: Tensor) -> Tensor:
        """Return the SiLU of the result."""
        return F.silu(self(x), inplace=True)


def joined(*parts: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor | None]:
    """Return weight and bias of a layer whose output is that of all parts, side by side."""
    biases = [bias for _, bias in parts if bias is not None]
    return torch.cat([weight for weight, _ in parts]), torch.cat(biases) if biases else None


class NativeProduct(Linear):
    """A linear map on a weight in the layout of our kernels."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        self.product, self.bias = narrow(weight, bias), bias

    def __call__(self, x: Tensor) -> Tensor:
        return self.product(x)

    def plus(self, x: Tensor, other: Tensor) -> Tensor:
        return self.product(x, other)


def narrow(weight: Tensor, bias: Tensor | None) -> Weight:
    """Return a weight in the layout of our kernels, of eight bits where it may have them."""
    return Weight(weight, bias, bits=draft_bits(weight))


class PackedProduct(Linear):
    """A linear map on a weight in oneDNN's layout, where the next operation is part of the product."""

    def __init__(self, packed: PackedLinear):
        self._packed, self.bias = packed._packed, packed.bias

    def __call__(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "none", [], "")

    def plus(self, x: Tensor, other: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise.binary(x, other, self._packed, self.bias, "add")

    def times(self, x: Tensor, other: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise.binary(x, other, self._packed, self.bias, "mul")

    def silu(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "swish", [], "")
