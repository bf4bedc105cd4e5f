"""The drafter's shapes, read off a target of any family.

Families name the same thing differently (`num_attention_heads`, `n_head`, `num_heads`); what a family has no word for
gets a value that works. Knows configurations only, no weights.
"""

from __future__ import annotations

import inspect
from typing import Any

from outdraft.errors import UserError
from outdraft.losses.target_like import TargetLike
from outdraft.methods.fspad.network import FeatureHeadConfig

HEADS = ("num_attention_heads", "n_head", "num_heads", "n_heads")
KEY_VALUE_HEADS = ("num_key_value_heads", "num_kv_heads", "n_head_kv")
INTERMEDIATE = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size")
NORM_EPSILON = ("rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps", "norm_epsilon", "layernorm_epsilon")

# Bloom, MPT, OPT and the GPT-2 line have an MLP of four times their width and no word for it.
DEFAULT_WIDENING = 4

# A target without a limit of its own must not make the drafter's rotary table endless.
MAX_POSITIONS = 131072


def feature_head_config(target: TargetLike, method: str = "fspad", **overrides: Any) -> FeatureHeadConfig:
    """The drafter's configuration for this target.

    Args:
        target: whose shapes to take.
        method: `fspad` or `eagle` (both switches off, arXiv 2401.15077).
        overrides: fields of `FeatureHeadConfig` that replace what was derived; None means derive, and `auto` for
            `tap_layers` a low, a middle and a high layer.

    Raises:
        UserError: unknown method or field, or heads that do not fit the width.
    """
    if method not in ("fspad", "eagle"):
        raise UserError(f'--method must be "fspad" or "eagle" here, not "{method}"')
    known = set(inspect.signature(FeatureHeadConfig).parameters)
    if overrides.get("tap_layers") == "auto":
        overrides["tap_layers"] = low_middle_high(text_config(target.model.config).num_hidden_layers)
    if unknown := set(overrides) - known:
        raise UserError(f"unknown drafter setting {', '.join(sorted(unknown))}; known are {', '.join(sorted(known))}")
    config = text_config(target.model.config)
    width = target.hidden_size
    heads, head_dim = _heads(config, width)
    kv_heads = _first(config, KEY_VALUE_HEADS, heads)
    values: dict[str, Any] = {
        "hidden_size": width,
        "intermediate_size": inner_width(target),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads if heads % kv_heads == 0 else heads,
        "head_dim": head_dim,
        "vocab_size": target.vocab_size,
        "feature_sampling": method == "fspad",
        "partial_alignment": method == "fspad",
        "rms_norm_eps": float(_first(config, NORM_EPSILON, 1e-6)),
        "rope_theta": rope_theta(config),
        "max_position_embeddings": min(target.context_length, MAX_POSITIONS),
    }
    return FeatureHeadConfig(**{**values, **{key: value for key, value in overrides.items() if value is not None}})


def low_middle_high(layers: int) -> tuple[int, ...]:
    """EAGLE-3's choice (arXiv 2503.01840): the second layer, the middle one, and the third but last."""
    return tuple(sorted({layer for layer in (2, layers // 2, layers - 3) if 1 <= layer < layers}))


def inner_width(target: TargetLike) -> int:
    """Width of the target's own MLPs."""
    return _first(text_config(target.model.config), INTERMEDIATE, DEFAULT_WIDENING * target.hidden_size)


def text_config(config: Any) -> Any:
    """The language model's part of a configuration that may have others."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def rope_theta(config: Any) -> float:
    """The base of the rotary positions; 10000 for families that have none, or one for each type of layer."""
    rope = getattr(config, "rope_parameters", None)
    if isinstance(rope, dict) and isinstance(rope.get("rope_theta"), int | float):
        return float(rope["rope_theta"])
    return float(_first(config, ("rope_theta", "rotary_emb_base"), 10000.0))


def _heads(config: Any, width: int) -> tuple[int, int]:
    """Query heads and their size: the target's where they suit rotary positions, else heads of about 64."""
    heads = _first(config, HEADS, 0)
    head_dim = _first(config, ("head_dim",), width // heads if heads and width % heads == 0 else 0)
    if heads and head_dim and head_dim % 2 == 0:
        return heads, head_dim
    for size in (64, 128, 32, 16, 8, 4, 2):
        if width % size == 0:
            return width // size, size
    raise UserError(f"the target's width {width} is odd; give the drafter num_attention_heads and head_dim")


def _first(config: Any, names: tuple[str, ...], default: Any) -> Any:
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, int | float) and not isinstance(value, bool) and value:
            return value
    return default
