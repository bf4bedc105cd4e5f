"""EAGLE-3's network (arXiv 2503.01840) and the switches of EAGLE-3.1: shapes and weights, and what they are read by.

Outputs of several layers of the target, the taps, are projected to the drafter's width, which gives g. One decoder
layer reads the normed embedding beside the normed g; a norm and an output layer of its own, over the tokens that may be
drafted, give the draft logits. What the layer gives stands in for g in later steps. How it runs is in
`drafter.py`, which layout a folder has in `folder.py`; it is not trained here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from outdraft.errors import UserError
from outdraft.methods.fspad.network import DraftNetwork, RMSNorm

TapUnit = Literal["none given", "output", "input"]


@dataclass
class Eagle3Config:
    """Shapes and switches; the defaults of the switches are EAGLE-3's."""

    hidden_size: int
    """Width d of the drafter."""
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    """Entries of the target's embedding."""
    target_hidden_size: int
    """Width of the taps."""
    tap_ids: tuple[int, ...] = ()
    """Layers of the target as the folder gives them, counted from 0; none for the paper's three."""
    tap_unit: TapUnit = "none given"
    """Whether what is read is what these layers give or what goes into them."""
    num_taps: int = 3
    draft_vocab_size: int = 0
    """Tokens that may be drafted; 0 is the whole vocabulary."""
    own_head: bool = True
    """An output layer of its own; off is the target's."""
    fc_bias: bool = False
    attention_bias: bool = False
    """Biases on the query, key and value projections."""
    head_norms: bool = False
    """RMSNorm on every query and key head, as in Qwen3."""
    tap_norms: bool = False
    """EAGLE-3.1's `fc_norm`: an RMSNorm on every tap."""
    norm_before_fc: bool = False
    """One RMSNorm over all taps side by side."""
    norm_before_residual: bool = False
    """The residual is the normed g; off is g itself."""
    norm_output: bool = False
    """EAGLE-3.1: what is fed back is the final norm's output; off is the layer's."""
    rms_norm_eps: float = 1e-6
    rope: dict[str, Any] = field(default_factory=lambda: {"rope_type": "default", "rope_theta": 10000.0})
    """Rotary positions, in the words of `transformers`."""
    max_position_embeddings: int = 2048

    def taps(self, layers: int) -> tuple[int, ...]:
        """The layers of a target of so many whose outputs are read, counted from 1: `hidden_states[k]` of
        `transformers`, which is the one unit used here.

        Raises:
            UserError: they are not as many as the network reads.
        """
        found = tuple(layer + (self.tap_unit == "output") for layer in self.tap_ids) or (2, layers // 2, layers - 3)
        if len(found) != self.num_taps:
            raise UserError(
                f"the drafter reads {self.num_taps} layers of its target and its config.json names {len(found)}; "
                "put the config.json beside it that belongs to it"
            )
        return found


class Eagle3Attention(nn.Module):
    """Projections of an attention that reads two widths side by side."""

    def __init__(self, config: Eagle3Config):
        super().__init__()
        d, size, bias = config.hidden_size, config.head_dim, config.attention_bias
        self.q_proj = nn.Linear(2 * d, config.num_attention_heads * size, bias=bias)
        self.k_proj = nn.Linear(2 * d, config.num_key_value_heads * size, bias=bias)
        self.v_proj = nn.Linear(2 * d, config.num_key_value_heads * size, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * size, d, bias=False)
        if config.head_norms:
            self.q_norm, self.k_norm = RMSNorm(size, config.rms_norm_eps), RMSNorm(size, config.rms_norm_eps)


class Eagle3Head(DraftNetwork):
    """The weights.

    Args:
        config: shapes and switches.
    """

    method = "eagle3"

    def __init__(self, config: Eagle3Config):
        super().__init__()
        self.config = config
        d, i, eps = config.hidden_size, config.intermediate_size, config.rms_norm_eps
        width, count = config.target_hidden_size, config.num_taps
        self.fc = nn.Linear(count * width, d, bias=config.fc_bias)
        self.fc_norm = nn.ModuleList(RMSNorm(width, eps) for _ in range(count)) if config.tap_norms else None
        self.input_norm = RMSNorm(count * width, eps) if config.norm_before_fc else None
        self.input_layernorm, self.hidden_norm = RMSNorm(d, eps), RMSNorm(d, eps)
        self.self_attn = Eagle3Attention(config)
        self.post_attention_layernorm, self.norm = RMSNorm(d, eps), RMSNorm(d, eps)
        self.gate_proj, self.up_proj = nn.Linear(d, i, bias=False), nn.Linear(d, i, bias=False)
        self.down_proj = nn.Linear(i, d, bias=False)
        kept = config.draft_vocab_size
        self.lm_head = nn.Linear(d, kept or config.vocab_size, bias=False) if config.own_head else None
        self.embed_tokens = None
        self.register_buffer("draft_tokens", torch.arange(kept) if kept else None)

    @property
    def fits(self) -> dict[str, int]:
        return {"hidden_size": self.config.target_hidden_size, "vocab_size": self.config.vocab_size}

    def layers_read(self, layers: int) -> tuple[int, ...]:
        return self.config.taps(layers)
