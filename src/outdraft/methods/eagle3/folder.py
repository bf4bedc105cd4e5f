"""EAGLE-3 folders: outdraft's own, the authors' layout, SpecForge's, AngelSlim's and speculators'.

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
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from outdraft.drafting.folder import CONFIG, check_value, find_folder, is_own, read_config, read_weights
from outdraft.errors import UserError
from outdraft.methods.checkpoint import Checkpoint, assembled, read_own
from outdraft.methods.eagle3 import is_eagle3
from outdraft.methods.eagle3.network import Eagle3Config, Eagle3Head
from outdraft.methods.tapped import BESIDE, draft_tokens_of, layer_section, layer_settings, tap_ids, verifier_of

TAP_IDS = "eagle_aux_hidden_state_layer_ids"


def load_eagle3(
    folder_or_hub_id: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> Checkpoint[Eagle3Head]:
    """Load an EAGLE-3 drafter from a folder or the Hugging Face Hub; arguments as in `fspad.folder.load_drafter`.

    Returns:
        The drafter. Its layout is `outdraft`, `eagle3` (the authors'), `specforge`, `angelslim` or `speculators`.
    """
    folder = find_folder(folder_or_hub_id)
    config = read_config(folder)
    if is_own(config) and config["method"] == Eagle3Head.method:
        own = read_own(folder, config, Eagle3Config)
        return Checkpoint(own.assembled(Eagle3Head, dtype, device), target=own.target, training=own.training)
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
    layer = "layers.0." if layout == "speculators" else "midlayer."
    head = assembled(
        lambda: Eagle3Head(settings),
        found,
        file,
        kept=kept,
        dtype=dtype,
        device=device,
        names=names,
        shown=lambda name: official_name(name, layer),
        beside=BESIDE,
    )
    return Checkpoint(head, layout, {} if (target := verifier_of(config)) is None else {"id": target})


def _layout(config: Mapping[str, Any]) -> str:
    classes = config.get("architectures") or []
    if "speculators_model_type" in config:
        return "speculators"
    if "target_model_type" in config or "Eagle3LlamaForCausalLM" in classes:
        return "angelslim"
    return "specforge" if any("Eagle3" in str(name) for name in classes) or "eagle_config" in config else "eagle3"


# --- settings --------------------------------------------------------------------------------------------------


def _settings(config: dict[str, Any], tensors: Mapping[str, Tensor], folder: Path) -> Eagle3Config:
    eagle = config.get("eagle_config") or {}
    flags = {name: config.get(name, eagle.get(name)) or False for name in ("fc_norm", "norm_before_fc", "norm_output")}
    flags["norm_before_residual"] = _norm_before_residual(config, eagle, folder)
    for name, value in flags.items():
        check_value(name, value, (bool,), folder)
    if eagle.get("use_aux_hidden_state") is False:
        raise UserError(f"'{folder}' reads no layers of its target (use_aux_hidden_state); choose an EAGLE-3 drafter")
    if (layer_section(config).get("layer_types") or [])[:1] == ["sliding_attention"]:
        raise UserError(f"'{folder}' looks back over a window only, which is not supported; choose another drafter")
    found = Eagle3Config(
        **layer_settings(config, tensors, folder, "self_attn."),
        fc_bias="fc.bias" in tensors,
        tap_norms=flags["fc_norm"] or "fc_norm.0.weight" in tensors,
        norm_before_fc=flags["norm_before_fc"] or "input_norm.weight" in tensors,
        norm_before_residual=flags["norm_before_residual"],
        norm_output=flags["norm_output"],
    )
    if ids := config.get(TAP_IDS) or eagle.get(TAP_IDS):
        found.tap_ids = tap_ids(ids, TAP_IDS, folder)
        found.tap_unit = "input" if config.get(TAP_IDS) else "output"
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


# --- names -----------------------------------------------------------------------------------------------------


def _ours(theirs: str) -> str:
    """Translate a file's tensor name to that in `Eagle3Head`."""
    return re.sub(r"^(midlayer|layers\.0)\.(mlp\.)?", "", theirs.removeprefix("model."))


def official_name(ours: str, layer: str = "midlayer.") -> str:
    """Translate a tensor name of `Eagle3Head` to that in others' files."""
    if ours.startswith(("gate_proj", "up_proj", "down_proj")):
        return f"{layer}mlp.{ours}"
    inside = ours.startswith(("self_attn", "input_layernorm", "hidden_norm", "post_attention_layernorm"))
    return layer + ours if inside else ours
