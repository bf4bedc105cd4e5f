"""Targets whose texts follow a simple rule, and drafters for them that are right by construction.

A target's first layer attends so many tokens back by position alone and copies that token, which is said again (texts
of period seven) or gives the next one (counting). Every layer turns the residual stream by a rotation of its own, so
that outputs of neighbouring layers have nothing in common. The drafters attend by
position alone, too: wrong layers, rotary positions, slots or norms make them wrong, and right ones are always right.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from models import tiny
from outdraft.methods.dflash.network import DFlashConfig, DFlashNetwork
from outdraft.methods.eagle3.drafter import Eagle3Config, Eagle3Head
from outdraft.methods.fspad.network import FeatureHead, FeatureHeadConfig
from outdraft.methods.medusa.drafter import MedusaConfig, MedusaHeads

PERIOD, LAYERS, VOCAB, WIDTH = 7, 8, 32, 64
ONE = WIDTH**0.5
"""The size of a token's entry: alone it has a root mean square of 1."""
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
HEADS: dict[str, Any] = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": WIDTH}
SIZES: dict[str, Any] = {"hidden_size": WIDTH, "intermediate_size": WIDTH, "vocab_size": VOCAB, **HEADS}


def some_prompts(count: int = 6, seed: int = 1) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randperm(VOCAB - 1, generator=generator)[: PERIOD + place].tolist() for place in range(count)]


def looking_back(by: int, theta: float) -> tuple[Tensor, Tensor]:
    """Biases of queries and keys, `(WIDTH,)`, by which attention is at the token so far back."""
    half = WIDTH // 2
    used = torch.arange(half) < 8  # the fast planes, which tell neighbours apart
    angles = by * theta ** (-torch.arange(half) / half)
    strength = 30.0 * used
    query = torch.cat([strength, torch.zeros(half)])
    return query, torch.cat([strength * angles.cos(), strength * angles.sin()])


def rotations(seed: int) -> list[Tensor]:
    """The product of the layers' rotations up to each layer, the first one without any."""
    generator, found = torch.Generator().manual_seed(seed), [torch.eye(WIDTH)]
    for _ in range(LAYERS):
        found.append(torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator))[0] @ found[-1])
    return found


def said(step: int, seed: int = 0) -> Tensor:
    """`(VOCAB, WIDTH)` output layer on the last feature, by which the copied token plus `step` comes next."""
    return (token_part(1) @ rotations(seed)[-1].T * 2).roll(step, 0)


def token_part(of: int) -> Tensor:
    """Reads half the width: part 0 holds the token at a position, part 1 the copied one."""
    return torch.eye(WIDTH)[of * VOCAB : (of + 1) * VOCAB]


@torch.no_grad()
def attend(attention: Any, by: int, value: Tensor, out: Tensor, theta: float = 10000.0) -> None:
    """Make an attention copy `value` `(VOCAB, inputs)` of the token so far back to `out` `(WIDTH, VOCAB)`."""
    for part in (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj):
        part.weight.zero_()
    query, key = looking_back(by, theta)
    attention.q_proj.bias.copy_(query)
    attention.k_proj.bias.copy_(key)
    attention.v_proj.bias.zero_()
    attention.v_proj.weight[:VOCAB] = value
    attention.o_proj.weight[:, :VOCAB] = out


@torch.no_grad()
def simple_target(seed: int = 0, by: int = PERIOD - 1, step: int = 0) -> PreTrainedModel:
    """The target; another seed is another model with the same texts.

    Args:
        seed: of the rotations.
        by: how far back the token lies that says what is next.
        step: what is added to it.
    """
    changes = {**SIZES, "num_hidden_layers": LAYERS, "attention_bias": True, "mlp_bias": True}
    model: Any = tiny("llama-gqa", max_position_embeddings=128, **changes).float()
    for name, weight in model.named_parameters():
        weight.fill_(1.0 if "norm" in name else 0.0)
    turns = rotations(seed)
    model.model.embed_tokens.weight.copy_(ONE * token_part(0))
    attend(model.model.layers[0].self_attn, by, token_part(0), token_part(1).T)
    for place, layer in enumerate(model.model.layers):
        turn = turns[place + 1] @ turns[place].T
        layer.mlp.gate_proj.bias.fill_(20.0)  # silu(20) is 20, so that the layer is linear
        layer.mlp.up_proj.weight.copy_(turn - torch.eye(WIDTH))
        layer.mlp.down_proj.weight.copy_(torch.eye(WIDTH) * 2**0.5 / 20)  # two tokens have a root mean square of √2
    model.lm_head.weight.copy_(said(step, seed))
    return model


@torch.no_grad()
def periodic_eagle3(taps: tuple[int, ...] = (2, 4, 5), seed: int = 0, theta: float = 10000.0) -> Eagle3Head:
    """EAGLE-3's drafter with `norm_before_residual`: g is large and holds the token that is no candidate any more."""
    more: dict[str, Any] = {"target_hidden_size": WIDTH, "attention_bias": True, "norm_before_residual": True}
    rope = {**ROPE, "rope_theta": theta}
    head = Eagle3Head(Eagle3Config(**SIZES, **more, tap_ids=taps, tap_unit="input", rope=rope))
    for weight in head.parameters():
        weight.zero_()
    turns = rotations(seed)
    head.fc.weight.copy_(torch.cat([turns[tap].T for tap in taps], dim=1) * 3)
    for norm in (head.norm, head.hidden_norm, head.post_attention_layernorm):
        norm.weight.fill_(1.0)
    value = torch.cat([torch.zeros(VOCAB, WIDTH), token_part(0)], dim=1)
    attend(head.self_attn, PERIOD - 2, value, 4 * token_part(1).T, theta)
    head.lm_head.weight.copy_(token_part(1))  # type: ignore[union-attr]
    return head


@torch.no_grad()
def periodic_dflash(
    taps: tuple[int, ...] = (2, 4, 5), anchor_first: bool = False, theta: float = 10000.0
) -> DFlashNetwork:
    """DFlash's drafter, which reads the target's embedding and output layer."""
    ids = tuple(tap - 1 for tap in taps)
    more: dict[str, Any] = {"num_hidden_layers": 1, "target_hidden_size": WIDTH, "block_size": 4, "head_norms": False}
    more |= {"mask_token_id": VOCAB - 1, "num_taps": len(taps), "anchor_first": anchor_first, "attention_bias": True}
    rope = {**ROPE, "rope_theta": theta}
    network = DFlashNetwork(DFlashConfig(**SIZES, **more, tap_ids=ids, tap_unit="output", rope=rope))
    for weight in network.parameters():
        weight.zero_()
    turns = rotations(0)
    network.fc.weight.copy_(torch.cat([turns[tap].T for tap in taps], dim=1))
    for norm in (network.norm, network.hidden_norm):
        norm.weight.fill_(1.0)
    layer: Any = network.layers[0]
    out = turns[-1] @ token_part(1).T * 20
    attend(layer.self_attn, PERIOD - anchor_first, token_part(0), out, theta)
    return network


@torch.no_grad()
def periodic_fspad(theta: float = 10000.0) -> FeatureHead:
    """FSPAD's drafter, whose feature sampling adds nothing."""
    head = FeatureHead(FeatureHeadConfig(**SIZES, attention_bias=True, fc_bias=False, rope_theta=theta))
    for weight in head.parameters():
        weight.zero_()
    last = rotations(0)[-1]
    head.fusion.fc.weight[:, WIDTH:] = token_part(0).T @ token_part(0) @ last.T
    attend(head.self_attn, PERIOD - 2, token_part(0), last @ token_part(1).T * 20, theta)
    return head


@torch.no_grad()
def counting_medusa(seed: int = 0) -> MedusaHeads:
    """Medusa's heads for the target that counts, `simple_target(by=0, step=1)`, with output layers of their own."""
    network = MedusaHeads(MedusaConfig(WIDTH, VOCAB, 3, own_head=True))
    for place, layer in enumerate(network.outputs):
        layer.weight.copy_(said(2 + place, seed))  # type: ignore[operator]
    return network
