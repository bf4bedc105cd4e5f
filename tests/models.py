"""Tiny random models of every family the tests speak of, in float64 unless told otherwise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

CONTEXT = 64
VOCAB = 32

_LLAMA_LIKE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.25,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_GPT_LIKE: dict[str, Any] = {
    name: _LLAMA_LIKE[name]
    for name in ("vocab_size", "initializer_range", "bos_token_id", "eos_token_id", "pad_token_id")
}
_FOUR_LAYERS: dict[str, Any] = {"num_hidden_layers": 4, "sliding_window": 6}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama-gqa": {**_LLAMA_LIKE, "model_type": "llama"},
    "llama-mha": {**_LLAMA_LIKE, "model_type": "llama", "num_key_value_heads": 4},
    "llama-tied": {**_LLAMA_LIKE, "model_type": "llama", "tie_word_embeddings": True},
    "qwen2": {**_LLAMA_LIKE, "model_type": "qwen2"},
    "qwen3": {**_LLAMA_LIKE, "model_type": "qwen3"},
    "mistral": {**_LLAMA_LIKE, "model_type": "mistral", "sliding_window": None},
    "mistral-sliding": {**_LLAMA_LIKE, "model_type": "mistral", "sliding_window": 6},
    "qwen2-sliding": {
        **_LLAMA_LIKE,
        **_FOUR_LAYERS,
        "model_type": "qwen2",
        "use_sliding_window": True,
        "max_window_layers": 2,
    },
    "gemma": {**_LLAMA_LIKE, "model_type": "gemma"},
    "gemma2": {
        **_LLAMA_LIKE,
        **_FOUR_LAYERS,
        "model_type": "gemma2",
        "query_pre_attn_scalar": 8,
        "final_logit_softcapping": 2.0,
        "attn_logit_softcapping": 5.0,
    },
    "gemma3": {
        **_LLAMA_LIKE,
        **_FOUR_LAYERS,
        "model_type": "gemma3_text",
        "layer_types": ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"],
        "query_pre_attn_scalar": 8,
    },
    "phi3": {**_LLAMA_LIKE, "model_type": "phi3"},
    "gpt-neox": {
        **_GPT_LIKE,
        "model_type": "gpt_neox",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": CONTEXT,
    },
    "gpt2": {**_GPT_LIKE, "model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT},
    "gpt-neo": {
        **_GPT_LIKE,
        "model_type": "gpt_neo",
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "window_size": CONTEXT,
        "max_position_embeddings": CONTEXT,
    },
}

_GPT_LAYERS: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_EXPERTS: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}

FURTHER: dict[str, dict[str, Any]] = {
    "mixtral": {**_LLAMA_LIKE, **_EXPERTS, "model_type": "mixtral"},
    "gpt-oss": {**_LLAMA_LIKE, **_FOUR_LAYERS, **_EXPERTS, "model_type": "gpt_oss"},
    "deepseek": {
        **_LLAMA_LIKE,
        "head_dim": 4,
        "num_key_value_heads": 4,
        "model_type": "deepseek_v3",
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 8,
        "first_k_dense_replace": 2,
    },
    "opt": {**_GPT_LIKE, **_GPT_LAYERS, "model_type": "opt", "ffn_dim": 48, "word_embed_proj_dim": 32},
    "falcon": {**_GPT_LIKE, **_GPT_LAYERS, "model_type": "falcon", "alibi": False},
    "granite": {**_LLAMA_LIKE, "model_type": "granite", "logits_scaling": 3.0},
    "cohere": {**_LLAMA_LIKE, "model_type": "cohere"},
    "nemotron": {**_LLAMA_LIKE, "model_type": "nemotron"},
    "glm4-moe": {
        **_LLAMA_LIKE,
        "model_type": "glm4_moe",
        "first_k_dense_replace": 2,
        "n_routed_experts": 4,
        "moe_intermediate_size": 16,
    },
}
"""Mixtures of experts, keys wider than values, scaled logits, heads of which half is rotated: a glance at each, in
float32 where a kernel wants it."""


def tiny(
    family: str, seed: int = 0, dtype: torch.dtype = torch.float64, attention: str | None = None, **changes: Any
) -> PreTrainedModel:
    """A random model of a family named above, its biases and norms random too, in evaluation mode."""
    settings = {**(FAMILIES | FURTHER)[family], **changes}
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, **with_attention(attention)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    for name in ("eos_token_id", "bos_token_id", "pad_token_id"):
        setattr(model.generation_config, name, None)
    return model


def with_attention(attention: str | None) -> dict[str, str]:
    return {} if attention is None else {"attn_implementation": attention}


def perturbed(model: PreTrainedModel, build: Callable[[], PreTrainedModel], amount: float) -> PreTrainedModel:
    """A copy of `model` in a fresh one from `build`, every weight a little off: a draft model that is often right."""
    copy = build()
    copy.load_state_dict(model.state_dict())
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in copy.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.add_(amount * parameter.std(correction=0) * noise)
    return copy
