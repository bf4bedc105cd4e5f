"""DFlash and DSpark folders as they are: z-lab's layout (also JetSpec's and Automodel's), speculators', DeepSpec's.

Training writes the layout that it began from, with the record of the run beside it.

The layouts differ in where settings stand, in how layers of the target are counted and in what the anchor's slot
predicts. Each becomes one `DFlashConfig`, with the origin of what was read noted. Shapes are read from the tensors
where these show them.

- Layers to read: `target_layer_ids` names the *output* of layer id, counted from 0; speculators'
  `aux_hidden_state_layer_ids` the *input* of layer id.
- What the anchor's slot predicts: itself in z-lab's and in speculators' DFlash, the next token in DSpark and in
  DeepSpec's drafters; `sample_from_anchor` or `shift_label` override that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from outdraft.drafting.folder import AROUND, CONFIG, check_value, find_folder, read_config, read_weights, section
from outdraft.errors import UserError
from outdraft.methods.checkpoint import Checkpoint, assembled
from outdraft.methods.dflash import kind_of, other_kind
from outdraft.methods.dflash.network import DFlashConfig, DFlashNetwork, Kind, Origin
from outdraft.methods.tapped import (
    BESIDE,
    TapUnit,
    draft_tokens_of,
    layer_section,
    layer_settings,
    tap_ids,
    verifier_of,
)

UNUSED = "confidence_head."
"""The prefix of DSpark's acceptance estimator, which outdraft's controllers replace."""

MARKOV = ("markov_head.markov_w1.weight", "markov_head.markov_w2.weight")


@dataclass
class DFlashCheckpoint(Checkpoint[DFlashNetwork]):
    """A loaded drafter and what its folder says about it; its layout is `z-lab`, `speculators` or `deepspec`."""

    slots: str = ""
    """A phrase that says what the anchor's slot predicts, and how that is known."""
    unused: list[str] = field(default_factory=list)
    """The names of known tensors that are not read."""


def load_dflash(
    folder_or_hub_id: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> DFlashCheckpoint:
    """Load a DFlash or DSpark drafter from a folder or the Hugging Face Hub; arguments as in
    `fspad.folder.load_drafter`.
    """
    folder = find_folder(folder_or_hub_id)
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
    unused = [name for name in tensors if name.startswith(UNUSED)]
    if any(name.startswith("markov_head.") and name not in MARKOV for name in tensors):
        raise UserError(f"{file} holds a gated or recurrent Markov head, which does not load; choose another drafter")
    network = assembled(
        lambda: DFlashNetwork(settings),
        {name: tensor for name, tensor in tensors.items() if name not in unused},
        file,
        dtype=dtype,
        device=device,
        kept=kept,
        names=names,
        beside=BESIDE,
        kind="DFlash and DSpark",
    )
    network.origin = Origin(
        {name: value for name, value in config.items() if name not in AROUND},
        {name: names[name] for name in network.state_dict() if name in names},
        {names[name]: tensors[name].clone() for name in tensors if name in (*unused, "d2t", "t2d")},
    )
    verifier = verifier_of(config)
    target = section(config, "target") or ({} if verifier is None else {"id": verifier})
    return DFlashCheckpoint(network, layout, target, section(config, "training"), slots, unused)


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
    layer = layer_section(read.config)
    shape = layer_settings(read.config, tensors, read.folder, "layers.0.self_attn.")
    layers = _Settings(layer, read.folder).whole("num_hidden_layers", 1)
    said = read.flag("sample_from_anchor", "shift_label")
    anchor_first = said if said is not None else kind == "dspark" or layout == "deepspec"
    causal, windows = _sights(read, layer, layers)
    markov = tensors.get("markov_head.markov_w1.weight")
    ids, unit = _tap_ids(read, layout)
    shape["num_taps"] = shape.get("num_taps", len(ids))
    found = DFlashConfig(
        **shape,
        num_hidden_layers=layers,
        block_size=read.whole("block_size", 1 if anchor_first else 2),
        mask_token_id=read.whole("mask_token_id", 0),
        kind=kind,
        tap_ids=ids,
        tap_unit=unit,
        num_target_layers=read.whole("num_target_layers", 1) if read.get("num_target_layers") else 0,
        anchor_first=anchor_first,
        causal=causal,
        windows=windows,
        own_embedding="embed_tokens.weight" in tensors,
        markov_rank=0 if markov is None else markov.shape[-1],
        input_embedding_scale=read.number("input_embedding_scale", 0.0),
        output_multiplier=read.number("output_multiplier", 1.0),
        final_logit_softcapping=read.number("final_logit_softcapping", 0.0),
    )
    if found.mask_token_id >= found.vocab_size:
        raise read.error(f"has mask_token_id {found.mask_token_id}, beyond its {found.vocab_size} tokens")
    if (read.get("markov_rank") or 0) and not found.markov_rank:
        raise UserError(f"'{read.folder}' lacks markov_head.markov_w1.weight; it is incomplete, download it again")
    who = "as its config.json says" if said is not None else f"as {'DSpark' if kind == 'dspark' else layout} trains it"
    return found, f"the anchor's slot predicting {'the next token' if anchor_first else 'nothing'} ({who})"


def _tap_ids(read: _Settings, layout: str) -> tuple[tuple[int, ...], TapUnit]:
    """Return the target's layers as the folder numbers them, and the convention of the numbers."""
    if layout == "speculators":
        return tap_ids(read.get("aux_hidden_state_layer_ids"), "aux_hidden_state_layer_ids", read.folder), "input"
    if (ids := read.get("target_layer_ids")) is None and layout == "z-lab":
        return (), "none given"
    return tap_ids(ids, "target_layer_ids", read.folder), "output"


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
