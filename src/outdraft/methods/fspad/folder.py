"""Reading folders of a `FeatureHead`: outdraft's own, and the official FSPAD and EAGLE-1/2 ones as they are.

Official layouts are a Llama config and the weights beside it; names and shapes of the tensors tell the method.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from outdraft.drafting.folder import CONFIG, find_folder, is_own, read_config, read_weights, some
from outdraft.errors import UserError
from outdraft.methods.checkpoint import UNFOLDED, Checkpoint, assembled, read_own
from outdraft.methods.fspad.network import FeatureHead, FeatureHeadConfig, scaled
from outdraft.methods.tapped import SHAPES, layer_settings

OFFICIAL_NAMES = {
    "embed_tokens.": "embed_tokens.",
    "fc.post_attention_layernorm.": "fusion.norm.",
    "fc.mlp.": "fusion.",
    "fc.fc.": "fusion.fc.",
    "fc.": "fusion.fc.",
    "layers.0.self_attn.": "self_attn.",
    "layers.0.mlp.": "",
    "layers.0.post_attention_layernorm.": "norm.",
}
"""The prefixes of official tensor names, mapped to outdraft's; the first match counts."""

REMADE = re.compile(r"rotary_emb\.inv_freq$")
"""The names of buffers in old checkpoints that follow from the config."""


def load_drafter(
    folder_or_hub_id: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    kind: type[FeatureHead] = FeatureHead,
) -> Checkpoint[FeatureHead]:
    """Load a drafter from an outdraft folder or an official FSPAD or EAGLE-1/2 one, local or on the Hugging Face Hub.

    Args:
        dtype: precision of the weights; as stored when None.
        kind: the class of the network in folders of ours.
    """
    folder = find_folder(folder_or_hub_id)
    config = read_config(folder)
    if is_own(config):
        _refuse_method(str(config["method"]), folder, kind.methods)
        own = read_own(folder, config, kind.shapes)
        head = own.assembled(kind, dtype, device)
        return Checkpoint(scaled(head, own.training.get(UNFOLDED, 1.0)), target=own.target, training=own.training)
    file, tensors = read_weights(folder)
    settings = official_config(config, tensors, folder)
    names = {our_name(name): name for name in tensors if not REMADE.search(name)}
    head = assembled(
        lambda: FeatureHead(settings),
        {ours: tensors[theirs] for ours, theirs in names.items()},
        file,
        dtype=dtype,
        device=device,
        names=names,
        shown=lambda name: official_name(name, settings),
    )
    return Checkpoint(head, head.method)


def _refuse_method(method: str, folder: Path, known: Sequence[str]) -> None:
    if method == "eesd":
        raise UserError(f"'{folder}' holds an exit layer (eesd), which loads only together with its target")
    if method not in known:
        own = " or ".join(known)
        raise UserError(f"'{folder}' holds a drafter of method '{method}', not {own}; give --method {method}")


# --- official layouts -----------------------------------------------------------------------------------------


def official_config(config: dict[str, Any], tensors: Mapping[str, Tensor], folder: Path) -> FeatureHeadConfig:
    """Derive the head's configuration from a Llama config and the tensors beside it."""
    _refuse_others(config, tensors, folder)
    for name in ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size"):
        if name not in config:
            raise UserError(f"'{folder / CONFIG}' lacks {name}; it must be the drafter's own Llama config")
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default")) if isinstance(scaling, dict) else scaling
    if kind not in ("default", None):
        raise UserError(
            f"'{folder}' scales its rotary positions ('{kind}'), which is not supported; train one (outdraft train)"
        )
    layer = layer_settings(config, tensors, folder, "layers.0.self_attn.")
    down = tensors.get("layers.0.mlp.down_proj.weight")
    return FeatureHeadConfig(
        **{name: layer[name] for name in (*SHAPES, "attention_bias", "rms_norm_eps", "max_position_embeddings")},
        feature_sampling=any(name.startswith(("fc.fc.", "fc.mlp.")) for name in tensors),
        partial_alignment=down is not None and down.shape[:1] == (2 * layer["hidden_size"],),
        fc_bias="fc.bias" in tensors or "fc.fc.bias" in tensors,
        rope_theta=float(layer["rope"]["rope_theta"]),
    )


def _refuse_others(config: dict[str, Any], tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Raise UserError for folders of other models and drafters."""
    fusion = tensors.get("fc.weight")
    three = fusion is not None and fusion.ndim == 2 and fusion.shape[1] == 3 * fusion.shape[0]
    if three or "d2t" in tensors or any(name.startswith("midlayer.") for name in tensors):
        raise UserError(
            f"'{folder}' holds EAGLE-3 weights, but its config.json is no EAGLE-3 drafter's; "
            "put the one beside them that belongs to them, or train one"
        )
    if not any(name.startswith("fc.") for name in tensors):
        kind = (
            "a whole language model"
            if any(name.startswith(("lm_head.", "model.layers.")) for name in tensors)
            else some(sorted(tensors))
        )
        raise UserError(f"'{folder}' holds no drafter (no fc.* weights) but {kind}; give a drafter's folder")
    if config.get("num_hidden_layers", 1) != 1 or any(name.startswith("layers.1.") for name in tensors):
        raise UserError(f"'{folder}' has more than one layer; only one-layer FSPAD and EAGLE-1/2 drafters load")


def our_name(official: str) -> str:
    """Translate an official tensor name to that in `FeatureHead`."""
    for theirs, ours in OFFICIAL_NAMES.items():
        if official.startswith(theirs):
            return ours + official[len(theirs) :]
    return official


def official_name(ours: str, config: FeatureHeadConfig) -> str:
    """Translate a tensor name of `FeatureHead` to the official one, for messages."""
    beginning = max((b for b in OFFICIAL_NAMES.values() if ours.startswith(b)), key=len)
    theirs = next(theirs for theirs, b in OFFICIAL_NAMES.items() if b == beginning)
    if beginning == "fusion.fc." and not config.feature_sampling:
        theirs = "fc."
    return theirs + ours[len(beginning) :]
