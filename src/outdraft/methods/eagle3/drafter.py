"""Drafting with an `Eagle3Head`: its forward, arranged for the few nodes of a draft level, and its binding to a target.

Rounds, trees, caches and recordings are those of `fspad/drafter.py`. Row t pairs the embedding of x_{t+1} with g_t at
rotary position t. The residual is g, so that the layer's output can stand in for g.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from outdraft.methods.eagle3.network import Eagle3Head, fused
from outdraft.methods.fspad.drafter import FeatureDrafter
from outdraft.methods.fspad.layer_step import LayerStep
from outdraft.methods.fspad.network import DraftOutput

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
