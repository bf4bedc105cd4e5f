"""The one-layer drafter on the target's features: FSPAD, and EAGLE's head by switches.

The network of arXiv 2408.15562 (section 3: feature sampling, partial alignment) serves both training and decoding. Its
inputs are embeddings and features; its outputs are `p` (read by the target's head) and `r` (fed back as the next
feature). `drafter.py` grows trees with it, `folder.py` reads its weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from outdraft.errors import UserError
from outdraft.methods.checkpoint import Network
from outdraft.methods.fspad.unrolled import Unrolled, grouped_attention


class KeysAndValues(Protocol):
    """The protocol of a cache of keys and values: a `SlotCache` in decoding."""

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Store a layer's `(batch, heads, nodes, head_dim)`; return those of all slots that the mask covers."""


@dataclass
class FeatureHeadConfig:
    """The shapes and switches of the drafter; the two switches default to FSPAD's."""

    hidden_size: int
    """The width d of the target's features and embeddings."""
    intermediate_size: int
    """The width i of the feature-sampling space and of the layer's MLP."""
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    """The number of entries of the target's embedding and head."""
    feature_sampling: bool = True
    """True for FSPAD's fusion, where the token gates channels of the fused feature; else EAGLE's linear fusion."""
    partial_alignment: bool = True
    """True for FSPAD's two outputs, one for the token and one for the feature; else EAGLE's single output."""
    fc_bias: bool = True
    """True for a bias in the fusion layer."""
    attention_bias: bool = False
    """True for biases on the query, key and value projections, as in Qwen2's EAGLE heads."""
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    max_position_embeddings: int = 2048
    tap_layers: tuple[int, ...] = ()
    """The target's layers, counted from 1, whose outputs are read beside its feature (after EAGLE-3); empty in the
    paper."""
    state_norm: bool = False
    """True for an RMSNorm on the feature that is read, the target's or the drafter's own; False in the paper."""
    draft_vocab_size: int = 0
    """The size of the draft vocabulary, the most frequent tokens of the responses; 0 is the whole vocabulary."""

    def __post_init__(self) -> None:
        if not 0 <= self.draft_vocab_size <= self.vocab_size:
            raise UserError(
                f"draft_vocab_size must be at most the vocabulary's {self.vocab_size}, not {self.draft_vocab_size}"
            )
        self.tap_layers = tuple(self.tap_layers)
        if sorted(set(self.tap_layers)) != list(self.tap_layers) or (self.tap_layers and self.tap_layers[0] < 1):
            raise UserError(f"tap_layers must be layers from 1 on in rising order, not {list(self.tap_layers)}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of num_key_value_heads "
                f"({self.num_key_value_heads})"
            )
        if self.head_dim % 2:
            raise UserError(f"head_dim must be even for rotary positions, not {self.head_dim}")


class DraftOutput(NamedTuple):
    """The two outputs, `(batch, nodes, hidden)` each; the same tensor when partial alignment is off."""

    p: Tensor
    """The input of the target's head, which gives the draft logits."""
    r: Tensor
    """The predicted next feature of the target, fed back in the next draft step."""


class RMSNorm(nn.Module):
    """The root mean square normalisation over the last dimension."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class DraftNetwork(Network):
    """The protocol of a network on the target's features, as decoding (`drafter.py`) needs it."""

    norm: RMSNorm
    embed_tokens: nn.Embedding | None
    """The checkpoint's own embedding; None uses the target's."""
    lm_head: nn.Linear | None
    """The drafter's own output layer, over the draft vocabulary; None uses the target's."""
    draft_tokens: Tensor | None
    """The ids of the draft vocabulary; None for the whole vocabulary."""

    def layers_read(self, layers: int) -> tuple[int, ...]:
        """Return the layers whose outputs are read, counted from 1, of a target with `layers` layers."""
        raise NotImplementedError

    def frequencies(self) -> tuple[Tensor, float]:
        """Return the `(head_dim / 2,)` rotary frequencies in float64, and the factor of cosines and sines."""
        raise NotImplementedError

    def rotary(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return cosines and sines `(batch, 1, nodes, head_dim)` of the positions, rounded once from float64."""
        table = self._rotary_table
        if table is None or table[0].dtype != dtype or table[0].device != positions.device:
            frequencies, scale = self.frequencies()
            order = torch.arange(self.config.max_position_embeddings, dtype=torch.float64)
            angles = (order[:, None] * frequencies).repeat(1, 2)
            table = tuple((part * scale).to(positions.device, dtype) for part in (angles.cos(), angles.sin()))
            self._rotary_table = table
        return table[0][positions][:, None], table[1][positions][:, None]

    _rotary_table: tuple[Tensor, ...] | None = None  # no buffer: `.to(bfloat16)` must not round angles


def turning(head_dim: int, theta: float) -> Tensor:
    """Return the `(head_dim / 2,)` unscaled rotary frequencies."""
    return theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)


class LayerTaps(nn.Module):
    """A correction of the target's feature by outputs of several of its layers.

    The correction begins at zero, so that the result stays in the space of the features: the drafter's own r takes its
        place in later draft steps, where the target has not run yet.
    """

    def __init__(self, config: FeatureHeadConfig):
        super().__init__()
        d, count = config.hidden_size, len(config.tap_layers)
        self.norms = nn.ModuleList(RMSNorm(d, config.rms_norm_eps) for _ in range(count))
        # Nothing is drawn for it, so that a seed gives all other weights as it does without.
        self.proj = nn.utils.skip_init(nn.Linear, count * d, d, bias=False)
        nn.init.zeros_(self.proj.weight)

    def forward(self, feature: Tensor, outputs: Sequence[Tensor]) -> Tensor:
        normed = [norm(output) for norm, output in zip(self.norms, outputs, strict=True)]
        return feature + self.proj(torch.cat(normed, dim=-1))


class Fusion(nn.Module):
    """The fusion `(e, f) -> h`: a linear layer (EAGLE), then with feature sampling FSPAD's gated correction, equation
    3."""

    def __init__(self, config: FeatureHeadConfig):
        super().__init__()
        d, i = config.hidden_size, config.intermediate_size
        self.fc = nn.Linear(2 * d, d, bias=config.fc_bias)
        self.taps = LayerTaps(config) if config.tap_layers else None
        self.state_norm = RMSNorm(d, config.rms_norm_eps) if config.state_norm else None
        self.feature_sampling = config.feature_sampling
        if config.feature_sampling:
            self.norm = RMSNorm(d, config.rms_norm_eps)
            self.gate_proj = nn.Linear(d, i, bias=False)
            self.up_proj = nn.Linear(d, i, bias=False)
            self.down_proj = nn.Linear(i, d, bias=False)

    def forward(self, embeddings: Tensor, features: Tensor) -> Tensor:
        z = self.fc(torch.cat([embeddings, self.state(features)], dim=-1))
        if not self.feature_sampling:
            return z
        return z + self.down_proj(F.silu(self.gate_proj(embeddings)) * self.up_proj(self.norm(z)))

    def state(self, features: Tensor) -> Tensor:
        """Return the fusion's input `(..., hidden)` from the target's `(..., tap width)`, or from an r in its place.

        The width tells them apart: an r has no outputs of other layers beside it.
        """
        feature, *outputs = features.split(self.fc.out_features, dim=-1)
        if outputs:
            assert self.taps is not None
            feature = self.taps(feature, outputs)
        return feature if self.state_norm is None else self.state_norm(feature)


class Attention(nn.Module):
    """The grouped-query attention with rotary positions, over a cache or, without one, causally over its input.

    Args:
        head_norms: True for an RMSNorm on every query and key head.
    """

    def __init__(self, config: Any, width: int, head_norms: bool = False):
        super().__init__()
        self.head_dim = config.head_dim
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        bias = config.attention_bias
        self.q_proj = nn.Linear(width, self.heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(width, self.kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(width, self.kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(self.heads * self.head_dim, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if head_norms else None
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if head_norms else None

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask: Tensor | None,
        cache: KeysAndValues | Unrolled | None,
        asking: int | None = None,
    ) -> Tensor:
        """Attend from the last `asking` tokens of `(batch, nodes, hidden)`, from all of them when not given."""
        batch, nodes, _ = x.shape
        count = nodes if asking is None else asking
        q = self.q_proj(x[:, nodes - count :]).view(batch, count, self.heads, self.head_dim)
        k = self.k_proj(x).view(batch, nodes, self.kv_heads, self.head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q = rotate(q.transpose(1, 2), (rotary[0][..., -count:, :], rotary[1][..., -count:, :]))
        k = rotate(k.transpose(1, 2), rotary)
        v = self.v_proj(x).view(batch, nodes, self.kv_heads, self.head_dim).transpose(1, 2)
        if isinstance(cache, Unrolled):
            out = cache.attend(q, k, v)
        else:
            k, v = (k, v) if cache is None else cache.update(k, v, 0)
            out = grouped_attention(q, k, v, mask)
        return self.o_proj(out.transpose(1, 2).reshape(batch, count, -1))


class FeatureHead(DraftNetwork):
    """FSPAD's drafter: fusion, one Llama-style layer without input norm, two outputs."""

    shapes: ClassVar[type[FeatureHeadConfig]] = FeatureHeadConfig
    methods: ClassVar[tuple[str, ...]] = ("fspad", "eagle")
    """The names of the methods whose folders hold such a network."""

    def __init__(self, config: FeatureHeadConfig):
        super().__init__()
        self.config = config
        d, i = config.hidden_size, config.intermediate_size
        self.fusion = Fusion(config)
        self.self_attn = Attention(config, d)
        self.norm = RMSNorm(d, config.rms_norm_eps)
        self.gate_proj = nn.Linear(d, i, bias=False)
        self.up_proj = nn.Linear(d, i, bias=False)
        self.down_proj = nn.Linear(i, 2 * d if config.partial_alignment else d, bias=False)
        self.embed_tokens = self.lm_head = None
        self.register_buffer("draft_tokens", torch.arange(config.draft_vocab_size) if config.draft_vocab_size else None)

    def layers_read(self, layers: int) -> tuple[int, ...]:
        return self.config.tap_layers

    @property
    def learned_embeddings(self) -> tuple[Tensor, ...]:
        """Weights that stand in embeddings' places, and are scaled as these are."""
        return ()

    @property
    def method(self) -> str:  # type: ignore[override]
        """The method's name: `eagle` where both switches are off, else `fspad`."""
        return "fspad" if self.config.feature_sampling or self.config.partial_alignment else "eagle"

    def forward(
        self,
        embeddings: Tensor,
        features: Tensor,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        cache: KeysAndValues | Unrolled | None = None,
    ) -> DraftOutput:
        """Run one draft step for every pair (token one ahead, feature).

        Args:
            embeddings: `(batch, nodes, hidden)` the target's embedding of x_{t+1}.
            features: `(batch, nodes, hidden)` the target's f_t, or an `r` of this drafter in its place; with
                `tap_layers` the target's outputs at t of these layers follow f_t, `(batch, nodes, tap width)`.
            positions: `(batch, nodes)` t; counted from 0 when absent.
            mask: `(batch, 1, nodes, keys)` True where a node may look; causal over the input when absent.
            cache: holds keys and values; `reserve` a `SlotCache` first.
        """
        if positions is None:
            positions = torch.arange(embeddings.shape[1], device=embeddings.device)[None]
        h = self.fusion(embeddings, features)
        return outputs(self, h + self.self_attn(h, self.rotary(positions, h.dtype), mask, cache))

    def frequencies(self) -> tuple[Tensor, float]:
        return turning(self.config.head_dim, self.config.rope_theta), 1.0


def outputs(layer: Any, a: Tensor) -> DraftOutput:
    """Return both outputs of a layer from its attention's result `a`, residual included."""
    u = layer.norm(a)
    delta = layer.down_proj(F.silu(layer.gate_proj(u)) * layer.up_proj(u))
    if delta.shape[-1] == a.shape[-1]:
        return DraftOutput(a + delta, a + delta)
    p, r = delta.chunk(2, dim=-1)
    return DraftOutput(a + p, a + r)


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Apply the rotary position embedding in the half-split layout of Llama."""
    cos, sin = rotary
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


@torch.no_grad()
def scaled(drafter: FeatureHead, by: float) -> FeatureHead:
    """Scale weights in place, so that embeddings give what embeddings times `by` gave before; return the drafter."""
    drafter.fusion.fc.weight[:, : drafter.config.hidden_size] *= by
    if drafter.fusion.feature_sampling:
        drafter.fusion.gate_proj.weight *= by
    for learned in drafter.learned_embeddings:
        learned /= by
    return drafter
