"""The drafter's shapes for targets of several families."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoConfig

from outdraft.errors import UserError
from outdraft.methods.fspad.beginning import feature_head_config
from outdraft.methods.fspad.network import FeatureHead


def shapes(family: str, **fields: Any) -> Any:
    config = AutoConfig.for_model(family, **fields)
    return SimpleNamespace(
        config=config.get_text_config(),
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        context_length=getattr(config, "max_position_embeddings", 1 << 30),
    )


@pytest.mark.parametrize(("layers", "read"), [(24, (2, 12, 21)), (12, (2, 6, 9)), (5, (2,)), (4, (1, 2)), (2, (1,))])
def test_a_low_a_middle_and_a_high_layer_are_read(layers: int, read: tuple[int, ...]) -> None:
    target = shapes("llama", hidden_size=64, num_attention_heads=8, num_hidden_layers=layers)
    assert feature_head_config(target, tap_layers="auto").tap_layers == read
    assert feature_head_config(target).tap_layers == ()


def test_a_llama_gives_its_own_shapes() -> None:
    target = shapes(
        "llama",
        hidden_size=64,
        intermediate_size=172,
        num_attention_heads=8,
        num_key_value_heads=4,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 5e5},
        max_position_embeddings=512,
    )
    head = feature_head_config(target)
    assert (head.num_attention_heads, head.num_key_value_heads, head.head_dim) == (8, 4, 8)
    assert (head.intermediate_size, head.rope_theta, head.rms_norm_eps) == (172, 5e5, 1e-5)
    assert (head.max_position_embeddings, head.vocab_size) == (512, 32000)
    assert head.feature_sampling and head.partial_alignment


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("gpt2", {"n_embd": 48, "n_head": 4}),
        ("gpt_neox", {"hidden_size": 48, "num_attention_heads": 4, "intermediate_size": 100}),
        ("gpt_neo", {"hidden_size": 48, "num_heads": 4}),
        ("opt", {"hidden_size": 48, "num_attention_heads": 4, "ffn_dim": 100}),
        ("qwen3", {"hidden_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}),
        ("gemma3_text", {"hidden_size": 48, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 16}),
        ("phi", {"hidden_size": 48, "num_attention_heads": 4}),
    ],
)
def test_every_family_gives_a_drafter(family: str, fields: dict[str, Any]) -> None:
    config = feature_head_config(shapes(family, **fields))
    assert config.hidden_size == 48 and config.num_attention_heads == 4
    assert config.intermediate_size > 48
    FeatureHead(config)


def test_heads_that_rotary_positions_cannot_use_are_replaced() -> None:
    config = feature_head_config(shapes("gpt2", n_embd=36, n_head=4))  # heads of 9
    assert config.head_dim % 2 == 0 and config.num_attention_heads * config.head_dim == 36


def test_eagle_is_both_switches_off_and_overrides_win() -> None:
    target = shapes("gpt2", n_embd=48, n_head=4)
    eagle = feature_head_config(target, "eagle", intermediate_size=20)
    assert (eagle.feature_sampling, eagle.partial_alignment, eagle.intermediate_size) == (False, False, 20)
    mixed = feature_head_config(target, "eagle", partial_alignment=True)
    assert (mixed.feature_sampling, mixed.partial_alignment) == (False, True)
    with pytest.raises(UserError, match="unknown drafter setting width"):
        feature_head_config(target, width=3)
