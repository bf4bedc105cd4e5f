"""Exporting a trained EAGLE-3 head for vLLM's method `eagle3`: official names, and a check that reads the folder.

vLLM counts layers by their inputs and reads them in rising order, whatever the order in the config. The target's
embedding is shared; the output layer, the offsets `d2t` and the bitmap `t2d` are the drafter's.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from outdraft.errors import UserError
from outdraft.methods.eagle3.folder import TAP_IDS, load_eagle3, official_name
from outdraft.methods.eagle3.network import Eagle3Config, Eagle3Head
from outdraft.methods.registry import COMPARED_TOKENS, ExportTarget, Written
from outdraft.methods.vllm_folder import Files, layer_shapes, llama_config, refuse_target, written_and_read

ARCHITECTURE = "LlamaForCausalLMEagle3"
LAYER = "midlayer."


def export_eagle3(
    source: str | Path, target: ExportTarget, folder: Path, engine: str, dtype: torch.dtype | None
) -> Written:
    """Write the drafter's folder for vLLM; arguments as in `Method.export`."""
    if engine == "hf":
        raise UserError("transformers' assistant_model takes whole language models, no EAGLE-3 head; use --engine vllm")
    checkpoint = load_eagle3(source)
    head = checkpoint.network
    if checkpoint.layout != "outdraft":
        raise UserError(f"'{source}' is an EAGLE-3 folder already, which engines read as it is (vLLM: method eagle3)")
    taps = head.config.taps(target.config.num_hidden_layers)
    _refuse_unexportable(head.config, taps)
    refuse_target(head.config, target.config)
    if dtype is not None:
        head.to(dtype)
    config = engine_config(head.config, target.config, taps, head.fc.weight.dtype)
    written, read = written_and_read(folder, checkpoint, config, _tensors(head), _shapes)
    return Written(head.method, ARCHITECTURE, _both(head, written, read), "eagle3", False)


def _refuse_unexportable(config: Eagle3Config, taps: tuple[int, ...]) -> None:
    for name, what in (
        ("fc_bias", "a bias in its fusion layer"),
        ("attention_bias", "biases in its attention"),
        ("head_norms", "norms on its query and key heads"),
    ):
        if getattr(config, name):
            raise UserError(f"the drafter has {what} ({name}), which vLLM cannot run; train one without")
    if list(taps) != sorted(set(taps)):
        raise UserError(
            f"the drafter reads layers {list(taps)}, vLLM only layers in rising order; train one with these"
        )


def engine_config(config: Eagle3Config, target: Any, taps: tuple[int, ...], dtype: torch.dtype) -> dict[str, Any]:
    """Make the folder's config.json: a Llama config of one layer, the layers to read and the drafter's switches."""
    return {
        **llama_config(config, target, dtype, ARCHITECTURE, config.rope),
        "draft_vocab_size": config.draft_vocab_size or config.vocab_size,
        "target_hidden_size": config.target_hidden_size,
        TAP_IDS: list(taps),
        "num_aux_hidden_states": len(taps),
        "fc_norm": config.tap_norms,
        "norm_before_fc": config.norm_before_fc,
        "norm_before_residual": config.norm_before_residual,
        "norm_output": config.norm_output,
    }


def _tensors(head: Eagle3Head) -> dict[str, Tensor]:
    """Return the drafter's tensors under their official names, its draft vocabulary as offsets and bitmap."""
    state = head.state_dict()
    ids = state.pop("draft_tokens", None)
    named = {official_name(name, LAYER): tensor for name, tensor in state.items()}
    if ids is None:
        return named
    bitmap = torch.zeros(head.config.vocab_size, dtype=torch.bool)
    bitmap[ids] = True
    return {**named, "d2t": ids - torch.arange(len(ids)), "t2d": bitmap}


def _shapes(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """List the tensors that vLLM's loader asks for, from the folder's config alone; an embedding where there is one."""
    d, taps, width = config["hidden_size"], config["num_aux_hidden_states"], config["target_hidden_size"]
    kept, vocab = config["draft_vocab_size"], config["vocab_size"]
    shapes = {
        "fc.weight": (d, taps * width),
        **layer_shapes(config, LAYER, 2 * d),
        f"{LAYER}input_layernorm.weight": (d,),
        f"{LAYER}hidden_norm.weight": (d,),
        "norm.weight": (d,),
        "lm_head.weight": (kept, d),
    }
    if config["fc_norm"]:
        shapes |= {f"fc_norm.{tap}.weight": (width,) for tap in range(taps)}
    if config["norm_before_fc"]:
        shapes["input_norm.weight"] = (taps * width,)
    if kept != vocab:
        shapes |= {"d2t": (kept,), "t2d": (vocab,)}
    if "embed_tokens.weight" in tensors:
        shapes["embed_tokens.weight"] = (vocab, d)
    return shapes


@torch.inference_mode()
def _both(head: Eagle3Head, config: dict[str, Any], tensors: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Run the drafter's own forward and the written files' on random inputs, and compare the drafted tokens' ids."""
    head = head.float()
    noise, taps, width = torch.Generator().manual_seed(0), head.config.num_taps, head.config.target_hidden_size
    tokens = min(COMPARED_TOKENS, head.config.max_position_embeddings)
    embeddings = torch.randn(tokens, head.config.hidden_size, generator=noise)
    features = torch.randn(tokens, (1 + taps) * width, generator=noise)
    normed, fed_back = (out[0] for out in head(embeddings[None], features[None]))
    files = Files(config, tensors, head.frequencies())
    parts = list(features[:, width:].split(width, dim=-1))
    if config["fc_norm"]:
        parts = [files.norm(part, f"fc_norm.{tap}.") for tap, part in enumerate(parts)]
    read = torch.cat(parts, dim=-1)
    if config["norm_before_fc"]:
        read = files.norm(read, "input_norm.")
    g = read @ files.weights["fc.weight"].T
    state = files.norm(g, f"{LAYER}hidden_norm.")
    x = torch.cat([files.norm(embeddings, f"{LAYER}input_layernorm."), state], dim=-1)
    a = (state if config["norm_before_residual"] else g) + files.attention(x, f"{LAYER}self_attn.")
    u = files.norm(a, f"{LAYER}post_attention_layernorm.")
    out = a + files.gated(u, u, f"{LAYER}mlp.")
    theirs = files.norm(out, "norm.")
    assert head.lm_head is not None
    pairs = [(fed_back, theirs if config["norm_output"] else out)]
    pairs.append((head.lm_head(normed), theirs @ files.weights["lm_head.weight"].T))
    if head.draft_tokens is not None:
        pairs.append((head.draft_tokens.float(), files.weights["d2t"] + torch.arange(len(head.draft_tokens))))
    return pairs
