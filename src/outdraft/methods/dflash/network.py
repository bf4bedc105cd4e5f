"""DFlash's network (arXiv 2602.06036) and DSpark's (arXiv 2607.05147): shapes, weights and the forward of a block.

Outputs of several layers of the target, the taps, become one context row c = hidden_norm(fc(taps)) per decided token.
A block of B rows, the anchor (the newest token) and B - 1 mask tokens, runs through N decoder layers; each layer's
queries come from the block, its keys and values from the context rows and the block. Context rows are the same for
every layer and have no queries, so a cache keeps only their keys and values. DFlash's slot j >= 1 predicts
itself; DSpark's slot j predicts the token after it, with a bias that the token before it sets (the Markov head).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from outdraft.methods.checkpoint import KEPT, Network
from outdraft.methods.fspad.network import Attention, RMSNorm, rotate
from outdraft.methods.fspad.unrolled import folded_attention
from outdraft.methods.tapped import TappedConfig
from outdraft.target.cache import SlotCache

Kind = Literal["dflash", "dspark"]
Angles = tuple[Tensor, Tensor]
"""The cosines and sines of rotary positions, each `(rows, 1, tokens, head_dim)`."""


@dataclass(kw_only=True)
class DFlashConfig(TappedConfig):
    """The shapes and switches of the network; switches default to DFlash's first release."""

    num_hidden_layers: int
    """The number N of draft layers."""
    block_size: int
    """The number B of rows of a block, the anchor's included."""
    mask_token_id: int
    kind: Kind = "dflash"
    num_taps: int = 5
    num_target_layers: int = 0
    """The number of layers of the target that it was trained for; 0 where the folder does not say."""
    anchor_first: bool = False
    """True if the anchor's slot predicts the next token (B proposals); else slot j >= 1 predicts itself (B - 1)."""
    causal: tuple[bool, ...] = ()
    """For each layer, True if block rows see only earlier rows of the block; empty where no layer is causal."""
    windows: tuple[int, ...] = ()
    """For each layer, the window in positions, a row's own included; 0 is no window, empty none in any layer."""
    own_head: bool = False
    own_embedding: bool = False
    head_norms: bool = True
    markov_rank: int = 0
    """The rank of DSpark's Markov head; 0 for none."""
    input_embedding_scale: float = 0.0
    """The factor on the embedding's bare rows; 0 takes the output of the target's embedding module."""
    output_multiplier: float = 1.0
    final_logit_softcapping: float = 0.0

    @property
    def proposals(self) -> int:
        """The number of tokens that a block proposes."""
        return self.block_size - (not self.anchor_first)

    @property
    def sights(self) -> list[tuple[bool, int]]:
        """For each layer, its causal flag and its window (0 for none)."""
        layers = self.num_hidden_layers
        return list(zip(self.causal or [False] * layers, self.windows or [0] * layers, strict=True))

    def usual_taps(self, layers: int) -> tuple[int, ...]:
        return spaced(self.num_taps, layers)

    @property
    def fits(self) -> dict[str, int]:
        return super().fits | ({"num_layers": self.num_target_layers} if self.num_target_layers else {})


def spaced(count: int, layers: int) -> tuple[int, ...]:
    """Return DFlash's own choice of layers to read, counted from 1: equally spaced among layers 1 to L - 3 counted from
    0."""
    if count == 1:
        return (layers // 2 + 1,)
    return tuple(round(1 + place * (layers - 4) / (count - 1)) + 1 for place in range(count))


class BlockAttention(Attention):
    """Attention of block rows over the context rows in a cache and over each other."""

    def __init__(self, config: DFlashConfig):
        super().__init__(config, config.hidden_size, config.head_norms)

    def keys_and_values(self, x: Tensor, angles: Angles) -> tuple[Tensor, Tensor]:
        """Project `(rows, tokens, d)` context or block rows to keys and values `(rows, kv_heads, tokens, head_dim)`."""
        return rotate(self._heads(self.k_proj(x), self.k_norm), angles), self._heads(self.v_proj(x), None)

    def forward(  # type: ignore[override]
        self, x: Tensor, angles: Angles, mask: Tensor | None, cache: SlotCache, layer: int
    ) -> Tensor:
        """Attend from the block's normed states; the block's keys and values stay pending in the cache.

        Args:
            x: `(rows, B, d)`.
            angles: rotary angles of the block's positions.
            mask: `(rows, 1, B, extent)` True at the slots that a row sees; None for all.
            cache: the draft cache, with the block's slots reserved.
            layer: this layer's index in the cache.
        """
        keys, values = cache.update(*self.keys_and_values(x, angles), layer)
        q = rotate(self._heads(self.q_proj(x), self.q_norm), angles)
        return self.o_proj(folded_attention(q, keys, values, mask).transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor, norm: nn.Module | None) -> Tensor:
        x = x.unflatten(-1, (-1, self.head_dim))
        return (x if norm is None else norm(x)).transpose(1, 2)


class GatedMLP(nn.Module):
    """The gated MLP down(SiLU(gate x) * up x)."""

    def __init__(self, config: DFlashConfig):
        super().__init__()
        d, i = config.hidden_size, config.intermediate_size
        self.gate_proj, self.up_proj = nn.Linear(d, i, bias=False), nn.Linear(d, i, bias=False)
        self.down_proj, self.act_fn = nn.Linear(i, d, bias=False), nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class BlockLayer(nn.Module):
    """One decoder layer over the block."""

    def __init__(self, config: DFlashConfig):
        super().__init__()
        d, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(d, eps), RMSNorm(d, eps)
        self.self_attn, self.mlp = BlockAttention(config), GatedMLP(config)

    def forward(self, x: Tensor, angles: Angles, mask: Tensor | None, cache: SlotCache, layer: int) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), angles, mask, cache, layer)
        return x + self.mlp(self.post_attention_layernorm(x))


class MarkovHead(nn.Module):
    """DSpark's Markov head: the previous token adds the bias W2 W1[token] to the logits."""

    def __init__(self, config: DFlashConfig):
        super().__init__()
        self.markov_w1 = nn.Embedding(config.vocab_size, config.markov_rank)
        self.markov_w2 = nn.Linear(config.markov_rank, config.draft_vocab_size or config.vocab_size, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.markov_w2(self.markov_w1(tokens))


@dataclass
class Origin:
    """What the folder of a network holds beside its weights: saving keeps it, so that engines read what is saved."""

    config: dict[str, Any]
    names: dict[str, str]
    """The names of tensors in the folder, by those in the network."""
    beside: dict[str, Tensor]
    """The tensors that are not trained, under the folder's names."""


class DFlashNetwork(Network):
    """The network of DFlash and DSpark; its weights are named as in published folders."""

    origin: Origin
    draft_tokens: Tensor | None
    """The ids of the draft vocabulary; None for the whole vocabulary."""

    def __init__(self, config: DFlashConfig):
        super().__init__()
        self.config, self.method = config, config.kind
        d, kept = config.hidden_size, config.draft_vocab_size
        self.fc = nn.Linear(config.num_taps * config.target_hidden_size, d, bias=False)
        self.hidden_norm, self.norm = RMSNorm(d, config.rms_norm_eps), RMSNorm(d, config.rms_norm_eps)
        self.layers = nn.ModuleList(BlockLayer(config) for _ in range(config.num_hidden_layers))
        self.embed_tokens = nn.Embedding(config.vocab_size, d) if config.own_embedding else None
        self.lm_head = nn.Linear(d, kept or config.vocab_size, bias=False) if config.own_head else None
        self.markov_head = MarkovHead(config) if config.markov_rank else None
        self.register_buffer("draft_tokens", torch.arange(kept) if kept else None)

    def stored(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        state = {name: weight for name, weight in self.state_dict().items() if name != KEPT}
        names = self.origin.names
        return self.origin.config, {**self.origin.beside, **{names[name]: weight for name, weight in state.items()}}

    def load_stored(self, tensors: Mapping[str, Tensor]) -> None:
        named = self.origin.names.items()
        self.load_state_dict({**self.state_dict(), **{ours: tensors[theirs] for ours, theirs in named}})

    def take_in(self, taps: Tensor, angles: Angles, cache: SlotCache) -> None:
        """Write the context rows of `(rows, tokens, taps * target width)` into reserved slots of every layer."""
        context = self.hidden_norm(self.fc(taps.to(self.fc.weight.dtype)))
        for layer, block in enumerate(self.layers):
            attention: Any = block.self_attn
            cache.update(*attention.keys_and_values(context, angles), layer)

    def forward(self, x: Tensor, angles: Angles, masks: Sequence[Tensor | None], cache: SlotCache) -> Tensor:
        """Map the `(rows, B, d)` embeddings of a block to `(rows, B, d)` normed states, with one mask a layer."""
        for layer, (block, mask) in enumerate(zip(self.layers, masks, strict=True)):
            x = block(x, angles, mask, cache, layer)
        return self.norm(x)
