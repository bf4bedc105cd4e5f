"""Norms, MLPs and attentions that compute what a model's own do with fewer and larger operations.

A layer of a small model is some sixty operations of a few microseconds each, and at one token most of its time goes to
calling them. These modules join products that read the same input, rotate queries and keys at once, and let attention
share heads in place. `fused.py` says which modules they may replace.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from outdraft.target.backends import tree_attention

Join = Callable[[Tensor, Tensor | None], nn.Module]
"""Makes a linear layer of a weight `(out, in)` and a bias."""

DIRECT = ("sdpa", tree_attention.ATTENTION)
"""Names of attentions that a replacement calls itself; others are looked up."""

LONG = 64
"""Tokens from which a check for a causal mask is worthwhile."""

FOLDED = 16
"""Tokens up to which heads that share keys become queries of one head on a CPU. That reads the keys once; the grouped
way takes up to seven times as long at one token (24 rows of 400 tokens, 9 heads on 3)."""


class FusedNorm(nn.Module):
    """RMSNorm as the layer norm of `[x, -x]`, whose mean is zero: one fused operation instead of eight.

    Args:
        norm: a module with a weight `(width,)` and an epsilon.
    """

    doubled: Tensor

    def __init__(self, norm: Any, join: Join | None = None):
        super().__init__()
        self.weight, self.eps = norm.weight, float(epsilon(norm) or 0.0)
        doubled = torch.cat([norm.weight.detach(), torch.zeros_like(norm.weight)])
        self.register_buffer("doubled", doubled, persistent=False)
        self._width, self._shape = len(norm.weight), (2 * len(norm.weight),)

    def forward(self, hidden_states: Tensor) -> Tensor:
        if hidden_states.is_cuda and tree_attention.running() is not None:
            return tree_attention.normed(hidden_states, self.weight, self.eps)
        if hidden_states.is_cuda:
            return F.rms_norm(hidden_states, self.weight.shape, self.weight, self.eps)
        both = torch.cat((hidden_states, hidden_states.neg()), dim=-1)
        return F.layer_norm(both, self._shape, self.doubled, None, self.eps)[..., : self._width]


class FusedMLP(nn.Module):
    """A gated MLP that joins its two products of one input.

    Args:
        mlp: a module with `gate_proj`, `up_proj`, `down_proj` and `act_fn`.
    """

    def __init__(self, mlp: Any, join: Join):
        super().__init__()
        self.gate_up_proj = join(*joined(mlp.gate_proj, mlp.up_proj))
        self.down_proj = join(mlp.down_proj.weight, mlp.down_proj.bias)
        self.act_fn = mlp.act_fn
        self._silu = type(mlp.act_fn).__name__ in ("SiLU", "SiLUActivation")

    def forward(self, x: Tensor) -> Tensor:
        both = self.gate_up_proj(x)
        if both.is_cuda and self._silu and tree_attention.running() is not None:
            return self.down_proj(tree_attention.gated(both))
        gate, up = both.chunk(2, -1)
        return self.down_proj(self.act_fn(gate) * up)


class FusedAttention(nn.Module):
    """Attention with rotary embeddings: one product for queries, keys and values, one rotation for queries and keys.

    Args:
        attention: the module, called as `transformers` calls it.
        rotation: tables and masks shared by the layers of a model.
        double: gives a norm's own fused replacement, None if there is none.
    """

    head_dim: int
    layer_idx: int
    scaling: float
    config: Any

    def __init__(self, attention: Any, join: Join, rotation: Rotation, double: Callable[[nn.Module], nn.Module | None]):
        super().__init__()
        for name, value in vars(attention).items():  # what attention functions may look up, the config among it
            if not name.startswith("_") and name not in self.__dict__:
                self.__dict__[name] = value
        self.qkv_proj = join(*joined(attention.q_proj, attention.k_proj, attention.v_proj))
        self.o_proj = join(attention.o_proj.weight, attention.o_proj.bias)
        self._heads = attention.q_proj.out_features // attention.head_dim
        self._kv_heads = attention.k_proj.out_features // attention.head_dim
        self._rotation = rotation
        norms = (attention._modules.get(name) for name in ("q_norm", "k_norm"))
        self.q_norm, self.k_norm = (None if norm is None else double(norm) or norm for norm in norms)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        rows, tokens, _ = hidden_states.shape
        heads, kv_heads, size = self._heads, self._kv_heads, self.head_dim
        mixed = self.qkv_proj(hidden_states).view(rows, tokens, heads + 2 * kv_heads, size)
        straight, pending = mixed[:, :, : heads + kv_heads], tree_attention.running()
        if self.q_norm is not None and self.k_norm is not None:
            straight = torch.cat([self.q_norm(straight[:, :, :heads]), self.k_norm(straight[:, :, heads:])], dim=2)
            if pending is not None:
                mixed = torch.cat([straight, mixed[:, :, heads + kv_heads :]], dim=2)
        if pending is not None:
            new = mixed[:, :, heads + kv_heads :].transpose(1, 2)  # as many and as wide as keys
            keys, values = pending.held(new, new, self.layer_idx)
            query = tree_attention.rotated_and_stored(mixed, position_embeddings, keys, values, pending)
            return self.o_proj(pending.attend(query, keys, values, self.scaling, attention_mask)), None
        cos, sin = self._rotation.tables(*position_embeddings)
        halves = straight.view(rows, tokens, heads + kv_heads, 2, size // 2)
        turned = torch.addcmul(halves * cos, halves.flip(3), sin).view(rows, tokens, -1, size).transpose(1, 2)
        query, key = turned[:, :heads], turned[:, heads:]
        value = mixed[:, :, heads + kv_heads :].transpose(1, 2)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        name = self.config._attn_implementation
        if name in DIRECT and attention_mask is not None:
            shared = heads != kv_heads
            mask = self._rotation.added(attention_mask, query.dtype)
            if shared and mask is not None and tokens <= FOLDED and query.device.type == "cpu" and mask.shape[1] == 1:
                # Heads that share keys as further queries of one head.
                query = query.reshape(rows, kv_heads, -1, size)
                mask = self._rotation.repeated(mask, heads // kv_heads)
                out = F.scaled_dot_product_attention(query, key, value, mask, scale=self.scaling)
                out = out.view(rows, heads, tokens, size)
                return self.o_proj(out.transpose(1, 2).reshape(rows, tokens, -1)), None
            out = F.scaled_dot_product_attention(
                query, key, value, mask, is_causal=mask is None, scale=self.scaling, enable_gqa=shared
            )
            return self.o_proj(out.transpose(1, 2).reshape(rows, tokens, -1)), None
        interface: Any = ALL_ATTENTION_FUNCTIONS.get_interface(name, sdpa_attention_forward)
        out, weights = interface(self, query, key, value, attention_mask, scaling=self.scaling, **kwargs)
        return self.o_proj(out.reshape(rows, tokens, -1)), weights


class Rotation:
    """Tables and masks that the layers of one forward share; later layers with the same tensors reuse them.

    They are keyed by identity, together with the tensors themselves, so that no other tensors can match.
    """

    def __init__(self) -> None:
        self._tables: tuple[Any, ...] = (None, None, None)
        self._mask: tuple[Any, ...] = (None, None)
        self._repeated: tuple[Any, ...] = (None, None)

    def tables(self, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Convert `(rows, tokens, size)` tables to `(rows, tokens, 1, 2, size / 2)`, sines signed for mixed halves."""
        known, *tables = self._tables
        if known is not cos:
            tables = list(_halves(cos, sin))
            self._tables = (cos, *tables)
        return tables[0], tables[1]

    def added(self, mask: Tensor, dtype: torch.dtype) -> Tensor | None:
        """Convert a boolean mask to one that is added to scores, once for all layers. A prompt's causal mask becomes
        None, for which attention has a kernel that skips the other half."""
        if mask.dtype != torch.bool:
            return mask
        known, added = self._mask
        if known is not mask and _is_causal(mask):
            self._mask = (mask, None)
            return None
        if known is not mask:
            added = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -torch.inf)
            self._mask = (mask, added)
        return added

    def repeated(self, added: Tensor, times: int) -> Tensor:
        """Repeat a mask for `times` as many queries, one set of them after the other."""
        known, repeated = self._repeated
        if known is not added:
            repeated = added.repeat(1, 1, times, 1)
            self._repeated = (added, repeated)
        return repeated


def _is_causal(mask: Tensor) -> bool:
    tokens, keys = mask.shape[-2:]
    if tokens != keys or tokens < LONG:
        return False
    return bool((mask == torch.ones(tokens, keys, dtype=torch.bool, device=mask.device).tril()).all())


def _halves(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = (x[:, :, None].unflatten(-1, (2, -1)) for x in (cos, sin))
    return cos, torch.stack([-sin[..., 0, :], sin[..., 1, :]], dim=-2)


def epsilon(norm: Any) -> float | None:
    """Return the epsilon of an RMSNorm, under either of its names."""
    found = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    return found if isinstance(found, float) else None


def joined(*parts: Any) -> tuple[Tensor, Tensor | None]:
    weight = _side_by_side([part.weight.detach() for part in parts])
    return weight, None if parts[0].bias is None else _side_by_side([part.bias.detach() for part in parts])


def _side_by_side(parts: list[Tensor]) -> Tensor:
    """Join the parts to one tensor; if another view of the model made them adjacent already, it is a view."""
    whole, place = parts[0], parts[0].data_ptr()
    for part in parts:
        same = part.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
        if not same or part.data_ptr() != place or not part.is_contiguous():
            return torch.cat(parts)
        place += part.nbytes
    return whole.as_strided((sum(len(part) for part in parts), *whole.shape[1:]), whole.stride())
