"""Reading folders of a `FeatureHead`: outdraft's own, and the official FSPAD and EAGLE-1/2 ones as they are.

Official layouts are a Llama config and the weights beside it; names and shapes of the tensors tell the method.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from outdraft.drafting.folder import (
    CONFIG,
    check_value,
    find_folder,
    fitting,
    is_own,
    read_config,
    read_settings,
    read_weights,
    section,
    some,
    warn_of_unknown,
)
from outdraft.errors import UserError
from outdraft.methods.checkpoint import UNFOLDED
from outdraft.methods.fspad.network import FeatureHead, FeatureHeadConfig, scaled

Layout = Literal["outdraft", "fspad", "eagle"]

KEPT = "draft_tokens"
"""The name of the tensor of a reduced draft vocabulary."""

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


@dataclass
class DrafterCheckpoint:
    """A loaded drafter and what its folder says about it."""

    head: FeatureHead
    target_id: str | None
    """The target that the drafter was trained for; official folders do not name it."""
    training: dict[str, Any] = field(default_factory=dict)
    """The training's own record: settings, data, metrics."""
    layout: Layout = "outdraft"
    target: dict[str, Any] = field(default_factory=dict)
    """Facts about the target: id, hidden_size, vocab_size and whatever else was saved."""


def load_drafter(
    folder_or_hub_id: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    revision: str | None = None,
    kind: type[FeatureHead] = FeatureHead,
) -> DrafterCheckpoint:
    """Load a drafter from an outdraft folder or an official FSPAD or EAGLE-1/2 one, local or on the Hugging Face Hub.

    Args:
        folder_or_hub_id: a folder, else a hub id.
        dtype: precision of the weights; as stored when None.
        device: device of the weights.
        revision: revision of a hub repository.
        kind: the class of the network in folders of ours.

    Raises:
        UserError: nothing is there, or it is no drafter or damaged; the message names the fix.
    """
    folder = find_folder(folder_or_hub_id, revision)
    config = read_config(folder)
    file, tensors = read_weights(folder)
    own = is_own(config)
    head_config = _own_config(config, folder, kind) if own else official_config(config, tensors, folder)
    names = {} if own else {our_name(name): name for name in tensors if not REMADE.search(name)}
    head = _build(head_config, {name: tensors[names.get(name, name)] for name in names or tensors}, names, file, kind)
    if head.embed_tokens is not None:
        head.embed_tokens.requires_grad_(False)
    head.to(device=device, dtype=dtype or head.fusion.fc.weight.dtype)
    layout: Layout = "outdraft" if own else "eagle" if head.method == "eagle" else "fspad"
    target, training = section(config, "target"), section(config, "training")
    return DrafterCheckpoint(scaled(head, training.get(UNFOLDED, 1.0)), target.get("id"), training, layout, target)


def _own_config(config: dict[str, Any], folder: Path, kind: type[FeatureHead]) -> FeatureHeadConfig:
    method = config.get("method")
    if method == "eesd":
        raise UserError(f"'{folder}' holds an exit layer (eesd), which loads only together with its target")
    if method not in kind.methods:
        own = " or ".join(kind.methods)
        raise UserError(f"'{folder}' holds a drafter of method '{method}', not {own}; give --method {method}")
    return read_settings(kind.shapes, config, folder)


def _build(
    config: FeatureHeadConfig,
    tensors: dict[str, Tensor],
    names: Mapping[str, str],
    file: str,
    kind: type[FeatureHead] = FeatureHead,
) -> FeatureHead:
    """Build a head with these weights, or raise the error that says which do not fit; `names` are the file's."""
    with torch.device("meta"):  # no random start, which would be overwritten
        head = kind(config)
        if "embed_tokens.weight" in tensors:
            head.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
    wanted = head.state_dict()
    kept = {KEPT: _draft_tokens(tensors, config, file)} if KEPT in wanted else {}
    weights = {name: place for name, place in wanted.items() if name not in kept}
    shown = {name: official_name(name, config) for name in weights} if names else None
    head.load_state_dict({**fitting(tensors, weights, file, shown=shown), **kept}, assign=True)
    warn_of_unknown([names.get(name, name) for name in tensors if name not in wanted], file)
    return head


def _draft_tokens(tensors: Mapping[str, Tensor], config: FeatureHeadConfig, file: str) -> Tensor:
    """Return the ids of the draft vocabulary."""
    found = tensors.get(KEPT)
    if found is None:
        raise UserError(f"{file} lacks {KEPT}; it is incomplete, copy or train it again")
    ids = found.tolist() if not found.is_floating_point() and found.dim() == 1 else []
    if (
        len(ids) != config.draft_vocab_size
        or len(set(ids)) != len(ids)
        or not all(0 <= token < config.vocab_size for token in ids)
    ):
        raise UserError(
            f"{file}: {KEPT} must be {config.draft_vocab_size} different token ids below {config.vocab_size}, as its "
            "config.json says; copy or train it again"
        )
    return torch.tensor(ids)


# --- official layouts -----------------------------------------------------------------------------------------


def official_config(config: dict[str, Any], tensors: Mapping[str, Tensor], folder: Path) -> FeatureHeadConfig:
    """Derive the head's configuration from a Llama config and the tensors beside it."""
    _refuse_others(config, tensors, folder)
    for name in ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size"):
        if name not in config:
            raise UserError(f"'{folder / CONFIG}' lacks {name}; it must be the drafter's own Llama config")
    values = {
        "num_key_value_heads": config["num_attention_heads"],
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 2048,
        **{key: value for key, value in config.items() if value is not None},
    }
    for name in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "vocab_size"):
        check_value(name, values[name], (int,), folder)
    check_value("max_position_embeddings", values["max_position_embeddings"], (int,), folder)
    check_value("rms_norm_eps", values["rms_norm_eps"], (int, float), folder)
    if values.get("hidden_act", "silu") not in ("silu", "swish"):
        raise UserError(f"'{folder}' has hidden_act '{values['hidden_act']}'; only drafters with silu can be loaded")
    width, heads = values["hidden_size"], values["num_attention_heads"]
    query = tensors.get("layers.0.self_attn.q_proj.weight")
    # The authors' code splits the width whatever the config's head_dim says; where both exist the tensor decides.
    head_dim = values.get("head_dim", width // heads)
    if query is not None and heads * head_dim != width and query.shape[:1] == (width,):
        head_dim = width // heads
    check_value("head_dim", head_dim, (int,), folder)
    down = tensors.get("layers.0.mlp.down_proj.weight")
    return FeatureHeadConfig(
        hidden_size=width,
        intermediate_size=values["intermediate_size"],
        num_attention_heads=heads,
        num_key_value_heads=values["num_key_value_heads"],
        head_dim=head_dim,
        vocab_size=values["vocab_size"],
        feature_sampling=any(name.startswith(("fc.fc.", "fc.mlp.")) for name in tensors),
        partial_alignment=down is not None and down.shape[:1] == (2 * width,),
        fc_bias="fc.bias" in tensors or "fc.fc.bias" in tensors,
        attention_bias="layers.0.self_attn.q_proj.bias" in tensors,
        rms_norm_eps=values["rms_norm_eps"],
        rope_theta=_rope_theta(values, folder),
        max_position_embeddings=values["max_position_embeddings"],
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


def _rope_theta(config: dict[str, Any], folder: Path) -> float:
    rope = config.get("rope_parameters")
    rope = rope if isinstance(rope, dict) else {}
    scaling = config.get("rope_scaling") or rope
    kind = scaling.get("rope_type", scaling.get("type", "default")) if isinstance(scaling, dict) else scaling
    if kind not in ("default", None):
        raise UserError(
            f"'{folder}' scales its rotary positions ('{kind}'), which is not supported; train one (outdraft train)"
        )
    theta: Any = config.get("rope_theta", rope.get("rope_theta", 10000.0))
    check_value("rope_theta", theta, (int, float), folder)
    return float(theta)


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
