"""One decoder layer of a drafter, arranged for the few nodes of a draft level; every draft step shares it.

Query, key and value are one product, rotated together; residuals and gates are added or multiplied inside the products
where there is a kernel for it; small layers on a CPU compute in float32 on plain weights, whatever the target's
precision: the overhead of oneDNN's low-precision products is three times that of a whole small float32 product. Larger
ones stay as they are. It reads weights on any backend.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from outdraft.core.tensors import sent
from outdraft.methods.fspad.network import DraftOutput, RMSNorm
from outdraft.target.backends import PackedLinear
from outdraft.target.backends.fused import FOLDED
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
    """

    def __init__(
        self,
        head: Any,
        frequencies: Tensor,
        positions: int,
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
        self._small = max(linear.out_features * linear.in_features for linear in own) <= SMALL
        widened = self._small and place.device.type == "cpu" and place.dtype != torch.float64
        self.dtype = torch.float32 if widened else place.dtype
        self.device = place.device
        projections = [self._linear(part) for part in (attention.q_proj, attention.k_proj, attention.v_proj)]
        self._qkv = [Linear.joined(projections)] if self._small else projections
        self._o = self._linear(attention.o_proj)
        norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
        self._head_norms = [self._norm(norm) for norm in norms if norm is not None]
        self._gate, self._up, self._down = map(self._linear, (head.gate_proj, head.up_proj, head.down_proj))
        self._layer_norm = self._norm(head.norm)
        self._aligned = head.down_proj.out_features == 2 * attention.o_proj.out_features
        self._cos, self._sin = self._rotary_tables(frequencies, positions, scale)

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
        raise NotImplementedError

    def angles(self, starts: Sequence[int], count: int) -> tuple[Tensor, Tensor]:
        """Return cosines and sines of the positions from every row's start on, clamped to the last position.

        Args:
            starts: first position of every row.
            count: number of positions of each row.
        """
        last = len(self._cos) - 1
        if len(set(starts)) == 1 and starts[0] + count - 1 <= last:
            return self._cos[None, starts[0] : starts[0] + count], self._sin[None, starts[0] : starts[0] + count]
        return self.angles_at(sent(starts, self.device)[:, None] + torch.arange(count, device=self.device))

    def angles_at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosines and sines of `(rows, count)` positions, clamped to the last one."""
        at = positions.clamp(max=len(self._cos) - 1)
        return self._cos[at], self._sin[at]

    def turns(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosines and sines `(rows, count, head_dim)` of positions on the device, for pending tokens."""
        at = positions.clamp(max=len(self._cos) - 1)
        return self._cos.flatten(1)[at], self._sin[:, :, 1:].expand(-1, -1, 2, -1).flatten(1)[at]

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
        heads, kv_heads, size = self._heads, self._kv_heads, self._size
        if (pending := running()) is not None:
            mixed = self._mixed(x, rows, nodes)
            new = mixed[:, :, heads + kv_heads :].transpose(1, 2)  # as many and as wide as keys
            keys, values = pending.held(new, new, self._layer)
            q = rotated_and_stored(mixed, angles, keys, values, pending)
            return pending.attend(q, keys, values, size**-0.5, None).view(rows * nodes, -1)
        q, k, v = self.projected(x, rows, nodes, angles, cache)
        shared = heads // kv_heads
        if shared > 1 and (nodes <= FOLDED or q.is_cuda):
            # Heads that share keys as further queries of one head: the keys are read once.
            q = q.reshape(rows, kv_heads, shared * nodes, size)
            seen = None if mask is None else mask.repeat(1, 1, shared, 1)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
            out = out.reshape(rows, heads, nodes, size)
        else:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=shared > 1)
        return out.transpose(1, 2).reshape(rows * nodes, -1)

    def projected(
        self, x: Tensor, rows: int, nodes: int, angles: tuple[Tensor, Tensor], cache: SlotCache
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the queries of the layer's input, and the keys and values of all slots, the new ones written."""
        heads, kv_heads, size = self._heads, self._kv_heads, self._size
        mixed = self._mixed(x, rows, nodes)
        turned = mixed[:, :, : heads + kv_heads].unflatten(-1, (2, size // 2))
        cos, sin = angles
        turned = torch.addcmul(turned * cos, turned.flip(-2), sin).flatten(-2).transpose(1, 2)
        v = mixed[:, :, heads + kv_heads :].transpose(1, 2)
        k, v = cache.update(turned[:, heads:], v, self._layer)
        return turned[:, :heads], k, v

    def _mixed(self, x: Tensor, rows: int, nodes: int) -> Tensor:
        """Return queries, keys and values `(rows, nodes, all heads, head_dim)` of the layer's input."""
        heads, kv_heads, size = self._heads, self._kv_heads, self._size
        parts = [linear(x) for linear in self._qkv]
        mixed = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        mixed = mixed.view(rows, nodes, heads + 2 * kv_heads, size)
        if self._head_norms:
            q, k, v = mixed.split([heads, kv_heads, kv_heads], dim=2)
            q_norm, k_norm = self._head_norms
            mixed = torch.cat([q_norm(q), k_norm(k), v], dim=2)
        return mixed

    def outputs(self, read: Tensor, x: Tensor, rows: int) -> DraftOutput:
        """Return both outputs `(rows, nodes, hidden)` from what the heads read and the layer's input."""
        a = self._o.plus(read, x)
        u = self._layer_norm(a)
        inner = self._up.times(u, self._gate.silu(u))
        if not self._aligned:
            out = self._down.plus(inner, a).view(rows, -1, a.shape[-1])
            return DraftOutput(out, out)
        both = self._down.plus(inner, torch.cat([a, a], dim=-1)).view(rows, -1, 2 * a.shape[-1])
        return DraftOutput(*both.chunk(2, dim=-1))

    # --- what is prepared --------------------------------------------------------------------------------------

    def _linear(self, module: nn.Module) -> Linear:
        if isinstance(module, PackedLinear) and not self._small:
            return PackedProduct(module)
        weight, bias = plain_linear(module)
        return Linear(weight.to(self.dtype), None if bias is None else bias.to(self.dtype))

    def _norm(self, norm: RMSNorm) -> Callable[[Tensor], Tensor]:
        weight, eps = norm.weight.detach().to(self.dtype), norm.eps
        shape = weight.shape
        return lambda x: F.rms_norm(x, shape, weight, eps)

    def _rotary_tables(self, frequencies: Tensor, positions: int, scale: float) -> tuple[Tensor, Tensor]:
        """Return `(positions, 1, 2, head_dim / 2)` cosines, and sines with the sign of each half."""
        angles = torch.arange(positions, dtype=torch.float64)[:, None] * frequencies
        cos, sin = angles.cos() * scale, angles.sin() * scale
        tables = torch.stack([cos, cos], dim=1), torch.stack([-sin, sin], dim=1)
        return tuple(table[:, None].to(self.device, self.dtype) for table in tables)  # type: ignore[return-value]


def turning(head_dim: int, theta: float) -> Tensor:
    """Return the `(head_dim / 2,)` unscaled rotary frequencies."""
    return theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)


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
        biases = [part.bias for part in parts if part.bias is not None]
        return cls(torch.cat([part.weight for part in parts]), torch.cat(biases) if biases else None)

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
