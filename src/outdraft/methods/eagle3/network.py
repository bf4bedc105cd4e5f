"""EAGLE-3's network (arXiv 2503.01840) and the switches of EAGLE-3.1: shapes, weights, and their protocol.

Outputs of several layers of the target, the taps, are projected to the drafter's width, which gives g. One decoder
layer reads the normed embedding beside the normed g; a norm and an output layer of its own, over the tokens that may be
drafted, give the draft logits. The layer's output stands in for g in later steps. `drafter.py` runs the network and
`folder.py` reads its folders; outdraft does not train it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from outdraft.errors import UserError
from outdraft.methods.fspad.network import DraftNetwork, RMSNorm

TapUnit = Literal["none given", "output", "input"]


@dataclass
class Eagle3Config:
    """The shapes and switches of the network; switches default to EAGLE-3's."""

    hidden_size: int
    """The width d of the drafter."""
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    """The number of entries of the target's embedding."""
    target_hidden_size: int
    """The width of each tap."""
    tap_ids: tuple[int, ...] = ()
    """The target's layers to read, as the folder numbers them from 0; empty for the paper's three."""
    tap_unit: TapUnit = "none given"
    """The convention of `tap_ids`: the outputs or the inputs of these layers are read."""
    num_taps: int = 3
    draft_vocab_size: int = 0
    """The size of the draft vocabulary; 0 is the whole vocabulary."""
    own_head: bool = True
    """True if the drafter has its own output layer; else it uses the target's."""
    fc_bias: bool = False
    attention_bias: bool = False
    """True for biases on the query, key and value projections."""
    head_norms: bool = False
    """True for an RMSNorm on every query and key head, as in Qwen3."""
    tap_norms: bool = False
    """True for EAGLE-3.1's `fc_norm`, an RMSNorm on every tap."""
    norm_before_fc: bool = False
    """True for one RMSNorm over all taps side by side."""
    norm_before_residual: bool = False
    """True if the residual is the normed g; else it is g itself."""
    norm_output: bool = False
    """True if the final norm's output is fed back (EAGLE-3.1); else the layer's is."""
    rms_norm_eps: float = 1e-6
    rope: dict[str, Any] = field(default_factory=lambda: {"rope_type": "default", "rope_theta": 10000.0})
    """The rotary settings, as `transformers` names them."""
    max_position_embeddings: int = 2048

    def taps(self, layers: int) -> tuple[int, ...]:
        """Return the layers whose outputs are read, of a target with `layers` layers. They count from 1, as
        `hidden_states[k]` of `transformers` does.

        Raises:
            UserError: their number is not the number that the network reads.
        """
        found = tuple(layer + (self.tap_unit == "output") for layer in self.tap_ids) or (2, layers // 2, layers - 3)
        if len(found) != self.num_taps:
            raise UserError(
                f"the drafter reads {self.num_taps} layers of its target and its config.json names {len(found)}; "
                "put the config.json beside it that belongs to it"
            )
        return found


class Eagle3Attention(nn.Module):
    """The projections of an attention whose input is two widths side by side."""

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
    """The weights of an EAGLE-3 drafter.

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
    def own_heads(self) -> list[Tensor]:
        return [] if self.lm_head is None else [self.lm_head.weight]  # type: ignore[list-item]

    @property
    def fits(self) -> dict[str, int]:
        return {"hidden_size": self.config.target_hidden_size, "vocab_size": self.config.vocab_size}

    def layers_read(self, layers: int) -> tuple[int, ...]:
        return self.config.taps(layers)
