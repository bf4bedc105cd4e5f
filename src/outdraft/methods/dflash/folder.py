"""DFlash and DSpark folders as they are: z-lab's layout (also JetSpec's and Automodel's), speculators', DeepSpec's.

The layouts differ in where settings stand, in how layers of the target are counted and in what the anchor's slot
predicts. Each becomes one `DFlashConfig`, with the origin of what was read noted. Shapes are read from the tensors
where these show them.

- Layers to read: `target_layer_ids` names the *output* of layer id, counted from 0; speculators'
  `aux_hidden_state_layer_ids` the *input* of layer id.
- What the anchor's slot predicts: itself in z-lab's and in speculators' DFlash, the next token in DSpark and in
  DeepSpec's drafters; `sample_from_anchor` or `shift_label` override that.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from outdraft.drafting.folder import CONFIG, check_value, find_folder, fitting, read_config, read_weights, some
from outdraft.errors import UserError
from outdraft.methods.dflash import kind_of, other_kind
from outdraft.methods.dflash.network import DFlashConfig, DFlashNetwork, Kind, TapUnit
from outdraft.methods.eagle3.folder import check_rope, draft_tokens_of, filled, layer_section

BESIDE = re.compile(r"^d2t$|^t2d$|rotary_emb\.inv_freq$|^verifier_")
"""The names of tensors that are no weights of the drafter."""

UNUSED = "confidence_head."
"""The prefix of DSpark's acceptance estimator, which outdraft's controllers replace."""


@dataclass
class DFlashCheckpoint:
    """A loaded drafter and what its folder says about it."""

    network: DFlashNetwork
    layout: str
    """`z-lab`, `speculators` or `deepspec`."""
    target_id: str | None
    """The target that the drafter was trained for; only speculators' folders name it."""
    slots: str
    """A phrase that says what the anchor's slot predicts, and how that is known."""
    unused: list[str]
    """The names of known tensors that are not read."""


def load_dflash(
    folder_or_hub_id: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    revision: str | None = None,
) -> DFlashCheckpoint:
    """Load a DFlash or DSpark drafter from a folder or the Hugging Face Hub; arguments as in
    `fspad.folder.load_drafter`.

    Raises:
        UserError: nothing is there, or it is another kind of drafter or damaged; the message names the fix.
    """
    folder = find_folder(folder_or_hub_id, revision)
    config = read_config(folder)
    if kind_of(config) is None:
        raise UserError(f"'{folder}' holds no DFlash or DSpark drafter; leave --method out")
    inner = config.get("dflash_config") or {}
    if not isinstance(inner, dict):
        raise UserError(f"'{folder / CONFIG}': dflash_config must be an object, not {inner!r}; copy it again")
    if (other := other_kind(config)) is not None:
        raise UserError(f"'{folder}' is a {other} drafter, which does not load; choose one of DFlash or DSpark")
    if inner.get("projector_type") not in (None, "dflash"):
        raise UserError(
            f"'{folder}' has projector_type '{inner['projector_type']}', which does not load; choose a drafter of "
            "z-lab's, speculators' or DeepSpec's layout"
        )
    file, held = read_weights(folder)
    names = {name.removeprefix("model."): name for name in held}
    tensors = {ours: held[theirs] for ours, theirs in names.items()}
    read = _Settings({**config, **{key: value for key, value in inner.items() if value is not None}}, folder)
    layout = "speculators" if "speculators_model_type" in config else "z-lab" if inner else "deepspec"
    settings, slots = _settings(read, tensors, layout, cast(Kind, kind_of(config)))
    kept = draft_tokens_of(config, tensors, settings.vocab_size, file)
    settings.draft_vocab_size = 0 if kept is None else len(kept)
    with torch.device("meta"):  # no random start, which would be overwritten
        network = DFlashNetwork(settings)
    wanted = {name: place for name, place in network.state_dict().items() if name != "draft_tokens"}
    unused = [name for name in tensors if name.startswith(UNUSED)]
    unknown = [name for name in tensors if name not in wanted and name not in unused and not BESIDE.search(name)]
    if any(name.startswith("markov_head.") for name in unknown):
        raise UserError(f"{file} holds a gated or recurrent Markov head, which does not load; choose another drafter")
    weights = fitting(tensors, wanted, file, shown={name: names.get(name, name) for name in wanted})
    if unknown:
        raise UserError(
            f"{file} holds {some(names[name] for name in unknown)}, which DFlash and DSpark have no place for; "
            "choose a drafter of a kind that loads"
        )
    network.load_state_dict(weights if kept is None else {**weights, "draft_tokens": kept}, assign=True)
    network.requires_grad_(False)
    network.to(device=device, dtype=dtype or network.fc.weight.dtype)
    verifier = (config.get("speculators_config") or {}).get("verifier") or {}
    return DFlashCheckpoint(network.eval(), layout, verifier.get("name_or_path"), slots, unused)


class _Settings:
    """A config.json with the keys of `dflash_config` merged in; reading it gives one-line errors."""

    def __init__(self, config: Mapping[str, Any], folder: Path):
        self.config, self.folder = config, folder

    def get(self, name: str) -> Any:
        return self.config.get(name)

    def error(self, what: str) -> UserError:
        return UserError(f"'{self.folder / CONFIG}' {what}; copy or download the drafter again")

    def whole(self, name: str, least: int) -> int:
        value = self.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise self.error(f"must have a whole number {name} of at least {least}, not {value!r}")
        return value

    def number(self, name: str, otherwise: float) -> float:
        if (value := self.get(name)) is None:
            return otherwise
        check_value(name, value, (int, float), self.folder)
        return float(value)

    def flag(self, *names: str) -> bool | None:
        """Return the first of these keys that is present, as a boolean; None if none is."""
        for name in names:
            if (value := self.get(name)) is not None:
                check_value(name, value, (bool,), self.folder)
                return bool(value)
        return None


def _settings(read: _Settings, tensors: Mapping[str, Tensor], layout: str, kind: Kind) -> tuple[DFlashConfig, str]:
    """Return the network's settings, and a phrase on what the anchor's slot predicts."""
    folder, layer = read.folder, layer_section(read.config)
    if layer.get("hidden_act", "silu") not in ("silu", "swish"):
        raise UserError(f"'{folder}' has hidden_act '{layer['hidden_act']}'; only drafters with silu can be loaded")
    shape, layers = filled(layer, folder), _Settings(layer, folder).whole("num_hidden_layers", 1)
    query, fc = tensors.get("layers.0.self_attn.q_proj.weight"), tensors.get("fc.weight")
    heads, head_dim = shape.num_attention_heads, shape.head_dim or shape.hidden_size // shape.num_attention_heads
    if query is not None and query.shape[0] % heads == 0:
        head_dim = query.shape[0] // heads  # trainers differ in what they make of a head_dim that is absent
    width = read.whole("target_hidden_size", 1) if read.get("target_hidden_size") else shape.hidden_size
    said = read.flag("sample_from_anchor", "shift_label")
    anchor_first = said if said is not None else kind == "dspark" or layout == "deepspec"
    causal, windows = _sights(read, layer, layers)
    markov = tensors.get("markov_head.markov_w1.weight")
    ids, unit = _tap_ids(read, layout)
    found = DFlashConfig(
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=shape.num_key_value_heads,
        head_dim=head_dim,
        vocab_size=shape.vocab_size,
        target_hidden_size=width,
        block_size=read.whole("block_size", 1 if anchor_first else 2),
        mask_token_id=read.whole("mask_token_id", 0),
        kind=kind,
        tap_ids=ids,
        tap_unit=unit,
        num_taps=max(1, fc.shape[-1] // width) if fc is not None else len(ids),
        num_target_layers=read.whole("num_target_layers", 1) if read.get("num_target_layers") else 0,
        anchor_first=anchor_first,
        causal=causal,
        windows=windows,
        own_head="lm_head.weight" in tensors,
        own_embedding="embed_tokens.weight" in tensors,
        head_norms="layers.0.self_attn.q_norm.weight" in tensors,
        attention_bias="layers.0.self_attn.q_proj.bias" in tensors,
        markov_rank=0 if markov is None else markov.shape[-1],
        input_embedding_scale=read.number("input_embedding_scale", 0.0),
        output_multiplier=read.number("output_multiplier", 1.0),
        final_logit_softcapping=read.number("final_logit_softcapping", 0.0),
        rms_norm_eps=shape.rms_norm_eps,
        rope=shape.rope_parameters,
        max_position_embeddings=shape.max_position_embeddings,
    )
    _check(found, read, tensors)
    check_rope(found, folder)
    who = "as its config.json says" if said is not None else f"as {'DSpark' if kind == 'dspark' else layout} trains it"
    return found, f"the anchor's slot predicting {'the next token' if anchor_first else 'nothing'} ({who})"


def _check(config: DFlashConfig, read: _Settings, tensors: Mapping[str, Tensor]) -> None:
    """Raise UserError where settings and tensors contradict each other."""
    if config.mask_token_id >= config.vocab_size:
        raise read.error(f"has mask_token_id {config.mask_token_id}, beyond its {config.vocab_size} tokens")
    if config.num_attention_heads % config.num_key_value_heads:
        raise read.error("has num_attention_heads that are no multiple of num_key_value_heads")
    if (read.get("markov_rank") or 0) and not config.markov_rank:
        raise UserError(f"'{read.folder}' lacks markov_head.markov_w1.weight; it is incomplete, download it again")
    borrowed = [name for name in ("embed_tokens", "lm_head") if f"{name}.weight" not in tensors]
    if borrowed and config.hidden_size != config.target_hidden_size:
        raise UserError(
            f"'{read.folder}' is {config.hidden_size} wide, its target {config.target_hidden_size}, so it needs "
            f"{borrowed[0]}.weight of its own, which is not there; copy or download it again"
        )


def _tap_ids(read: _Settings, layout: str) -> tuple[tuple[int, ...], TapUnit]:
    """Return the target's layers as the folder numbers them, and the convention of the numbers."""
    name, unit = ("target_layer_ids", "output")
    if layout == "speculators":
        name, unit = "aux_hidden_state_layer_ids", "input"
    ids = read.get(name)
    if ids is None and layout == "z-lab":
        return (), "none given"
    if not isinstance(ids, list) or not ids or not all(type(one) is int for one in ids):
        raise read.error(f"must have a list of layers {name}, not {ids!r}")
    return tuple(ids), cast(TapUnit, unit)


def _sights(read: _Settings, layer: Mapping[str, Any], layers: int) -> tuple[tuple[bool, ...], tuple[int, ...]]:
    """Return, for each layer, a causal flag and a window; sliding layers are causal unless the config says not."""
    kinds = layer.get("layer_types") or ["full_attention"] * layers
    if layer.get("use_sliding_window") and not layer.get("layer_types"):
        raise read.error("has a sliding window and no layer_types that say which layers have it")
    if not isinstance(kinds, list) or len(kinds) != layers or not set(kinds) <= {"full_attention", "sliding_attention"}:
        raise read.error(f"must have layer_types of {layers} layers, full_attention or sliding_attention")
    sliding = [kind == "sliding_attention" for kind in kinds]
    own = read if read.get("sliding_window") is not None else _Settings(layer, read.folder)
    window = own.whole("sliding_window", 1) if any(sliding) else 0
    said = read.flag("causal_head", "causal")
    causal = tuple(slides if said is None else said for slides in sliding)
    return causal, tuple(window if slides else 0 for slides in sliding)
