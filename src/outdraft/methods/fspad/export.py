"""Exporting FSPAD's drafter and EAGLE's head for vLLM: names, shapes and config, and a check that reads the folder.

Tensor names are the official ones of FSPAD and EAGLE-1/2, so that the folder loads here and in the authors' code too.
The check computes from the files alone and shares no code with `FeatureHead`, with which it is compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from outdraft.errors import UserError
from outdraft.methods.fspad import EAGLE, EAGLE_WITH_BIAS, FSPAD
from outdraft.methods.fspad.folder import load_drafter, official_name
from outdraft.methods.fspad.network import FeatureHead, FeatureHeadConfig
from outdraft.methods.registry import COMPARED_TOKENS, ExportTarget, Written
from outdraft.methods.vllm_folder import Files, layer_shapes, llama_config, refuse_target, written_and_read


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
