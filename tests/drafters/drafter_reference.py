"""The drafter's equations once more, in float64 numpy on plain dictionaries of tensors under their official names.

Written from the papers' equations, apart from the library: no cache, no batch, no masks. Every position is computed
from its whole prefix. Tests compare the library with it.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass
class Shape:
    """What an official config.json says."""

    hidden_size: int = 8
    intermediate_size: int = 12
    num_attention_heads: int = 2
    num_key_value_heads: int = 2
    head_dim: int = 4
    vocab_size: int = 11
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    max_position_embeddings: int = 256


def official_tensors(
    shape: Shape,
    feature_sampling: bool = True,
    partial_alignment: bool = True,
    fc_bias: bool = True,
    attention_bias: bool = False,
    embedding: bool = False,
) -> dict[str, Array]:
    """Weights by formula, the same everywhere, named as in official folders."""
    d, i, heads, kv = shape.hidden_size, shape.intermediate_size, shape.num_attention_heads, shape.num_key_value_heads
    q, k = heads * shape.head_dim, kv * shape.head_dim
    fc = "fc.fc" if feature_sampling else "fc"
    sizes: dict[str, tuple[int, ...]] = {f"{fc}.weight": (d, 2 * d)}
    if fc_bias:
        sizes[f"{fc}.bias"] = (d,)
    if feature_sampling:
        sizes |= {"fc.post_attention_layernorm.weight": (d,), "fc.mlp.gate_proj.weight": (i, d)}
        sizes |= {"fc.mlp.up_proj.weight": (i, d), "fc.mlp.down_proj.weight": (d, i)}
    for name, rows in (("q", q), ("k", k), ("v", k)):
        sizes[f"layers.0.self_attn.{name}_proj.weight"] = (rows, d)
        if attention_bias:
            sizes[f"layers.0.self_attn.{name}_proj.bias"] = (rows,)
    sizes["layers.0.self_attn.o_proj.weight"] = (d, q)
    sizes |= {"layers.0.mlp.gate_proj.weight": (i, d), "layers.0.mlp.up_proj.weight": (i, d)}
    sizes["layers.0.mlp.down_proj.weight"] = (2 * d if partial_alignment else d, i)
    sizes["layers.0.post_attention_layernorm.weight"] = (d,)
    if embedding:
        sizes["embed_tokens.weight"] = (shape.vocab_size, d)
    return {name: numbers(size, phase, "layernorm" in name) for phase, (name, size) in enumerate(sizes.items())}


def numbers(size: tuple[int, ...], phase: int, around_one: bool = False) -> Array:
    """Numbers without pattern for a matrix product, from a sine of large steps."""
    values = np.sin(12.9898 * np.arange(1, np.prod(size) + 1) ** 1.5 + 3.7 * phase).reshape(size)
    return 1 + 0.2 * values if around_one else 0.6 * values


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    return weight * x / np.sqrt((x * x).mean(-1, keepdims=True) + eps)


def silu(x: Array) -> Array:
    return x / (1 + np.exp(-x))


def rope(x: Array, theta: float) -> Array:
    """Rotate `(positions, heads, head_dim)`, channel j with channel j + head_dim / 2."""
    half = x.shape[-1] // 2
    angle = np.arange(len(x))[:, None, None] * theta ** (-np.arange(half) / half)
    left, right = x[..., :half], x[..., half:]
    return np.concatenate(
        [left * np.cos(angle) - right * np.sin(angle), right * np.cos(angle) + left * np.sin(angle)], -1
    )


def head_outputs(w: dict[str, Array], shape: Shape, embeddings: Array, features: Array) -> tuple[Array, Array]:
    """`p` and `r`, each `(positions, d)`, of pairs at positions 0, 1, ..."""
    n, d, dim, eps = len(embeddings), shape.hidden_size, shape.head_dim, shape.rms_norm_eps
    both = np.concatenate([embeddings, features], -1)
    sampling = "fc.fc.weight" in w
    fc = "fc.fc" if sampling else "fc"
    h = both @ w[f"{fc}.weight"].T + w.get(f"{fc}.bias", 0)
    if sampling:
        z = rms_norm(h, w["fc.post_attention_layernorm.weight"], eps)
        gate = silu(embeddings @ w["fc.mlp.gate_proj.weight"].T)
        h = h + (gate * (z @ w["fc.mlp.up_proj.weight"].T)) @ w["fc.mlp.down_proj.weight"].T

    def project(name: str) -> Array:
        out = h @ w[f"layers.0.self_attn.{name}_proj.weight"].T + w.get(f"layers.0.self_attn.{name}_proj.bias", 0)
        return out.reshape(n, -1, dim)

    q, k, v = rope(project("q"), shape.rope_theta), rope(project("k"), shape.rope_theta), project("v")
    group = shape.num_attention_heads // shape.num_key_value_heads
    mixed = np.zeros((n, shape.num_attention_heads, dim))
    for t in range(n):
        for head in range(shape.num_attention_heads):
            scores = k[: t + 1, head // group] @ q[t, head] / np.sqrt(dim)
            weights = np.exp(scores - scores.max())
            mixed[t, head] = weights / weights.sum() @ v[: t + 1, head // group]
    a = h + mixed.reshape(n, -1) @ w["layers.0.self_attn.o_proj.weight"].T
    u = rms_norm(a, w["layers.0.post_attention_layernorm.weight"], eps)
    inner = silu(u @ w["layers.0.mlp.gate_proj.weight"].T) * (u @ w["layers.0.mlp.up_proj.weight"].T)
    delta = inner @ w["layers.0.mlp.down_proj.weight"].T
    if delta.shape[-1] == d:
        return a + delta, a + delta
    return a + delta[:, :d], a + delta[:, d:]


class NaiveDrafting:
    """EAGLE-2's drafting of one sequence, every node computed again from its whole prefix.

    Args:
        w, shape: the drafter.
        embedding: `(vocab, d)`.
        head: `(vocab, d)` of the target.
        fed_back: which of `head_outputs` becomes the next feature.
    """

    def __init__(self, w: dict[str, Array], shape: Shape, embedding: Array, head: Array, fed_back: str = "r"):
        self.w, self.shape, self.embedding, self.head, self.fed_back = w, shape, embedding, head, fed_back
        self.tokens: list[int] = []
        self.features: list[Array] = []

    def take_in(self, tokens: list[int], features: Array) -> None:
        """Decided pairs (token one ahead, true feature)."""
        self.tokens += tokens
        self.features += list(features)

    def law(self, path: tuple[int, ...]) -> Array:
        """Log-probabilities of the token after the path."""
        tokens, features = list(self.tokens), list(self.features)
        for k in range(len(path) + 1):
            p, r = head_outputs(self.w, self.shape, self.embedding[tokens], np.array(features))
            if k < len(path):
                tokens.append(path[k])
                features.append((r if self.fed_back == "r" else p)[-1])
        logits = self.head @ p[-1]
        shifted: Array = logits - logits.max()
        return shifted - np.log(np.exp(shifted).sum())

    def tree(self, depth: int, top_k: int, total_tokens: int) -> tuple[list[int], list[int]]:
        """Tokens and parents of the tree, the root first: the best `total_tokens - 1` of all candidates.

        The root's `top_k` children come first; then `depth` times the `top_k` best of the newest candidates are
        expanded by `top_k` children each. What is kept stays in the order in which it was considered.
        """
        candidates: list[tuple[tuple[int, ...], float]] = []  # (path from the root, cumulative log-probability)

        def children(path: tuple[int, ...], score: float) -> list[int]:
            law = self.law(path)
            first = len(candidates)
            for token in np.argsort(-law)[:top_k]:
                candidates.append(((*path, int(token)), score + law[token]))
            return list(range(first, len(candidates)))

        level = children((), 0.0)
        for _ in range(depth):
            best = heapq.nlargest(top_k, level, key=lambda i: candidates[i][1])
            level = [i for parent in best for i in children(*candidates[parent])]
        kept = sorted(heapq.nlargest(total_tokens - 1, range(len(candidates)), key=lambda i: candidates[i][1]))
        place = {candidates[i][0]: n for n, i in enumerate(kept, start=1)}
        tokens = [self.tokens[-1]] + [candidates[i][0][-1] for i in kept]
        parents = [-1] + [place.get(candidates[i][0][:-1], 0) for i in kept]
        return tokens, parents
