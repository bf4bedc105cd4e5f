"""The initial state of a `FeatureHead` in training: shapes, weights, embedding scale and draft vocabulary. Shapes are
read off a target of any family, and weights come from a seed or another drafter. Embeddings are scaled to the size of
the features beside them.

Families name the same shape differently (`num_attention_heads`, `n_head`, `num_heads`); a family without a name for one
gets a value that works.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from outdraft.data.tokenization import ExampleSet
from outdraft.errors import UserError
from outdraft.methods.fspad.folder import load_drafter
from outdraft.methods.fspad.network import FeatureHead, FeatureHeadConfig, scaled
from outdraft.target.named import named, shipped_drafter
from outdraft.target.target import Target

HEADS = ("num_attention_heads", "n_head", "num_heads", "n_heads")
KEY_VALUE_HEADS = ("num_key_value_heads", "num_kv_heads", "n_head_kv")
INTERMEDIATE = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size")
NORM_EPSILON = ("rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps", "norm_epsilon", "layernorm_epsilon")

# Bloom, MPT, OPT and the GPT-2 line have an MLP of four times their width and no word for it.
DEFAULT_WIDENING = 4

# A target without a limit of its own must not make the drafter's rotary table endless.
MAX_POSITIONS = 131072

LENIENT = {"max_position_embeddings"}
"""The setting that may differ: the length of a table that is computed."""


def new_head(target: Target, settings: Any) -> FeatureHead:
    """Build a drafter with initial float32 weights, on the target's device."""
    shape = feature_head_config(
        target,
        settings.method,
        intermediate_size=settings.intermediate_size,
        feature_sampling=settings.feature_sampling,
        partial_alignment=settings.partial_alignment,
        tap_layers=settings.tap_layers,
        state_norm=settings.state_norm,
        draft_vocab_size=settings.draft_vocabulary_for(target.vocab_size),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        drafter = FeatureHead(shape)
    if settings.init_from is not None:
        begin_from(drafter, settings.init_from)
        scale = settings.embedding_scale
        scaled(drafter, 1 / (scale_of(target) if scale == "auto" else scale))
    return drafter.to(target.device)


def begin_from(drafter: FeatureHead, source: str) -> None:
    """Copy another drafter's weights in place; its own embedding, if any, is left out for the target's.

    Args:
        drafter: drafter of the shape for the target and the settings.
        source: folder, hub id, or `reference` or `smollm2` for the drafter of the same method that ships for these;
            FSPAD's and EAGLE's official folders load as outdraft's own do.
    """
    found = load_drafter(shipped_drafter(source, drafter.method) if named(source) is not None else source).head
    there, here = asdict(found.config), asdict(drafter.config)
    if different := [name for name in here if name not in LENIENT and there[name] != here[name]]:
        name = different[0]
        raise UserError(
            f"the drafter in '{source}' has {name} {there[name]}, this run's has {here[name]}; begin from another, or "
            f"change the settings that decide {name}"
        )
    wanted = drafter.state_dict()
    drafter.load_state_dict({name: weight for name, weight in found.state_dict().items() if name in wanted})


PROBED_TOKENS = 64


@torch.no_grad()
def scale_of(target: Target) -> float:
    """Return the factor that brings embeddings near the size of the target's features; 1 where they are no smaller.

    The factor is the largest power of two that does not make them larger: folding it into weights rounds nothing.
    """
    ids = torch.linspace(0, target.vocab_size - 1, PROBED_TOKENS, device=target.device).long()[None]
    ids = ids[:, : target.context_length]
    features, embeddings = target.features(ids).float(), target.embed(ids).float()
    ratio = float(features.square().mean().sqrt() / embeddings.square().mean().sqrt().clamp(min=1e-12))
    return 2.0 ** max(0, math.floor(math.log2(max(ratio, 1.0))))


# --- the draft vocabulary ------------------------------------------------------------------------------------


def keep_frequent(drafter: FeatureHead, examples: ExampleSet) -> None:
    """Set the tokens of a reduced draft vocabulary; a drafter with the whole vocabulary is unchanged."""
    if drafter.draft_tokens is not None:
        kept = most_frequent(examples, drafter.config.vocab_size, drafter.config.draft_vocab_size)
        drafter.draft_tokens.copy_(kept)


def most_frequent(examples: ExampleSet, vocab_size: int, count: int) -> Tensor:
    """Return the `(count,)` most frequent ids of the responses, in rising order. Ties go to ids that are more frequent
    anywhere, then to smaller ids."""
    ids = torch.cat([example.input_ids for example in examples.examples]).long()
    response = torch.cat([example.loss_mask for example in examples.examples]).bool()
    anywhere = torch.bincount(ids, minlength=vocab_size)
    responded = torch.bincount(ids[response], minlength=vocab_size)
    order = (responded * (len(ids) + 1) + anywhere).argsort(descending=True, stable=True)
    return order[:count].sort().values


# --- shapes --------------------------------------------------------------------------------------------------


def feature_head_config(target: Target, method: str = "fspad", **overrides: Any) -> FeatureHeadConfig:
    """Derive the drafter's configuration from a target.

    Args:
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
        overrides["tap_layers"] = low_middle_high(target.config.num_hidden_layers)
    if unknown := set(overrides) - known:
        raise UserError(f"unknown drafter setting {', '.join(sorted(unknown))}; known are {', '.join(sorted(known))}")
    config = target.config
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
    """Return EAGLE-3's layers (arXiv 2503.01840): the second, the middle one, and the third but last."""
    return tuple(sorted({layer for layer in (2, layers // 2, layers - 3) if 1 <= layer < layers}))


def inner_width(target: Target) -> int:
    """Return the inner width of the target's own MLPs."""
    return _first(target.config, INTERMEDIATE, DEFAULT_WIDENING * target.hidden_size)


def rope_theta(config: Any) -> float:
    """Return the base of the rotary positions; 10000 for families that have none, or one for each type of layer."""
    rope = getattr(config, "rope_parameters", None)
    if isinstance(rope, dict) and isinstance(rope.get("rope_theta"), int | float):
        return float(rope["rope_theta"])
    return float(_first(config, ("rope_theta", "rotary_emb_base"), 10000.0))


def _heads(config: Any, width: int) -> tuple[int, int]:
    """Return the number of query heads and their size: the target's where rotary positions allow, else about 64."""
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
