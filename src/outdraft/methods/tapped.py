"""What drafters on several layers of their target have in common, EAGLE-3's and DFlash's: the shapes of their decoder
layers, and how the folders of those who train them say these.

The layouts differ in where settings stand and in how layers of the target are counted; here each becomes a
`TappedConfig`, with the origin of what was read noted. Shapes are read from the tensors where these show them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import LlamaConfig, Qwen3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from outdraft.drafting.folder import CONFIG, check_value
from outdraft.errors import UserError, first_line
from outdraft.methods.checkpoint import names_tokens
from outdraft.methods.fspad.network import turning
from outdraft.target.target import Target

TapUnit = Literal["none given", "output", "input"]

SHAPES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size")
READ = (*SHAPES, "rms_norm_eps", "max_position_embeddings", "rope_theta", "rope_scaling", "rope_parameters")
"""The keys that are read of the layer's config."""

ROPES = ("default", "linear", "llama3", "yarn")
"""The kinds of rotary positions that do not depend on the length of the text."""

BESIDE = re.compile(r"^d2t$|^t2d$|rotary_emb\.inv_freq$|^verifier_")
"""The names of tensors that are no weights of the drafter."""


@dataclass
class TappedConfig:
    """The shapes of a drafter's decoder layers, and the layers of the target that it reads."""

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
    """The target's layers to read, as the folder numbers them from 0; empty for the method's own choice."""
    tap_unit: TapUnit = "none given"
    """The convention of `tap_ids`: the outputs or the inputs of these layers are read."""
    num_taps: int = 3
    draft_vocab_size: int = 0
    """The size of the draft vocabulary; 0 is the whole vocabulary."""
    own_head: bool = True
    """True if the drafter has its own output layer; else it uses the target's."""
    attention_bias: bool = False
    """True for biases on the query, key and value projections."""
    head_norms: bool = False
    """True for an RMSNorm on every query and key head, as in Qwen3."""
    rms_norm_eps: float = 1e-6
    rope: dict[str, Any] = field(default_factory=lambda: {"rope_type": "default", "rope_theta": 10000.0})
    """The rotary settings, as `transformers` names them."""
    max_position_embeddings: int = 2048

    def usual_taps(self, layers: int) -> tuple[int, ...]:
        """Return the method's own choice of layers, counted from 1, of a target with `layers` layers."""
        raise NotImplementedError

    def taps(self, layers: int) -> tuple[int, ...]:
        """Return the layers whose outputs are read, of a target with `layers` layers. They count from 1, as
        `hidden_states[k]` of `transformers` does.

        Raises:
            UserError: their number is not the number that the network reads.
        """
        found = tuple(layer + (self.tap_unit == "output") for layer in self.tap_ids) or self.usual_taps(layers)
        if len(found) != self.num_taps:
            raise UserError(
                f"the drafter reads {self.num_taps} layers of its target and its config.json names {len(found)}; "
                "put the config.json beside it that belongs to it"
            )
        return found

    def reads(self, usual: str) -> str:
        """Return a phrase on the layers that are read, in the folder's own numbers; `usual` is that for no numbers."""
        ids = ", ".join(map(str, self.tap_ids))
        return f"the {self.tap_unit} of layers {ids} (counted from 0)" if ids else usual

    @property
    def fits(self) -> dict[str, int]:
        """The sizes that the target must have, by name."""
        return {"hidden_size": self.target_hidden_size, "vocab_size": self.vocab_size}


def rotary_frequencies(config: TappedConfig) -> tuple[Tensor, float]:
    """Return the `(head_dim / 2,)` rotary frequencies, and the factor of cosines and sines.

    Raises:
        KeyError: the kind of rotary positions is unknown, or lacks a number.
    """
    rope = config.rope
    if rope["rope_type"] == "default":
        return turning(config.head_dim, rope["rope_theta"]), 1.0
    longest = rope["factor"] * rope.get("original_max_position_embeddings", 0)
    shape = LlamaConfig(
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        head_dim=config.head_dim,
        max_position_embeddings=max(config.max_position_embeddings, int(longest)),
        rope_parameters=dict(rope),
    )
    frequencies, scale = ROPE_INIT_FUNCTIONS[rope["rope_type"]](shape, torch.device("cpu"))
    return frequencies.double(), scale


# --- reading foreign folders -------------------------------------------------------------------------------------


def layer_section(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the section of a config that holds the decoder layer's settings."""
    inner = config.get("transformer_layer_config")
    return dict(inner if isinstance(inner, dict) else config)


def layer_settings(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], folder: Path, attention: str
) -> dict[str, Any]:
    """Read the settings of a `TappedConfig` from a config and the tensors beside it, but for the layers that are read
    and the draft vocabulary.

    Args:
        tensors: the folder's, under the network's names.
        attention: the prefix of the first layer's attention.
    """
    layer = layer_section(config)
    if layer.get("hidden_act", "silu") not in ("silu", "swish"):
        raise UserError(f"'{folder}' has hidden_act '{layer['hidden_act']}'; only drafters with silu can be loaded")
    shape = _filled(layer, folder)
    if shape.num_attention_heads % shape.num_key_value_heads:
        raise UserError(
            f"'{folder / CONFIG}' has num_attention_heads that are no multiple of num_key_value_heads; copy or "
            "download the drafter again"
        )
    query, fc = tensors.get(f"{attention}q_proj.weight"), tensors.get("fc.weight")
    heads, head_dim = shape.num_attention_heads, shape.head_dim or shape.hidden_size // shape.num_attention_heads
    if query is not None and query.shape[0] % heads == 0:
        head_dim = query.shape[0] // heads  # trainers differ in what they make of a head_dim that is absent
    width = config.get("target_hidden_size") or shape.hidden_size
    check_value("target_hidden_size", width, (int,), folder)
    borrowed = [name for name in ("embed_tokens", "lm_head") if f"{name}.weight" not in tensors]
    if borrowed and shape.hidden_size != width:
        raise UserError(
            f"'{folder}' is {shape.hidden_size} wide, its target {width}, so it needs {borrowed[0]}.weight of its "
            "own, which is not there; copy or download it again"
        )
    found: dict[str, Any] = {
        **{name: getattr(shape, name) for name in SHAPES},
        "head_dim": head_dim,
        "target_hidden_size": width,
        "own_head": "lm_head.weight" in tensors,
        "attention_bias": f"{attention}q_proj.bias" in tensors,
        "head_norms": f"{attention}q_norm.weight" in tensors,
        "rms_norm_eps": shape.rms_norm_eps,
        "rope": shape.rope_parameters,
        "max_position_embeddings": shape.max_position_embeddings,
    }
    if fc is not None:
        found["num_taps"] = max(1, fc.shape[-1] // width)
    _check_rope(TappedConfig(**found), folder)
    return found


def _filled(layer: Mapping[str, Any], folder: Path) -> Any:
    """Fill the decoder layer's settings with the family's defaults, which speculators' configs leave out."""
    kind = Qwen3Config if layer.get("model_type") == "qwen3" else LlamaConfig
    values = {name: layer[name] for name in READ if layer.get(name) is not None}
    for name in SHAPES:
        check_value(name, values.get(name, 1), (int,), folder)
    for name in ("rms_norm_eps", "max_position_embeddings", "rope_theta"):
        check_value(name, values.get(name, 1), (int,) if name.startswith("max") else (int, float), folder)
    try:
        return kind(**values)
    except Exception as error:  # validators of `transformers` raise what they like
        raise UserError(
            f"'{folder / CONFIG}' cannot be ({first_line(error)}); copy or download the drafter again"
        ) from error


def _check_rope(config: TappedConfig, folder: Path) -> None:
    kind = config.rope.get("rope_type")
    try:
        if kind in ROPES:
            rotary_frequencies(config)
            return
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"'{folder / CONFIG}': rotary positions '{kind}' are incomplete ({first_line(error)}); copy it again"
        ) from error
    raise UserError(f"'{folder}' has rotary positions '{kind}'; those that load are {', '.join(ROPES)}")


def tap_ids(ids: Any, name: str, folder: Path) -> tuple[int, ...]:
    """Return a list of layers, as the folder numbers them."""
    if not isinstance(ids, list) or not ids or not all(type(layer) is int for layer in ids):
        raise UserError(f"'{folder / CONFIG}': {name} must be a list of layers, not {ids!r}; copy it again")
    return tuple(ids)


def draft_tokens_of(config: Mapping[str, Any], tensors: Mapping[str, Tensor], vocab: int, file: str) -> Tensor | None:
    """Return the ids of the draft vocabulary in the output layer's order; None where it is the whole vocabulary.

    `d2t` holds offsets, which are added to the index in the output layer.
    """
    head, offsets, bitmap = tensors.get("lm_head.weight"), tensors.get("d2t"), tensors.get("t2d")
    count = config.get("draft_vocab_size") or (vocab if head is None else head.shape[0])
    if offsets is not None and not offsets.is_floating_point() and offsets.dim() == 1:
        ids = torch.arange(len(offsets)) + offsets.long()
    elif bitmap is not None and bitmap.dim() == 1:
        ids = bitmap.nonzero()[:, 0]
    elif count == vocab:
        return None
    else:
        raise UserError(f"{file} lacks d2t, which says what its {count} draft tokens are; download it again")
    if not names_tokens(ids, count, vocab):
        raise UserError(
            f"{file}: d2t must lead to {count} different token ids below {vocab}, as its config.json says; "
            "download it again"
        )
    return None if torch.equal(ids, torch.arange(vocab)) else ids


def verifier_of(config: Mapping[str, Any]) -> str | None:
    """Return the target that the drafter was trained for; only speculators' folders name it."""
    return ((config.get("speculators_config") or {}).get("verifier") or {}).get("name_or_path")


# --- other readings ----------------------------------------------------------------------------------------------


def other_layers(read: tuple[int, ...], usual: tuple[int, ...], layers: int) -> list[tuple[int, ...]]:
    """Return the layers that a drafter may have been trained on instead of those that are read: each one further or one
    nearer, as conventions of counting differ, or its method's usual ones.

    Args:
        read, usual: layers counted from 1.
        layers: number of layers of the target, whose last one cannot be read.
    """
    near = [tuple(layer + step for layer in read) for step in (-1, 1)]
    return [found for found in dict.fromkeys([*near, usual]) if found != read and 0 < min(found) <= max(found) < layers]


def other_ropes(read: Mapping[str, Any], target: Target) -> list[dict[str, Any]]:
    """Return rotary settings that a drafter may have been trained with instead of those that are read: the target's,
    the read ones without their scaling, and the default of `transformers`."""
    own = getattr(target.model.config.get_text_config(), "rope_parameters", None) or {}
    theta = read.get("rope_theta", 10000.0)
    found = [dict(own)] if "rope_type" in own else []
    found += [{"rope_type": "default", "rope_theta": value} for value in (theta, 10000.0)]
    return [one for place, one in enumerate(found) if one != dict(read) and one not in found[:place]]
