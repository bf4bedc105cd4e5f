"""The target's forward over draft trees, node by node, against one-token forwards of the stock model on the same path.

Texts show only errors that change a token. This check compares the whole output distribution after every node, so that
a position off by one, a wrong mask or a wrong cache slot shows where it happens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from outdraft.evaluation.audit.findings import Finding
from outdraft.evaluation.audit.stock import Noise, StockProbs, total_variation
from outdraft.evaluation.audit.watch import Round

LARGEST, MEAN = 3.0, 3.0
"""The largest ratios of the trees' differences from one-token forwards to those of the stock model's many-token
forwards, whose kernels differ. A wrong position or mask is off by orders of magnitude in single precision, by ten times
and more in bfloat16."""

FLOOR = 1e-6
"""The total variation of float32 probabilities from summation alone."""


@dataclass
class SeenTree:
    """One row's tree with the target's features of it.

    Attributes:
        prompt, text: token ids before the root and up to it.
        paths: for every node, the tokens from below the root to it.
        features: `(nodes, hidden)` target features.
    """

    prompt: list[int]
    text: list[int]
    paths: list[list[int]]
    features: Tensor


class Trees:
    """A random sample of all observed trees (reservoir sampling)."""

    def __init__(self, most: int, context_length: int, seed: int):
        self.most, self.context_length, self.passed = most, context_length, 0
        self.kept: list[SeenTree] = []
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, seen: Round) -> None:
        for row in range(seen.tree.rows):
            depth = int(seen.tree.depths[row, : seen.tree.counts[row]].max())
            if depth == 0 or len(seen.prefixes[row]) + depth >= self.context_length:
                continue
            self.passed += 1
            if len(self.kept) < self.most:
                self.kept.append(seen_tree(seen, row))
            elif (place := int(torch.randint(self.passed, (), generator=self._generator))) < self.most:
                self.kept[place] = seen_tree(seen, row)


def seen_tree(seen: Round, row: int) -> SeenTree:
    count = seen.tree.counts[row]
    tokens, parents = seen.tree.tokens[row].tolist(), seen.tree.parents[row].tolist()
    paths: list[list[int]] = [[]]
    for node in range(1, count):
        paths.append([*paths[parents[node]], tokens[node]])
    prefix, length = seen.prefixes[row].tolist(), seen.prompt_lengths[row]
    return SeenTree(prefix[:length], prefix[length:], paths, seen.features[row, :count].clone())


@torch.inference_mode()
def node_variations(probs: StockProbs, tree: SeenTree) -> list[float]:
    """Return, for every node, the total variation between the tree forward's distribution and one-token forwards'."""
    leaves = [path for path in tree.paths if not any(other[: len(path)] == path != other for other in tree.paths)]
    texts = [[*tree.text, *path] for path in leaves]
    prefix = torch.tensor([*tree.prompt, *tree.text], device=tree.features.device)
    warper = probs.warper(tree.prompt)
    found: dict[tuple[int, ...], Tensor] = {}
    # One token more than the longest, so that every node has a next one.
    for place, step in enumerate(probs.along(tree.prompt, [[*text, 0] for text in texts])):
        depth = place - len(tree.text)
        if depth >= 0:
            for leaf, dist in zip(leaves, step, strict=True):
                if dist is not None:
                    found.setdefault(tuple(leaf[:depth]), dist)
    logits = probs.target.head(tree.features)
    return [
        total_variation(found[tuple(path)], warper.probs_after(row, torch.cat([prefix, prefix.new_tensor(path)])))
        for path, row in zip(tree.paths, logits, strict=True)
    ]


def forwards_finding(probs: StockProbs, trees: Trees, noise: Noise, advance: Callable[[int], None]) -> Finding:
    variations: list[float] = []
    worst = (0.0, "")
    for tree in trees.kept:
        own = node_variations(probs, tree)
        place = max(range(len(own)), key=own.__getitem__)
        if own[place] >= worst[0]:
            where = f"after {len(tree.text)} new tokens and the candidates {tree.paths[place]}"
            worst = (own[place], where)
        variations += own
        advance(1)
    largest, mean = LARGEST * noise.variation + FLOOR, MEAN * noise.variation_mean + FLOOR
    found_mean = sum(variations) / max(1, len(variations))
    passed = worst[0] <= largest and found_mean <= mean
    return Finding(
        "forwards",
        "Does the target give a candidate tree the distributions that it gives one token at a time?",
        passed,
        f"{len(variations)} nodes of {len(trees.kept)} trees: the output distributions differ by a total variation of "
        f"{found_mean:.2g} on average and {worst[0]:.2g} at most; the stock model's own many-token forwards by "
        f"{noise.variation_mean:.2g} and {noise.variation:.2g}.",
        figures={
            "trees": len(trees.kept),
            "nodes": len(variations),
            "variation_mean": found_mean,
            "variation_max": worst[0],
            "allowed_mean": mean,
            "allowed_max": largest,
        },
        lines=[] if passed else [f"largest {worst[1]}"],
    )
