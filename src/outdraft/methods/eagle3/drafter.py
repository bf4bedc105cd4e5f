"""EAGLE-3's network (arXiv 2503.01840) with the switches of EAGLE-3.1, and decoding with it.

Outputs of several layers of the target, the taps, are projected to the drafter's width, which gives g. One decoder
layer reads the normed embedding of x_{t+1} beside the normed g_t, at rotary position t; a norm and an output layer of
its own, over the tokens that may be drafted, give the draft logits. The residual is g, so that the layer's output can
stand in for g in later steps. Rounds, trees, caches and recordings are those of `fspad/drafter.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from outdraft.methods.fspad.drafter import FeatureDrafter
from outdraft.methods.fspad.layer_step import LayerStep
from outdraft.methods.fspad.network import Attention, DraftNetwork, DraftOutput, KeysAndValues, RMSNorm
from outdraft.methods.tapped import TappedConfig, rotary_frequencies

Map = Callable[[Tensor], Tensor]


@dataclass
class Eagle3Config(TappedConfig):
    """The shapes and switches of the network; switches default to EAGLE-3's."""

    fc_bias: bool = False
    tap_norms: bool = False
    """True for EAGLE-3.1's `fc_norm`, an RMSNorm on every tap."""
    norm_before_fc: bool = False
    """True for one RMSNorm over all taps side by side."""
    norm_before_residual: bool = False
    """True if the residual is the normed g; else it is g itself."""
    norm_output: bool = False
    """True if the final norm's output is fed back (EAGLE-3.1); else the layer's is."""

    def usual_taps(self, layers: int) -> tuple[int, ...]:
        return 2, layers // 2, layers - 3


class Eagle3Head(DraftNetwork):
    """The weights of an EAGLE-3 drafter."""

    method = "eagle3"
    fresh = False
    """True before training has chosen its draft vocabulary and begun its output layer."""

    def __init__(self, config: Eagle3Config):
        super().__init__()
        self.config = config
        d, i, eps = config.hidden_size, config.intermediate_size, config.rms_norm_eps
        width, count = config.target_hidden_size, config.num_taps
        self.fc = nn.Linear(count * width, d, bias=config.fc_bias)
        self.fc_norm = nn.ModuleList(RMSNorm(width, eps) for _ in range(count)) if config.tap_norms else None
        self.input_norm = RMSNorm(count * width, eps) if config.norm_before_fc else None
        self.input_layernorm, self.hidden_norm = RMSNorm(d, eps), RMSNorm(d, eps)
        self.self_attn = Attention(config, 2 * d, config.head_norms)
        self.post_attention_layernorm, self.norm = RMSNorm(d, eps), RMSNorm(d, eps)
        self.gate_proj, self.up_proj = nn.Linear(d, i, bias=False), nn.Linear(d, i, bias=False)
        self.down_proj = nn.Linear(i, d, bias=False)
        kept = config.draft_vocab_size
        self.lm_head = nn.Linear(d, kept or config.vocab_size, bias=False) if config.own_head else None
        self.embed_tokens = None
        self.register_buffer("draft_tokens", torch.arange(kept) if kept else None)

    @property
    def own_heads(self) -> list[Tensor]:
        return [] if self.lm_head is None else [self.lm_head.weight]

    def layers_read(self, layers: int) -> tuple[int, ...]:
        return self.config.taps(layers)

    def frequencies(self) -> tuple[Tensor, float]:
        return rotary_frequencies(self.config)

    def forward(
        self,
        embeddings: Tensor,
        features: Tensor,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        cache: KeysAndValues | None = None,
    ) -> DraftOutput:
        """Run one draft step in training; arguments as in `FeatureHead.forward`, taps in the target's own width.

        Returns:
            The normed state, which the output layer reads, and the state that is fed back.
        """
        if positions is None:
            positions = torch.arange(embeddings.shape[1], device=embeddings.device)[None]
        g = fused(features, self.config, list(self.fc_norm or ()), self.input_norm, self.fc)
        state = self.hidden_norm(g)
        x = torch.cat([self.input_layernorm(embeddings), state], dim=-1)
        a = (state if self.config.norm_before_residual else g) + self.self_attn(
            x, self.rotary(positions, x.dtype), mask, cache
        )
        u = self.post_attention_layernorm(a)
        out = a + self.down_proj(F.silu(self.gate_proj(u)) * self.up_proj(u))
        normed = self.norm(out)
        return DraftOutput(normed, normed if self.config.norm_output else out)


def fused(features: Tensor, config: Eagle3Config, norms: Sequence[Map], whole: Map | None, fc: Map) -> Tensor:
    """Return g from the target's `(..., (1 + taps) * width)` feature and taps; a fed-back g passes as it is.

    Args:
        features: the target's, or the drafter's own state, which its width tells.
        norms: EAGLE-3.1's norm of every tap, or none.
        whole: the norm over all taps side by side, or None.
    """
    width = config.target_hidden_size
    if features.shape[-1] != (1 + config.num_taps) * width:
        return features
    taps = features[..., width:]
    if norms:
        taps = torch.cat([norm(part) for norm, part in zip(norms, taps.split(width, dim=-1), strict=True)], dim=-1)
    return fc(taps if whole is None else whole(taps))


MOST_POSITIONS = 2**17
"""The largest length of rotary tables, where the target's context is longer. Published configs name shorter contexts
than the drafters are used for."""


class Eagle3Step(LayerStep):
    """The forward of an `Eagle3Head`, arranged for drafting.

    Args:
        head: the trained network, on any backend; its weights are read once and stay as they are.
        embed: maps token ids to the embeddings that the head was trained on.
    """

    def __init__(self, head: Eagle3Head, embed: Callable[[Tensor], Tensor], context_length: int):
        config = head.config
        frequencies, scale = head.frequencies()
        positions = max(config.max_position_embeddings, min(context_length, MOST_POSITIONS))
        super().__init__(head, frequencies, positions, head.post_attention_layernorm, scale, beside=head.lm_head)
        self._config, self._embed = config, embed
        self._fc = self._linear(head.fc)
        self._tap_norms = [self._norm(norm) for norm in head.fc_norm or ()]  # type: ignore[arg-type]
        self._taps_norm = None if head.input_norm is None else self._norm(head.input_norm)
        self._embedding_norm, self._state_norm = self._norm(head.input_layernorm), self._norm(head.hidden_norm)
        self._final_norm = self._norm(head.norm)

    def _inputs(self, tokens: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        # The target's feature, before the taps, is ignored.
        g = fused(features.flatten(0, 1).to(self.dtype), self._config, self._tap_norms, self._taps_norm, self._fc)
        state = self._state_norm(g)
        embeddings = self._embedding_norm(self._embed(tokens.flatten()).to(self.dtype))
        return torch.cat([embeddings, state], dim=-1), state if self._config.norm_before_residual else g

    def _outputs(self, out: Tensor) -> DraftOutput:
        normed = self._final_norm(out)
        return DraftOutput(normed, normed if self._config.norm_output else out)


class Eagle3Drafter(FeatureDrafter):
    """A trained `Eagle3Head` bound to its target's layers and embedding."""

    head: Eagle3Head

    def arranged(self) -> Eagle3Step:
        return Eagle3Step(self.head, self.embed, self.target.context_length)

    def embed(self, tokens: Tensor) -> Tensor:
        """Look up unscaled rows of the checkpoint's own embedding or the target's, as trainers of EAGLE-3 do, also
        where the target's embedding scales them."""
        own = self.head.embed_tokens
        return F.embedding(tokens, self.target.embedding_rows if own is None else own.weight)
