"""Folders of a `FeatureHead`: outdraft's own, the official FSPAD and EAGLE-1/2 ones as they are, and exports for vLLM.

Official layouts are a Llama config and the weights beside it; names and shapes of the tensors tell the method. Exports
have the official names, so that they load here and in the authors' code too. The check of an export computes from the
files alone and shares no code with `FeatureHead`, with which it is compared.
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
from outdraft.methods.fspad import EAGLE, EAGLE_WITH_BIAS, FSPAD
from outdraft.methods.fspad.network import FeatureHead, FeatureHeadConfig, scaled
from outdraft.methods.registry import ExportTarget, Written
from outdraft.methods.tapped import SHAPES, layer_settings
from outdraft.methods.vllm_folder import (
    COMPARED_TOKENS,
    Files,
    layer_shapes,
    llama_config,
    refuse_target,
    written_and_read,
)

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
        found = read_own(folder, config, kind.shapes).checkpoint(kind, dtype, device)
        scaled(found.network, found.training.get(UNFOLDED, 1.0))
        return found
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


def export_head(
    source: str | Path, target: ExportTarget, folder: Path, engine: str, dtype: torch.dtype | None
) -> Written:
    """Write the drafter's folder for vLLM; arguments as in `Method.export`."""
    if engine == "hf":
        raise UserError(
            "transformers' assistant_model takes whole language models, which FSPAD's and EAGLE's heads are not; "
            "use --engine vllm, or stock models' generate(..., custom_generate=outdraft.custom_generate(drafter))"
        )
    checkpoint = load_drafter(source)
    head = checkpoint.head.eval()
    refuse_unexportable(head.config, target.config)
    if dtype is not None:
        head.to(dtype)
    config = engine_config(head.config, target.config, head.fusion.fc.weight.dtype)
    written, read = written_and_read(folder, checkpoint, config, engine_tensors(head), expected_shapes)
    name = config["architectures"][0]
    return Written(head.method, name, _both(head, written, read), "eagle", name != EAGLE)


@torch.inference_mode()
def _both(head: FeatureHead, config: dict[str, Any], tensors: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Run the drafter's own forward and the written files' on random inputs of the features' size."""
    head = head.float()
    noise = torch.Generator().manual_seed(0)
    tokens = min(COMPARED_TOKENS, head.config.max_position_embeddings)
    embeddings, features = torch.randn(2, tokens, head.config.hidden_size, generator=noise)
    if head.embed_tokens is not None:
        ids = torch.randint(head.config.vocab_size, (tokens,), generator=noise)
        embeddings = head.embed_tokens(ids)
    ours = head(embeddings[None], features[None])
    theirs = read_forward(config, tensors, embeddings, features)
    return [(one[0], other) for one, other in zip(ours, theirs, strict=True)]


def refuse_unexportable(config: FeatureHeadConfig, target: Any) -> None:
    """Raise UserError where vLLM would run another drafter than outdraft, or none."""
    for name, what, instead in (
        ("tap_layers", "reads several layers of the target (tap_layers)", "without"),
        ("state_norm", "normalises what it reads (state_norm)", "without"),
        ("draft_vocab_size", "has a reduced vocabulary (draft_vocab_size)", "with draft_vocab_size=all"),
    ):
        if getattr(config, name):
            raise UserError(f"the drafter {what}, which vLLM cannot run; train one {instead}")
    refuse_target(config, target)


def architecture(config: FeatureHeadConfig) -> str:
    if config.feature_sampling or config.partial_alignment:
        return FSPAD
    return EAGLE_WITH_BIAS if config.fc_bias else EAGLE


def engine_config(config: FeatureHeadConfig, target: Any, dtype: torch.dtype) -> dict[str, Any]:
    """Make the folder's config.json: a Llama config of one layer, and the drafter's switches; arguments as in
    `llama_config`."""
    rope = {"rope_theta": config.rope_theta, "rope_type": "default"}
    written = {
        **llama_config(config, target, dtype, architecture(config), rope),
        "feature_sampling": config.feature_sampling,
        "partial_alignment": config.partial_alignment,
        "fc_bias": config.fc_bias,
    }
    if config.attention_bias:
        written["qkv_bias"] = True  # on query, key and value alone; vLLM's attention_bias is on the output as well
    if not config.fc_bias:
        # In the authors' code a config without `bias` means that fc has one; in vLLM's it would be the attention's.
        written["bias"] = False
    return written


def engine_tensors(head: FeatureHead) -> dict[str, Tensor]:
    return {official_name(name, head.config): tensor for name, tensor in head.state_dict().items()}


def expected_shapes(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """List every tensor that the engine asks for, with its shape, from the folder's config alone.

    Args:
        tensors: the folder's; an embedding is asked for only where there is one.
    """
    d, i = config["hidden_size"], config["intermediate_size"]
    fc = "fc.fc." if config["feature_sampling"] else "fc."
    layer = "layers.0."
    shapes = {f"{fc}weight": (d, 2 * d), **layer_shapes(config, layer, d)}
    if config["partial_alignment"]:
        shapes[f"{layer}mlp.down_proj.weight"] = (2 * d, i)
    if config["fc_bias"]:
        shapes[f"{fc}bias"] = (d,)
    if config["feature_sampling"]:
        shapes |= {
            "fc.post_attention_layernorm.weight": (d,),
            "fc.mlp.gate_proj.weight": (i, d),
            "fc.mlp.up_proj.weight": (i, d),
            "fc.mlp.down_proj.weight": (d, i),
        }
    if config.get("qkv_bias"):
        for name in "qkv":
            shapes[f"{layer}self_attn.{name}_proj.bias"] = shapes[f"{layer}self_attn.{name}_proj.weight"][:1]
    if "embed_tokens.weight" in tensors:
        shapes["embed_tokens.weight"] = (config["vocab_size"], d)
    return shapes


def read_forward(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], embeddings: Tensor, features: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute p and r from the exported files, in float32, causally over the pairs.

    Args:
        embeddings: `(tokens, hidden)` of x_{t+1}.
        features: `(tokens, hidden)` f_t.

    Returns:
        p and r, both `(tokens, hidden)`.
    """
    files = Files(config, tensors)
    fc = "fc.fc." if config["feature_sampling"] else "fc."
    h = torch.cat([embeddings, features], -1) @ files.weights[f"{fc}weight"].T
    if config["fc_bias"]:
        h = h + files.weights[f"{fc}bias"]
    if config["feature_sampling"]:
        h = h + files.gated(embeddings, files.norm(h, "fc.post_attention_layernorm."), "fc.mlp.")
    a = h + files.attention(h, "layers.0.self_attn.")
    u = files.norm(a, "layers.0.post_attention_layernorm.")
    out = files.gated(u, u, "layers.0.mlp.")
    if not config["partial_alignment"]:
        return a + out, a + out
    d = config["hidden_size"]
    return a + out[:, :d], a + out[:, d:]
