"""EAGLE-3's drafter once more, in float64 numpy on plain dictionaries of tensors under their official names, and
folders with such tensors in each of the layouts that people publish.

Written from the paper's equations and the layouts' own descriptions, apart from the library: no cache, no batch, no
masks. Every position is computed from its whole prefix. Tests compare the library with it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from drafter_reference import Array, NaiveDrafting, numbers, rms_norm, rope, silu
from safetensors.torch import save_file

KEPT = [1, 2, 3, 5, 8, 13, 14, 15, 21, 22, 27, 30]
"""Tokens that may be drafted."""


@dataclass
class Eagle3Shape:
    """What such a folder's config.json says, in its own words."""

    hidden_size: int = 32
    target_hidden_size: int = 32
    intermediate_size: int = 24
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 6
    vocab_size: int = 32
    rms_norm_eps: float = 1e-5
    rope_theta: float = 500.0
    max_position_embeddings: int = 64
    taps: int = 3
    kept: tuple[int, ...] | None = tuple(KEPT)
    fc_norm: bool = False
    norm_before_fc: bool = False
    norm_before_residual: bool = False
    norm_output: bool = False
    head_norms: bool = False
    attention_bias: bool = False
    embedding: bool = False


def eagle3_tensors(shape: Eagle3Shape) -> dict[str, Array]:
    """Weights by formula, the same everywhere, named as in the authors' folders."""
    d, i, size = shape.hidden_size, shape.intermediate_size, shape.head_dim
    q, k, width = shape.num_attention_heads * size, shape.num_key_value_heads * size, shape.target_hidden_size
    attention = "midlayer.self_attn."
    sizes: dict[str, tuple[int, ...]] = {"fc.weight": (d, shape.taps * width)}
    if shape.fc_norm:
        sizes |= {f"fc_norm.{tap}.weight": (width,) for tap in range(shape.taps)}
    if shape.norm_before_fc:
        sizes["input_norm.weight"] = (shape.taps * width,)
    for name, rows in (("q", q), ("k", k), ("v", k)):
        sizes[f"{attention}{name}_proj.weight"] = (rows, 2 * d)
        if shape.attention_bias:
            sizes[f"{attention}{name}_proj.bias"] = (rows,)
    sizes[f"{attention}o_proj.weight"] = (d, q)
    if shape.head_norms:
        sizes |= {f"{attention}{name}_norm.weight": (size,) for name in "qk"}
    sizes |= {f"midlayer.mlp.{name}_proj.weight": (i, d) for name in ("gate", "up")}
    sizes["midlayer.mlp.down_proj.weight"] = (d, i)
    for name in ("midlayer.input_layernorm", "midlayer.hidden_norm", "midlayer.post_attention_layernorm", "norm"):
        sizes[f"{name}.weight"] = (d,)
    sizes["lm_head.weight"] = (shape.vocab_size if shape.kept is None else len(shape.kept), d)
    if shape.embedding:
        sizes["embed_tokens.weight"] = (shape.vocab_size, d)
    return {
        name: numbers(size, phase, "norm" in name) * (1 if "norm" in name else 0.4)
        for phase, (name, size) in enumerate(sizes.items())
    }


def fused(w: dict[str, Array], shape: Eagle3Shape, taps: list[Array]) -> Array:
    """g `(positions, d)` of the taps, each `(positions, target width)`."""
    if shape.fc_norm:
        taps = [rms_norm(tap, w[f"fc_norm.{i}.weight"], shape.rms_norm_eps) for i, tap in enumerate(taps)]
    both = np.concatenate(taps, -1)
    if shape.norm_before_fc:
        both = rms_norm(both, w["input_norm.weight"], shape.rms_norm_eps)
    g: Array = both @ w["fc.weight"].T
    return g


def eagle3_outputs(w: dict[str, Array], shape: Eagle3Shape, embeddings: Array, g: Array) -> tuple[Array, Array]:
    """Draft logits and what is fed back, of pairs at positions 0, 1, ..."""
    n, dim, eps = len(embeddings), shape.head_dim, shape.rms_norm_eps
    e = rms_norm(embeddings, w["midlayer.input_layernorm.weight"], eps)
    h = rms_norm(g, w["midlayer.hidden_norm.weight"], eps)
    x = np.concatenate([e, h], -1)

    def project(name: str) -> Array:
        out = x @ w[f"midlayer.self_attn.{name}_proj.weight"].T + w.get(f"midlayer.self_attn.{name}_proj.bias", 0)
        heads = out.reshape(n, -1, dim)
        norm = w.get(f"midlayer.self_attn.{name}_norm.weight")
        return heads if norm is None else rms_norm(heads, norm, eps)

    q, k, v = rope(project("q"), shape.rope_theta), rope(project("k"), shape.rope_theta), project("v")
    group = shape.num_attention_heads // shape.num_key_value_heads
    mixed = np.zeros((n, shape.num_attention_heads, dim))
    for t in range(n):
        for head in range(shape.num_attention_heads):
            scores = k[: t + 1, head // group] @ q[t, head] / np.sqrt(dim)
            weights = np.exp(scores - scores.max())
            mixed[t, head] = weights / weights.sum() @ v[: t + 1, head // group]
    residual = h if shape.norm_before_residual else g
    a = residual + mixed.reshape(n, -1) @ w["midlayer.self_attn.o_proj.weight"].T
    u = rms_norm(a, w["midlayer.post_attention_layernorm.weight"], eps)
    inner = silu(u @ w["midlayer.mlp.gate_proj.weight"].T) * (u @ w["midlayer.mlp.up_proj.weight"].T)
    out = a + inner @ w["midlayer.mlp.down_proj.weight"].T
    normed = rms_norm(out, w["norm.weight"], eps)
    return normed @ w["lm_head.weight"].T, normed if shape.norm_output else out


class NaiveEagle3(NaiveDrafting):
    """EAGLE-3's drafting of one sequence, every node computed again from its whole prefix.

    Args:
        w, shape: the drafter.
        embedding: `(vocab, d)`.
        tokens: decided ones, the first left out.
        taps: what the target's layers give at all decided tokens but the last.
    """

    def __init__(self, w: dict[str, Array], shape: Eagle3Shape, embedding: Array, tokens: list[int], taps: list[Array]):
        self.weights, self.form, self.embedding = w, shape, embedding
        self.tokens, self.features = list(tokens), list(fused(w, shape, taps))

    def law(self, path: tuple[int, ...]) -> Array:
        """Log-probabilities of the token after the path, those of the target's whole vocabulary."""
        tokens, states = list(self.tokens), list(self.features)
        for k in range(len(path) + 1):
            logits, fed_back = eagle3_outputs(self.weights, self.form, self.embedding[tokens], np.array(states))
            if k < len(path):
                tokens.append(path[k])
                states.append(fed_back[-1])
        own = logits[-1] - logits[-1].max()
        own = own - np.log(np.exp(own).sum())
        if self.form.kept is None:
            return own
        law = np.full(self.form.vocab_size, -np.inf)
        law[list(self.form.kept)] = own
        return law


# --- folders -----------------------------------------------------------------------------------------------------

LAYOUTS = ("eagle3", "specforge", "angelslim", "speculators")


def eagle3_folder(
    folder: Path, layout: str, shape: Eagle3Shape, taps: tuple[int, ...] | None = None, **more: Any
) -> Path:
    """A folder as people publish it.

    Args:
        folder: is made.
        layout: one of `LAYOUTS`.
        shape: of the drafter.
        taps: layers of the target whose outputs are read, counted from 1, which every layout names otherwise; the
            authors' names none.
        **more: keys of config.json; None takes one away.
    """
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size")
    names = (*names, "rms_norm_eps", "rope_theta", "max_position_embeddings")
    layer = {name: getattr(shape, name) for name in names}
    layer |= {"model_type": "qwen3" if shape.head_norms else "llama", "num_hidden_layers": 1, "hidden_act": "silu"}
    flags = {name: True for name in ("fc_norm", "norm_before_fc", "norm_output") if getattr(shape, name)}
    config: dict[str, Any] = {"draft_vocab_size": shape.vocab_size if shape.kept is None else len(shape.kept)}
    if shape.hidden_size != shape.target_hidden_size:
        config["target_hidden_size"] = shape.target_hidden_size
    tensors = {name: torch.tensor(value) for name, value in eagle3_tensors(shape).items()}
    if shape.kept is not None:
        kept = torch.tensor(shape.kept)
        tensors["d2t"] = kept - torch.arange(len(kept))
        tensors["t2d"] = torch.zeros(shape.vocab_size, dtype=torch.bool).index_fill_(0, kept, True)
    if layout == "speculators":
        tensors = {name.replace("midlayer.", "layers.0."): tensor for name, tensor in tensors.items()}
        every = ("norm_before_residual", "norm_before_fc", "norm_output")
        verifier = {"name_or_path": "someone/target", "architectures": ["LlamaForCausalLM"]}
        config |= {"speculators_model_type": "eagle3", "architectures": ["Eagle3Speculator"]}
        config |= {"transformer_layer_config": layer, **{name: getattr(shape, name) for name in every}, **flags}
        config |= {"speculators_config": {"algorithm": "eagle3", "verifier": verifier}}
        config |= {"eagle_aux_hidden_state_layer_ids": list(taps) if taps else None}
    else:
        classes = {"specforge": "LlamaForCausalLMEagle3", "angelslim": "Eagle3LlamaForCausalLM"}
        config |= {**layer, **flags, "architectures": [classes.get(layout, "LlamaForCausalLM")]}
        if shape.norm_before_residual:
            config["norm_before_residual"] = True
        if layout == "angelslim":
            config["target_model_type"] = "llama"
        if layout != "eagle3" and taps:
            ids = [tap - 1 for tap in taps]
            config["eagle_config"] = {"eagle_aux_hidden_state_layer_ids": ids, "use_aux_hidden_state": True}
    config = {name: value for name, value in (config | more).items() if value is not None}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    if layout == "eagle3":
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        save_file(tensors, folder / "model.safetensors")
    return folder
