"""DFlash's and DSpark's drafters once more, in float64 numpy on plain dictionaries of tensors under their published
names, and folders with such tensors in each of the layouts that people publish.

Written from the papers' equations and the layouts' own descriptions, apart from the library: no cache, no batch, no
masks as tensors. Every block is computed from its whole context. Tests compare the library with it.
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

KEPT = (1, 2, 3, 5, 8, 13, 14, 15, 21, 22, 27, 30)
"""Tokens that may be drafted."""

LAYOUTS = ("z-lab", "speculators", "deepspec")


@dataclass
class BlockShape:
    """A drafter, in the words of its config.json where there are any."""

    hidden_size: int = 32
    target_hidden_size: int = 32
    intermediate_size: int = 24
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 6
    vocab_size: int = 32
    rms_norm_eps: float = 1e-5
    rope_theta: float = 500.0
    max_position_embeddings: int = 64
    taps: int = 3
    block_size: int = 4
    mask_token_id: int = 29
    anchor_first: bool = False
    causal: bool | None = None
    sliding: tuple[int, ...] = ()
    """Layers with a window of 4."""
    kept: tuple[int, ...] | None = None
    embedding: bool = False
    head: bool = False
    markov_rank: int = 0
    head_norms: bool = True
    attention_bias: bool = False
    input_embedding_scale: float | None = None
    output_multiplier: float | None = None
    final_logit_softcapping: float | None = None


WINDOW = 4


def block_tensors(shape: BlockShape) -> dict[str, Array]:
    """Weights by formula, the same everywhere, named as in published folders."""
    d, i, size = shape.hidden_size, shape.intermediate_size, shape.head_dim
    q, k = shape.num_attention_heads * size, shape.num_key_value_heads * size
    sizes: dict[str, tuple[int, ...]] = {"fc.weight": (d, shape.taps * shape.target_hidden_size)}
    sizes |= {"hidden_norm.weight": (d,), "norm.weight": (d,)}
    for layer in range(shape.num_hidden_layers):
        attention, mlp = f"layers.{layer}.self_attn.", f"layers.{layer}.mlp."
        for name, rows in (("q", q), ("k", k), ("v", k)):
            sizes[f"{attention}{name}_proj.weight"] = (rows, d)
            if shape.attention_bias:
                sizes[f"{attention}{name}_proj.bias"] = (rows,)
        sizes[f"{attention}o_proj.weight"] = (d, q)
        if shape.head_norms:
            sizes |= {f"{attention}{name}_norm.weight": (size,) for name in "qk"}
        sizes |= {f"{mlp}gate_proj.weight": (i, d), f"{mlp}up_proj.weight": (i, d), f"{mlp}down_proj.weight": (d, i)}
        sizes |= {f"layers.{layer}.{name}_layernorm.weight": (d,) for name in ("input", "post_attention")}
    drafted = shape.vocab_size if shape.kept is None else len(shape.kept)
    if shape.embedding:
        sizes["embed_tokens.weight"] = (shape.vocab_size, d)
    if shape.head:
        sizes["lm_head.weight"] = (drafted, d)
    if shape.markov_rank:
        sizes["markov_head.markov_w1.weight"] = (shape.vocab_size, shape.markov_rank)
        sizes["markov_head.markov_w2.weight"] = (drafted, shape.markov_rank)
    return {
        name: numbers(size, phase, "norm" in name) * (1 if "norm" in name else 0.4)
        for phase, (name, size) in enumerate(sizes.items())
    }


def block_states(w: dict[str, Array], shape: BlockShape, embeddings: Array, taps: list[Array]) -> Array:
    """Normed states `(B, d)` of a block, of its embeddings and what the target's layers gave at all tokens before."""
    eps, size, n, b = shape.rms_norm_eps, shape.head_dim, len(taps[0]), len(embeddings)
    context = rms_norm(np.concatenate(taps, -1) @ w["fc.weight"].T, w["hidden_norm.weight"], eps)
    x, group = embeddings, shape.num_attention_heads // shape.num_key_value_heads
    for layer in range(shape.num_hidden_layers):
        name, slides = f"layers.{layer}.", layer in shape.sliding
        causal = slides if shape.causal is None else shape.causal
        rows = np.concatenate([context, rms_norm(x, w[name + "input_layernorm.weight"], eps)])

        def project(part: str, rows: Array = rows, name: str = name) -> Array:
            part = f"{name}self_attn.{part}"
            heads = (rows @ w[part + "_proj.weight"].T + w.get(part + "_proj.bias", 0)).reshape(n + b, -1, size)
            return rms_norm(heads, w[part + "_norm.weight"], eps) if part + "_norm.weight" in w else heads

        q, k, v = rope(project("q"), shape.rope_theta), rope(project("k"), shape.rope_theta), project("v")
        mixed = np.zeros((b, shape.num_attention_heads, size))
        for row in range(b):
            seen = [t for t in range(n + b) if not (causal and t > n + row) and not (slides and n + row - t >= WINDOW)]
            for head in range(shape.num_attention_heads):
                scores = k[seen, head // group] @ q[n + row, head] / np.sqrt(size)
                weights = np.exp(scores - scores.max())
                mixed[row, head] = weights / weights.sum() @ v[seen, head // group]
        x = x + mixed.reshape(b, -1) @ w[name + "self_attn.o_proj.weight"].T
        u = rms_norm(x, w[name + "post_attention_layernorm.weight"], eps)
        inner = silu(u @ w[name + "mlp.gate_proj.weight"].T) * (u @ w[name + "mlp.up_proj.weight"].T)
        x = x + inner @ w[name + "mlp.down_proj.weight"].T
    return rms_norm(x, w["norm.weight"], eps)


class NaiveDFlash(NaiveDrafting):
    """The drafting of one sequence.

    Args:
        w, shape: the drafter.
        embedding, head: `(vocab, d)` of the target, used where the drafter has none.
        anchor: the newest token.
        taps: what the target's layers give at all tokens before it.
    """

    def __init__(
        self, w: dict[str, Array], shape: BlockShape, embedding: Array, head: Array, anchor: int, taps: list[Array]
    ):
        self.weights, self.form, self.tokens = w, shape, [anchor]
        table = w.get("embed_tokens.weight", embedding) * (shape.input_embedding_scale or 1)
        block = table[[anchor] + [shape.mask_token_id] * (shape.block_size - 1)]
        states = block_states(w, shape, block, taps)
        output = w.get("lm_head.weight", head if shape.kept is None else head[list(shape.kept)])
        logits = states[0 if shape.anchor_first else 1 :] @ output.T
        logits = logits * (shape.output_multiplier or 1)
        cap = shape.final_logit_softcapping
        self.levels: Array = np.tanh(logits / cap) * cap if cap else logits
        """`(proposals, vocab)`, before the Markov head."""

    def law(self, path: tuple[int, ...]) -> Array:
        """Log-probabilities of the token after the path, those of the target's whole vocabulary."""
        own = self.levels[len(path)]
        if self.form.markov_rank:
            before = self.weights["markov_head.markov_w1.weight"][path[-1] if path else self.tokens[-1]]
            own = own + self.weights["markov_head.markov_w2.weight"] @ before
        own = own - own.max()
        own = own - np.log(np.exp(own).sum())
        if self.form.kept is None:
            return own
        law = np.full(self.form.vocab_size, -np.inf)
        law[list(self.form.kept)] = own
        return law


# --- folders -----------------------------------------------------------------------------------------------------


def block_folder(folder: Path, layout: str, shape: BlockShape, taps: tuple[int, ...] | None, **more: Any) -> Path:
    """A folder as people publish it.

    Args:
        folder: is made.
        layout: one of `LAYOUTS`.
        shape: of the drafter.
        taps: layers of the target whose outputs are read, counted from 1, which every layout names otherwise; None
            names none.
        **more: keys of config.json, or of `dflash_config` where that is the layout's; None takes one away.
    """
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    names = (*names, "head_dim", "vocab_size", "rms_norm_eps", "rope_theta", "max_position_embeddings")
    layer: dict[str, Any] = {name: getattr(shape, name) for name in names} | {"model_type": "qwen3"}
    if shape.sliding:
        kinds = ("full_attention", "sliding_attention")
        layer["layer_types"] = [kinds[place in shape.sliding] for place in range(shape.num_hidden_layers)]
        layer["sliding_window"] = WINDOW
    kind = "dspark" if shape.markov_rank else "dflash"
    further = {"mask_token_id": shape.mask_token_id, "block_size": shape.block_size}
    scales = ("input_embedding_scale", "output_multiplier", "final_logit_softcapping")
    further |= {name: value for name in scales if (value := getattr(shape, name)) is not None}
    if shape.causal is not None:
        further["causal_head"] = shape.causal
    if shape.target_hidden_size != shape.hidden_size:
        further["target_hidden_size"] = shape.target_hidden_size
    if shape.markov_rank:
        further |= {"markov_rank": shape.markov_rank, "markov_head_type": "vanilla"}
    if taps is not None and layout != "speculators":
        further["target_layer_ids"] = [tap - 1 for tap in taps]
    tensors = {name: torch.tensor(value) for name, value in block_tensors(shape).items()}
    if shape.kept is not None:
        kept = torch.tensor(shape.kept)
        tensors["d2t"] = kept - torch.arange(len(kept))
        tensors["t2d"] = torch.zeros(shape.vocab_size, dtype=torch.bool).index_fill_(0, kept, True)
        further["draft_vocab_size"] = len(shape.kept)
    if layout == "speculators":
        verifier = {"name_or_path": "someone/target", "architectures": ["LlamaForCausalLM"]}
        config = {"speculators_model_type": kind, "transformer_layer_config": layer, **further}
        config |= {"sample_from_anchor": shape.anchor_first, "speculators_config": {"verifier": verifier}}
        config |= {"aux_hidden_state_layer_ids": None if taps is None else list(taps)}
        config |= more
    elif layout == "deepspec":
        named = "Qwen3DSparkModel" if shape.markov_rank else "Qwen3DFlashModel"
        config = {**layer, **further, "architectures": [named], "num_anchors": 512, **more}
        config |= {"enable_confidence_head": bool(shape.markov_rank)}
        if shape.markov_rank:
            tensors["confidence_head.proj.weight"] = torch.ones(1, shape.hidden_size + shape.markov_rank)
    else:
        top = {name: further.pop(name) for name in ("block_size", "draft_vocab_size") if name in further}
        config = {**layer, **top, "architectures": ["DFlashDraftModel"], "num_target_layers": 8}
        inner = {**further, **{name: value for name, value in more.items() if name not in config}}
        config |= {name: value for name, value in more.items() if name in config}
        config["dflash_config"] = {name: value for name, value in inner.items() if value is not None}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    save_file(tensors, folder / "model.safetensors")
    return folder
