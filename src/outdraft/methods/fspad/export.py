"""Exporting FSPAD's drafter and EAGLE's head for vLLM: names, shapes and config, and a check that reads the folder.

Tensor names are the official ones of FSPAD and EAGLE-1/2, so that the folder loads here and in the authors' code too.
The check computes from the files alone and shares no code with `FeatureHead`, with which it is compared.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

import outdraft
from outdraft.drafting.folder import CONFIG, WEIGHTS, shape_of, some
from outdraft.errors import UserError
from outdraft.methods.fspad import EAGLE, EAGLE_WITH_BIAS, FSPAD
from outdraft.methods.fspad.folder import load_drafter, official_name
from outdraft.methods.fspad.network import FeatureHead, FeatureHeadConfig
from outdraft.methods.registry import COMPARED_TOKENS, ExportTarget, Written

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""The target families with plain embedding and head, whose vLLM model gives features after the final norm."""


def export_head(
    source: str | Path, target: ExportTarget, folder: Path, engine: str, dtype: torch.dtype | None
) -> Written:
    """Write the drafter's folder for vLLM; arguments as in `Method.export`.

    Raises:
        UserError: vLLM would run another drafter than outdraft, or none.
    """
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
    stored = head.fusion.fc.weight.dtype
    config = {
        **engine_config(head.config, target.config, stored),
        "outdraft_export": {"version": outdraft.__version__, "method": head.method, "target": checkpoint.target_id},
    }
    tensors = {name: tensor.contiguous() for name, tensor in engine_tensors(head).items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    written, read = json.loads((folder / CONFIG).read_text(encoding="utf-8")), load_file(folder / WEIGHTS)
    check_tensors(written, read)
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
    """Raise UserError where vLLM would run another drafter than outdraft, or none.

    Args:
        config: the drafter's.
        target: the target's text config.
    """
    for name, what, instead in (
        ("tap_layers", "reads several layers of the target (tap_layers)", "without"),
        ("state_norm", "normalises what it reads (state_norm)", "without"),
        ("draft_vocab_size", "has a reduced vocabulary (draft_vocab_size)", "with draft_vocab_size=all"),
    ):
        if getattr(config, name):
            raise UserError(f"the drafter {what}, which vLLM cannot run; train one {instead}")
    if target.model_type not in FAMILIES:
        raise UserError(
            f"vLLM's EAGLE heads are right for targets of the families {', '.join(FAMILIES)}, not "
            f"'{target.model_type}'; serve this one with `outdraft serve`"
        )
    for name in ("hidden_size", "vocab_size"):
        own, others = getattr(config, name), getattr(target, name)
        if own != others:
            raise UserError(
                f"the drafter was trained for a target with {name} {own}, this one has {others}; choose its own target"
            )


def architecture(config: FeatureHeadConfig) -> str:
    """Return the name of the class that vLLM runs the drafter with."""
    if config.feature_sampling or config.partial_alignment:
        return FSPAD
    return EAGLE_WITH_BIAS if config.fc_bias else EAGLE


def engine_config(config: FeatureHeadConfig, target: Any, dtype: torch.dtype) -> dict[str, Any]:
    """Make the folder's config.json: a Llama config of one layer, and the drafter's switches.

    Args:
        config: the drafter's.
        target: the target's text config.
        dtype: precision of the tensors.
    """
    ends = {name: getattr(target, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    written: dict[str, Any] = {
        "architectures": [architecture(config)],
        "model_type": "llama",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "num_hidden_layers": 1,
        "vocab_size": config.vocab_size,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_theta": config.rope_theta, "rope_type": "default"},
        "max_position_embeddings": config.max_position_embeddings,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "dtype": str(dtype).removeprefix("torch."),
        "feature_sampling": config.feature_sampling,
        "partial_alignment": config.partial_alignment,
        "fc_bias": config.fc_bias,
        **ends,
    }
    if config.attention_bias:
        written["qkv_bias"] = True  # on query, key and value alone; vLLM's attention_bias is on the output as well
    if not config.fc_bias:
        # In the authors' code a config without `bias` means that fc has one; in vLLM's it would be the attention's.
        written["bias"] = False
    return written


def engine_tensors(head: FeatureHead) -> dict[str, Tensor]:
    """Return the drafter's tensors under their official names."""
    return {official_name(name, head.config): tensor for name, tensor in head.state_dict().items()}


def expected_shapes(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """List every tensor that the engine asks for, with its shape, from the folder's config alone.

    Args:
        config: the folder's.
        tensors: the folder's; an embedding is asked for only where there is one.
    """
    d, i, size = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    query, key = config["num_attention_heads"] * size, config["num_key_value_heads"] * size
    fc = "fc.fc." if config["feature_sampling"] else "fc."
    layer = "layers.0."
    shapes: dict[str, tuple[int, ...]] = {
        f"{fc}weight": (d, 2 * d),
        f"{layer}self_attn.q_proj.weight": (query, d),
        f"{layer}self_attn.k_proj.weight": (key, d),
        f"{layer}self_attn.v_proj.weight": (key, d),
        f"{layer}self_attn.o_proj.weight": (d, query),
        f"{layer}post_attention_layernorm.weight": (d,),
        f"{layer}mlp.gate_proj.weight": (i, d),
        f"{layer}mlp.up_proj.weight": (i, d),
        f"{layer}mlp.down_proj.weight": (2 * d if config["partial_alignment"] else d, i),
    }
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
        for name, width in (("q", query), ("k", key), ("v", key)):
            shapes[f"{layer}self_attn.{name}_proj.bias"] = (width,)
    if "embed_tokens.weight" in tensors:
        shapes["embed_tokens.weight"] = (config["vocab_size"], d)
    return shapes


def check_tensors(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Raise UserError unless these are exactly the tensors that the engine's loader asks for."""
    shapes = expected_shapes(config, tensors)
    if missing := [name for name in shapes if name not in tensors]:
        raise UserError(f"the drafter lacks {some(missing)}, which vLLM asks for; copy or train it again")
    if unknown := [name for name in tensors if name not in shapes]:
        raise UserError(f"the drafter holds {some(unknown)}, which vLLM has no place for; train one without")
    for name, shape in shapes.items():
        if tuple(tensors[name].shape) != shape:
            wanted = "x".join(map(str, shape))
            raise UserError(
                f"the drafter's {name} is {shape_of(tensors[name])} where vLLM asks for {wanted}; train it again"
            )
        if not torch.isfinite(tensors[name]).all():
            raise UserError(f"the drafter's {name} holds values that are no numbers; train it again")


def read_forward(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], embeddings: Tensor, features: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute p and r from the exported files, in float32, causally over the pairs.

    Args:
        config: the folder's.
        tensors: the folder's.
        embeddings: `(tokens, hidden)` of x_{t+1}.
        features: `(tokens, hidden)` f_t.

    Returns:
        p and r, both `(tokens, hidden)`.
    """
    w = {name: tensor.float() for name, tensor in tensors.items()}
    eps, size = config["rms_norm_eps"], config["head_dim"]

    def norm(x: Tensor, name: str) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * w[name]

    def gated(gate: Tensor, up: Tensor, at: str) -> Tensor:
        inner = F.silu(gate @ w[f"{at}gate_proj.weight"].T) * (up @ w[f"{at}up_proj.weight"].T)
        return inner @ w[f"{at}down_proj.weight"].T

    fc = "fc.fc." if config["feature_sampling"] else "fc."
    h = torch.cat([embeddings, features], -1) @ w[f"{fc}weight"].T
    if config["fc_bias"]:
        h = h + w[f"{fc}bias"]
    if config["feature_sampling"]:
        h = h + gated(embeddings, norm(h, "fc.post_attention_layernorm.weight"), "fc.mlp.")

    def projected(name: str, heads: int) -> Tensor:
        at = f"layers.0.self_attn.{name}_proj."
        out = h @ w[f"{at}weight"].T + w.get(f"{at}bias", torch.zeros(()))
        return out.view(len(h), heads, size)

    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    places = torch.arange(len(h), dtype=torch.float64)[:, None]
    rates = config["rope_parameters"]["rope_theta"] ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    turn = torch.polar(torch.ones((), dtype=torch.float64), places * rates).to(torch.complex64)[:, None]

    def turned(x: Tensor) -> Tensor:
        pairs = torch.complex(x[..., : size // 2], x[..., size // 2 :]) * turn
        return torch.cat([pairs.real, pairs.imag], -1)

    q = turned(projected("q", heads))
    k = turned(projected("k", kv_heads)).repeat_interleave(heads // kv_heads, 1)
    v = projected("v", kv_heads).repeat_interleave(heads // kv_heads, 1)
    scores = torch.einsum("qhd,khd->hqk", q, k) / size**0.5
    later = torch.ones(len(h), len(h), dtype=torch.bool).triu(1)
    dist = scores.masked_fill(later, -torch.inf).softmax(-1)
    read = torch.einsum("hqk,khd->qhd", dist, v).reshape(len(h), heads * size)
    a = h + read @ w["layers.0.self_attn.o_proj.weight"].T
    u = norm(a, "layers.0.post_attention_layernorm.weight")
    out = gated(u, u, "layers.0.mlp.")
    if not config["partial_alignment"]:
        return a + out, a + out
    d = config["hidden_size"]
    return a + out[:, :d], a + out[:, d:]
