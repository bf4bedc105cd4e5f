"""EAGLE-3 folders as they are: the authors' own layout, SpecForge's, AngelSlim's and speculators'.

The layouts differ in where settings stand and in how layers of the target are counted. Each becomes one `Eagle3Config`,
with the origin of what was read noted. Shapes are read from the tensors where these show them.

Layers whose outputs are read are named by three conventions:

- not at all: `hidden_states` 2, L // 2 and L - 3 of L layers, which is what the authors' code reads;
- `eagle_aux_hidden_state_layer_ids` inside `eagle_config` (SpecForge, SGLang, ModelOpt): the *output* of layer id,
  counted from 0;
- the same key at the top (speculators, vLLM): the *input* of layer id.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, Qwen3Config

from outdraft.drafting.folder import (
    CONFIG,
    check_value,
    find_folder,
    fitting,
    read_config,
    read_weights,
    warn_of_unknown,
)
from outdraft.errors import UserError, first_line
from outdraft.methods.eagle3 import is_eagle3
from outdraft.methods.eagle3.drafter import RotaryConfig, rotary_frequencies
from outdraft.methods.eagle3.network import Eagle3Config, Eagle3Head, TapUnit

TAP_IDS = "eagle_aux_hidden_state_layer_ids"

SHAPES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size")
READ = (*SHAPES, "rms_norm_eps", "max_position_embeddings", "rope_theta", "rope_scaling", "rope_parameters")
"""The keys that are read of the layer's config."""

ROPES = ("default", "linear", "llama3", "yarn")
"""The kinds of rotary positions that do not depend on the length of the text."""

BESIDE = re.compile(r"^d2t$|^t2d$|rotary_emb\.inv_freq$")
"""The names of tensors that are no weights."""


@dataclass
class Eagle3Checkpoint:
    """A loaded drafter and what its folder says about it."""

    head: Eagle3Head
    layout: str
    """The folder's layout: `eagle3` (the authors'), `specforge`, `angelslim` or `speculators`."""
    target_id: str | None
    """The target that the drafter was trained for; only speculators' folders name it."""


def load_eagle3(
    folder_or_hub_id: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    revision: str | None = None,
) -> Eagle3Checkpoint:
    """Load an EAGLE-3 drafter from a folder or the Hugging Face Hub; arguments as in `fspad.folder.load_drafter`.

    Raises:
        UserError: nothing is there, or it is another kind of drafter or damaged; the message names the fix.
    """
    folder = find_folder(folder_or_hub_id, revision)
    config = read_config(folder)
    if not is_eagle3(config):
        raise UserError(f"'{folder}' holds no EAGLE-3 drafter; leave --method out")
    file, tensors = read_weights(folder)
    layout = _layout(config)
    names = {_ours(name): name for name in tensors}
    if more := [name for name in names if re.match(r"layers\.[1-9]", name)]:
        raise UserError(f"{file} holds {names[more[0]]}; only EAGLE-3 drafters of one layer load")
    found = {ours: tensors[theirs] for ours, theirs in names.items()}
    settings = _settings(config, found, folder)
    kept = draft_tokens_of(config, found, settings.vocab_size, file)
    settings.draft_vocab_size = 0 if kept is None else len(kept)
    head = _build(settings, found, kept, file, "layers.0." if layout == "speculators" else "midlayer.")
    known = head.state_dict()
    warn_of_unknown([names[name] for name in names if name not in known and not BESIDE.search(name)], file)
    head.requires_grad_(False)
    head.to(device=device, dtype=dtype or head.fc.weight.dtype)
    verifier = (config.get("speculators_config") or {}).get("verifier") or {}
    return Eagle3Checkpoint(head.eval(), layout, verifier.get("name_or_path"))


def _layout(config: Mapping[str, Any]) -> str:
    classes = config.get("architectures") or []
    if "speculators_model_type" in config:
        return "speculators"
    if "target_model_type" in config or "Eagle3LlamaForCausalLM" in classes:
        return "angelslim"
    return "specforge" if any("Eagle3" in str(name) for name in classes) or "eagle_config" in config else "eagle3"


def layer_section(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the section of a config that holds the decoder layer's settings."""
    inner = config.get("transformer_layer_config")
    return dict(inner if isinstance(inner, dict) else config)


# --- settings --------------------------------------------------------------------------------------------------


def _settings(config: dict[str, Any], tensors: Mapping[str, Tensor], folder: Path) -> Eagle3Config:
    layer, eagle = layer_section(config), config.get("eagle_config") or {}
    flags = {name: config.get(name, eagle.get(name)) or False for name in ("fc_norm", "norm_before_fc", "norm_output")}
    flags["norm_before_residual"] = _norm_before_residual(config, eagle, folder)
    for name, value in flags.items():
        check_value(name, value, (bool,), folder)
    if eagle.get("use_aux_hidden_state") is False:
        raise UserError(f"'{folder}' reads no layers of its target (use_aux_hidden_state); choose an EAGLE-3 drafter")
    if layer.get("hidden_act", "silu") not in ("silu", "swish"):
        raise UserError(f"'{folder}' has hidden_act '{layer['hidden_act']}'; only drafters with silu can be loaded")
    if (layer.get("layer_types") or [])[:1] == ["sliding_attention"]:
        raise UserError(f"'{folder}' looks back over a window only, which is not supported; choose another drafter")
    shape = filled(layer, folder)
    query, fc = tensors.get("self_attn.q_proj.weight"), tensors.get("fc.weight")
    heads, head_dim = shape.num_attention_heads, shape.head_dim or shape.hidden_size // shape.num_attention_heads
    if query is not None and query.shape[0] % heads == 0:
        head_dim = query.shape[0] // heads  # trainers differ in what they make of a head_dim that is absent
    width = config.get("target_hidden_size") or shape.hidden_size
    check_value("target_hidden_size", width, (int,), folder)
    ids, unit = _tap_ids(config, eagle, folder)
    found = Eagle3Config(
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_attention_heads=heads,
        num_key_value_heads=shape.num_key_value_heads,
        head_dim=head_dim,
        vocab_size=shape.vocab_size,
        target_hidden_size=width,
        tap_ids=ids,
        tap_unit=unit,
        num_taps=3 if fc is None else max(1, fc.shape[-1] // width),
        own_head="lm_head.weight" in tensors,
        fc_bias="fc.bias" in tensors,
        attention_bias="self_attn.q_proj.bias" in tensors,
        head_norms="self_attn.q_norm.weight" in tensors,
        tap_norms=flags["fc_norm"] or "fc_norm.0.weight" in tensors,
        norm_before_fc=flags["norm_before_fc"] or "input_norm.weight" in tensors,
        norm_before_residual=flags["norm_before_residual"],
        norm_output=flags["norm_output"],
        rms_norm_eps=shape.rms_norm_eps,
        rope=shape.rope_parameters,
        max_position_embeddings=shape.max_position_embeddings,
    )
    borrowed = [name for name in ("embed_tokens", "lm_head") if f"{name}.weight" not in tensors]
    if borrowed and found.hidden_size != width:
        raise UserError(
            f"'{folder}' is {found.hidden_size} wide, its target {width}, so it needs {borrowed[0]}.weight of its "
            "own, which is not there; copy or download it again"
        )
    check_rope(found, folder)
    return found


def _norm_before_residual(config: Mapping[str, Any], eagle: Mapping[str, Any], folder: Path) -> Any:
    """Read `norm_before_residual`, False by default; speculators' layout must set it, as its readers disagree."""
    found = config.get("norm_before_residual", eagle.get("norm_before_residual"))
    if found is None and "speculators_model_type" in config:
        warnings.warn(
            f"'{folder / CONFIG}' says nothing of norm_before_residual, which is taken for false as speculators does "
            "(vLLM: true); if drafts are poor, write it there",
            stacklevel=4,
        )
    return found or False


def filled(layer: Mapping[str, Any], folder: Path) -> Any:
    """Fill the decoder layer's settings with the family's defaults, which speculators' configs leave out."""
    kind = Qwen3Config if layer.get("model_type") == "qwen3" else LlamaConfig
    values = {name: layer[name] for name in READ if layer.get(name) is not None}
    for name in SHAPES:
        check_value(name, values.get(name, 1), (int,), folder)
    try:
        return kind(**values)
    except Exception as error:  # validators of `transformers` raise what they like
        raise UserError(
            f"'{folder / CONFIG}' cannot be ({first_line(error)}); copy or download the drafter again"
        ) from error


def _tap_ids(config: Mapping[str, Any], eagle: Mapping[str, Any], folder: Path) -> tuple[tuple[int, ...], TapUnit]:
    """Return the target's layers as the folder numbers them, and the convention of the numbers."""
    unit: TapUnit = "input" if config.get(TAP_IDS) else "output"
    ids = config.get(TAP_IDS) or eagle.get(TAP_IDS)
    if not ids:
        return (), "none given"
    if not isinstance(ids, list) or not all(isinstance(layer, int) and not isinstance(layer, bool) for layer in ids):
        raise UserError(f"'{folder / CONFIG}': {TAP_IDS} must be a list of layers, not {ids!r}; copy it again")
    return tuple(ids), unit


def check_rope(config: RotaryConfig, folder: Path) -> None:
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


# --- weights ---------------------------------------------------------------------------------------------------


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
    if len(ids) != count or len(ids.unique()) != count or not 0 <= int(ids.min()) <= int(ids.max()) < vocab:
        raise UserError(
            f"{file}: d2t must lead to {count} different token ids below {vocab}, as its config.json says; "
            "download it again"
        )
    return None if torch.equal(ids, torch.arange(vocab)) else ids


def _build(
    config: Eagle3Config, tensors: Mapping[str, Tensor], kept: Tensor | None, file: str, layer: str
) -> Eagle3Head:
    """Build a head with these weights, or raise the error that says which do not fit."""
    with torch.device("meta"):  # no random start, which would be overwritten
        head = Eagle3Head(config)
        if "embed_tokens.weight" in tensors:
            head.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
    wanted = {name: place for name, place in head.state_dict().items() if name != "draft_tokens"}
    weights = fitting(tensors, wanted, file, shown={name: _theirs(name, layer) for name in wanted})
    head.load_state_dict(weights if kept is None else {**weights, "draft_tokens": kept}, assign=True)
    return head


def _ours(theirs: str) -> str:
    """Translate a file's tensor name to that in `Eagle3Head`."""
    return re.sub(r"^(midlayer|layers\.0)\.(mlp\.)?", "", theirs.removeprefix("model."))


def _theirs(ours: str, layer: str) -> str:
    """Translate a tensor name of `Eagle3Head` to that in a file, for messages."""
    if ours.startswith(("gate_proj", "up_proj", "down_proj")):
        return f"{layer}mlp.{ours}"
    inside = ours.startswith(("self_attn", "input_layernorm", "hidden_norm", "post_attention_layernorm"))
    return layer + ours if inside else ours
