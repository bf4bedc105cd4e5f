"""The forward of a trained `FeatureHead`, arranged for the few nodes of a draft level.

The same equations as `FeatureHead.forward` and the same weights; what differs is how many kernels a step takes and
what they read. Drafting is not bound by arithmetic: a level of three nodes through a small head is some forty launches
of a few microseconds each. So

- what depends on the token alone (its half of the fusion with the bias, and FSPAD's gate) is looked up in a table over
  the vocabulary, where that takes no more than `TABLE_BYTES`;
- query, key and value are one product, rotated together; residuals and gates are added or multiplied inside the
  products where there is a kernel for it;
- on a CPU, small heads compute in float32 on plain weights, whatever the target's precision: the overhead of oneDNN's
  low-precision products is three times that of a whole small float32 product. Larger ones stay as they are.

It reads a head on any backend. Knows nothing of trees, of how candidates are chosen, or of where weights come from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from outdraft.backends import PackedLinear
from outdraft.backends.fused import FOLDED
from outdraft.backends.tree_attention import rotated_and_stored, running
from outdraft.cache import SlotCache
from outdraft.drafters.feature_head import DraftOutput, FeatureHead, RMSNorm
from outdraft.places import sent

TABLE_BYTES = 64 * 2**20
"""Most memory that the table of what depends on the token alone may take."""

SMALL = 2**20
"""Entries of the largest weight matrix of a head that computes in float32 on plain weights on a CPU. Up to there a
product over few rows costs less so than packed in bfloat16; beyond, reading twice the bytes costs more."""

TABLE_CHUNK = 4096
"""Tokens of the table that are computed at once."""


class DraftStep:
    """A `FeatureHead` for drafting only.

    Args:
        head: the trained network, on any backend; its weights are read once and stay as they are.
        embed: token ids to what the head was trained to read of them.
        vocab_size: token ids there are.
    """

    def __init__(self, head: FeatureHead, embed: Callable[[Tensor], Tensor], vocab_size: int):
        config, attention, fusion = head.config, head.self_attn, head.fusion
        self._config, self._embed = config, embed
        self._heads, self._kv_heads = config.num_attention_heads, config.num_key_value_heads
        place = head.norm.weight
        own = [module for module in head.modules() if isinstance(module, nn.Linear | PackedLinear)]
        small = max(linear.out_features * linear.in_features for linear in own) <= SMALL
        widened = small and place.device.type == "cpu" and place.dtype != torch.float64
        self.dtype = torch.float32 if widened else place.dtype
        self.device = place.device

        def linear(module: nn.Module) -> Linear:
            if isinstance(module, PackedLinear) and not small:
                return _Packed(module)
            weight, bias = plain(module)
            return Linear(weight.to(self.dtype), None if bias is None else bias.to(self.dtype))

        self._fc = linear(fusion.fc)
        self._taps = fusion.taps
        self._state_norm = None if fusion.state_norm is None else self._norm(fusion.state_norm)
        self._table: Tensor | None = None
        if fusion.feature_sampling:
            self._fusion_norm = self._norm(fusion.norm)
            self._fusion_gate, self._fusion_up = linear(fusion.gate_proj), linear(fusion.up_proj)
            self._fusion_down = linear(fusion.down_proj)
        projections = [attention.q_proj, attention.k_proj, attention.v_proj]
        self._qkv = [Linear.joined([linear(part) for part in projections])] if small else list(map(linear, projections))
        self._o = linear(attention.o_proj)
        self._layer_norm = self._norm(head.norm)
        self._gate, self._up, self._down = linear(head.gate_proj), linear(head.up_proj), linear(head.down_proj)
        self._cos, self._sin = self._rotary_tables()
        width = config.hidden_size + (config.intermediate_size if fusion.feature_sampling else 0)
        if vocab_size * width * torch.finfo(self.dtype).bits // 8 <= TABLE_BYTES:
            self._tabulate(*plain(fusion.fc), vocab_size, width)

    # --- the forward -------------------------------------------------------------------------------------------

    def __call__(
        self, tokens: Tensor, features: Tensor, angles: tuple[Tensor, Tensor], mask: Tensor | None, cache: SlotCache
    ) -> DraftOutput:
        """One draft step; arithmetic as in `FeatureHead.forward`.

        Args:
            tokens: `(rows, nodes)` ids one ahead of the features.
            features: `(rows, nodes, tap width)` of the target, or an `r` of this step in their place.
            angles: `angles` of their positions, or `turns` of them over pending tokens (`tree_attention.running_over`).
            mask: `(rows or 1, 1, nodes, keys)` added to the scores; None lets every node see every key. Not read over
                pending tokens, which say themselves what they see.
            cache: `reserve` it first; over pending tokens theirs is taken.
        """
        rows, nodes = tokens.shape
        h = self._fuse(tokens.reshape(-1), self._state(features.reshape(rows * nodes, -1)))
        a = self._o.plus(self._attend(h, rows, nodes, angles, mask, cache), h)
        u = self._layer_norm(a)
        inner = self._up.times(u, self._gate.silu(u))
        if not self._config.partial_alignment:
            out = self._down.plus(inner, a).view(rows, nodes, -1)
            return DraftOutput(out, out)
        both = self._down.plus(inner, torch.cat([a, a], dim=-1)).view(rows, nodes, -1)
        return DraftOutput(*both.chunk(2, dim=-1))

    def angles(self, starts: Sequence[int], count: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the positions from every row's start on; past the last position all stand there.

        Args:
            starts: of every row.
            count: positions of each.
        """
        last = len(self._cos) - 1
        if len(set(starts)) == 1 and starts[0] + count - 1 <= last:
            return self._cos[None, starts[0] : starts[0] + count], self._sin[None, starts[0] : starts[0] + count]
        positions = sent(starts, self.device)[:, None] + torch.arange(count, device=self.device)
        positions.clamp_(max=last)
        return self._cos[positions], self._sin[positions]

    def turns(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines `(rows, count, head_dim)` of positions on the device, as over pending tokens."""
        at = positions.clamp(max=len(self._cos) - 1)
        return self._cos.flatten(1)[at], self._sin[:, :, 1:].expand(-1, -1, 2, -1).flatten(1)[at]

    def _state(self, features: Tensor) -> Tensor:
        """What the fusion reads, as `Fusion.state`."""
        if self._taps is not None and features.shape[1] > self._config.hidden_size:
            feature, *outputs = features.split(self._config.hidden_size, dim=-1)
            features = self._taps(feature, outputs)  # decided tokens only, so as it is
        features = features.to(self.dtype)
        return features if self._state_norm is None else self._state_norm(features)

    def _fuse(self, tokens: Tensor, features: Tensor) -> Tensor:
        """`(e, f) -> h` of `(nodes,)` tokens and `(nodes, hidden)` features, equation 3."""
        if self._table is not None:
            known = F.embedding(tokens, self._table)
            if not self._config.feature_sampling:
                return self._fc.plus(features, known)
            z = self._fc.plus(features, known[:, : self._config.hidden_size])
            gate = known[:, self._config.hidden_size :]
        else:
            embeddings = self._embed(tokens).to(self.dtype)
            z = self._fc(torch.cat([embeddings, features], dim=-1))
            if not self._config.feature_sampling:
                return z
            gate = self._fusion_gate.silu(embeddings)
        return self._fusion_down.plus(self._fusion_up.times(self._fusion_norm(z), gate), z)

    def _attend(
        self,
        x: Tensor,
        rows: int,
        nodes: int,
        angles: tuple[Tensor, Tensor],
        mask: Tensor | None,
        cache: SlotCache,
    ) -> Tensor:
        """`(rows * nodes, heads * head_dim)` what the heads read, from the layer's input."""
        heads, kv_heads, size = self._heads, self._kv_heads, self._config.head_dim
        parts = [linear(x) for linear in self._qkv]
        mixed = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        mixed = mixed.view(rows, nodes, heads + 2 * kv_heads, size)
        if (pending := running()) is not None:
            new = mixed[:, :, heads + kv_heads :].transpose(1, 2)  # as many and as wide as keys
            keys, values = pending.held(new, new, 0)
            q = rotated_and_stored(mixed, angles, keys, values, pending)
            return pending.attend(q, keys, values, size**-0.5, None).view(rows * nodes, -1)
        turned = mixed[:, :, : heads + kv_heads].unflatten(-1, (2, size // 2))
        cos, sin = angles
        turned = torch.addcmul(turned * cos, turned.flip(-2), sin).flatten(-2).transpose(1, 2)
        v = mixed[:, :, heads + kv_heads :].transpose(1, 2)
        k, v = cache.update(turned[:, heads:], v, 0)
        q, shared = turned[:, :heads], heads // kv_heads
        if shared > 1 and (nodes <= FOLDED or q.is_cuda):
            # Heads that share keys as further queries of one head: the keys are read once.
            q = q.reshape(rows, kv_heads, shared * nodes, size)
            seen = None if mask is None else mask.repeat(1, 1, shared, 1)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
            out = out.reshape(rows, heads, nodes, size)
        else:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=shared > 1)
        return out.transpose(1, 2).reshape(rows * nodes, -1)

    # --- what is prepared --------------------------------------------------------------------------------------

    def _norm(self, norm: RMSNorm) -> Callable[[Tensor], Tensor]:
        weight, eps = norm.weight.detach().to(self.dtype), norm.eps
        shape = weight.shape
        return lambda x: F.rms_norm(x, shape, weight, eps)

    def _rotary_tables(self) -> tuple[Tensor, Tensor]:
        """`(positions, 1, 2, head_dim / 2)` cosines, and sines with the sign with which each half is mixed in."""
        config = self._config
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
        angles = torch.arange(config.max_position_embeddings, dtype=torch.float64)[:, None]
        angles = angles * config.rope_theta**-exponents
        cos, sin = angles.cos(), angles.sin()
        tables = torch.stack([cos, cos], dim=1), torch.stack([-sin, sin], dim=1)
        return tuple(table[:, None].to(self.device, self.dtype) for table in tables)  # type: ignore[return-value]

    @torch.inference_mode()
    def _tabulate(self, weight: Tensor, bias: Tensor | None, vocab_size: int, width: int) -> None:
        """`[W_e e + b ; SiLU(W_g e)]` of every token, after which only the features' half of W_fc is needed."""
        d, weight = self._config.hidden_size, weight.to(self.dtype)
        of_token = Linear(weight[:, :d], None if bias is None else bias.to(self.dtype))
        table = torch.empty(vocab_size, width, dtype=self.dtype, device=self.device)
        for start in range(0, vocab_size, TABLE_CHUNK):
            ids = torch.arange(start, min(start + TABLE_CHUNK, vocab_size), device=self.device)
            embeddings = self._embed(ids).to(self.dtype)
            table[ids, :d] = of_token(embeddings)
            if width > d:
                table[ids, d:] = self._fusion_gate.silu(embeddings)
        half = weight[:, d:].contiguous()
        self._fc = _Packed(PackedLinear(half, None)) if isinstance(self._fc, _Packed) else Linear(half, None)
        self._table = table


class Linear:
    """`x W^T + b` over `(rows, in)`, and what is often done to the result next.

    Args:
        weight: `(out, in)`.
        bias: `(out,)` or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None):
        self.weight, self.bias = weight, bias
        self._transposed = weight.T

    @classmethod
    def joined(cls, parts: Sequence[Linear]) -> Linear:
        """One whose output is that of all parts, side by side."""
        biases = [part.bias for part in parts if part.bias is not None]
        return cls(torch.cat([part.weight for part in parts]), torch.cat(biases) if biases else None)

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def plus(self, x: Tensor, other: Tensor) -> Tensor:
        """The result and `other`."""
        out = torch.addmm(other, x, self._transposed)
        return out if self.bias is None else out + self.bias

    def times(self, x: Tensor, other: Tensor) -> Tensor:
        """The result times `other`, elementwise."""
        return self(x).mul_(other)

    def silu(self, x: Tensor) -> Tensor:
        """SiLU of the result."""
        return F.silu(self(x), inplace=True)


class _Packed(Linear):
    """The same on a weight in oneDNN's layout, where what is done next is part of the product."""

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


def plain(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight `(out, in)` and bias of a linear layer on any backend."""
    bias = None if module.bias is None else module.bias.detach()  # type: ignore[operator]
    if isinstance(module, PackedLinear):
        return module._packed.to_dense(), bias
    return module.weight.detach(), bias  # type: ignore[operator]
