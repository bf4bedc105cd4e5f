"""The forward of a trained `FeatureHead`, arranged for the few nodes of a draft level.

The equations and weights are those of `FeatureHead.forward`; the number of kernels and their inputs differ. Drafting is
not bound by arithmetic: a level of three nodes through a small head is some forty launches of a few microseconds each.
So the terms of the token alone (its half of the fusion with the bias, and FSPAD's gate) are looked up in a table over
the vocabulary, if it takes at most `TABLE_BYTES`. `layer_step.py` arranges the rest.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from outdraft.methods.fspad.layer_step import LayerStep, Linear, NativeProduct, PackedProduct
from outdraft.methods.fspad.network import DraftOutput, FeatureHead, turning
from outdraft.target.backends import PackedLinear
from outdraft.target.backends.native.operations import Fusion
from outdraft.target.backends.packed import plain_linear

TABLE_BYTES = 64 * 2**20
"""The largest memory, in bytes, that the table over the vocabulary may take."""

TABLE_CHUNK = 4096
"""The number of tokens of the table that are computed at once."""


class DraftStep(LayerStep):
    """The forward of a `FeatureHead`, for drafting only.

    Args:
        head: the trained network, on any backend; its weights are read once and stay as they are.
        embed: maps token ids to the embeddings that the head was trained on.
    """

    def __init__(self, head: FeatureHead, embed: Callable[[Tensor], Tensor], vocab_size: int):
        config, fusion = head.config, head.fusion
        super().__init__(head, turning(config.head_dim, config.rope_theta), config.max_position_embeddings, head.norm)
        self._config, self._embed = config, embed
        self._fc = self._linear(fusion.fc)
        self._taps = fusion.taps
        self._state_norm = None if fusion.state_norm is None else self._norm(fusion.state_norm)
        self._table: Tensor | None = None
        self._one_fusion: Fusion | None = None
        if fusion.feature_sampling:
            self._fusion_norm = self._norm(fusion.norm)
            self._fusion_gate, self._fusion_up = self._linear(fusion.gate_proj), self._linear(fusion.up_proj)
            self._fusion_down = self._linear(fusion.down_proj)
        width = config.hidden_size + (config.intermediate_size if fusion.feature_sampling else 0)
        if vocab_size * width * torch.finfo(self.dtype).bits // 8 <= TABLE_BYTES:
            self._tabulate(*plain_linear(fusion.fc), vocab_size, width)
        elif self.native is not None and fusion.feature_sampling:
            parts = (self._fc, self._fusion_gate, self._fusion_up, self._fusion_down)
            fc, gate, up, down = (getattr(part, "product", None) for part in parts)
            if fc and gate and up and down:
                self._one_fusion = Fusion(fc, gate, up, down, (fusion.norm.weight, fusion.norm.eps))

    # --- the forward -------------------------------------------------------------------------------------------

    def _inputs(self, tokens: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        h = self._fuse(tokens.reshape(-1), self._state(features.flatten(0, 1)))
        return h, h

    def _outputs(self, out: Tensor) -> DraftOutput:
        return DraftOutput(*(out.chunk(2, dim=-1) if self._config.partial_alignment else (out, out)))

    def _state(self, features: Tensor) -> Tensor:
        """Return the fusion's input, as `Fusion.state` does."""
        if self._taps is not None and features.shape[1] > self._config.hidden_size:
            feature, *outputs = features.split(self._config.hidden_size, dim=-1)
            features = self._taps(feature, outputs)  # decided tokens only, so as it is
        features = features.to(self.dtype)
        return features if self._state_norm is None else self._state_norm(features)

    def _fuse(self, tokens: Tensor, features: Tensor) -> Tensor:
        """Fuse `(nodes,)` tokens and `(nodes, hidden)` features to h, equation 3."""
        if self._table is not None:
            known = F.embedding(tokens, self._table)
            if not self._config.feature_sampling:
                return self._fc.plus(features, known)
            z = self._fc.plus(features, known[:, : self._config.hidden_size])
            gate = known[:, self._config.hidden_size :]
        else:
            embeddings = self._embed(tokens).to(self.dtype)
            if self._one_fusion is not None:
                return self._one_fusion(embeddings, features)
            z = self._fc(torch.cat([embeddings, features], dim=-1))
            if not self._config.feature_sampling:
                return z
            gate = self._fusion_gate.silu(embeddings)
        return self._fusion_down.plus(self._fusion_up.times(self._fusion_norm(z), gate), z)

    # --- what is prepared --------------------------------------------------------------------------------------

    @torch.inference_mode()
    def _tabulate(self, weight: Tensor, bias: Tensor | None, vocab_size: int, width: int) -> None:
        """Tabulate `[W_e e + b ; SiLU(W_g e)]` of every token; then only the features' half of W_fc is needed."""
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
        if isinstance(self._fc, NativeProduct):
            self._fc = NativeProduct(half, None)
        else:
            packed = isinstance(self._fc, PackedProduct)
            self._fc = PackedProduct(PackedLinear(half, None)) if packed else Linear(half, None)
        self._table = table
