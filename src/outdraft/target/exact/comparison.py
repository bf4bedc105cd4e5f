"""The comparison of a forward over trees with one-token forwards, bit for bit."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from outdraft.core.tree import Tree
from outdraft.target.cache import SlotCache
from outdraft.target.target import Target

if TYPE_CHECKING:
    from outdraft.target.exact.target import ExactTarget


class Kept(SlotCache):
    """A cache that exposes what its layers hold."""

    def __init__(self, target: Target, capacity: int, rows: int = 1):
        super().__init__(rows, target.num_layers, capacity)
        self.held: dict[int, tuple[Tensor, Tensor]] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        self.held[layer_idx] = super().update(key_states, value_states, layer_idx)
        return self.held[layer_idx]


class Case:
    """Random trees after random prompts of different lengths, with the same number of nodes in every row.

    Args:
        plain: the stock target.
    """

    def __init__(self, plain: Target, rows: int, nodes: int):
        self.plain = plain
        dice = torch.Generator().manual_seed(rows * 1000 + nodes)

        def tokens(*shape: int) -> Tensor:
            return torch.randint(plain.vocab_size, shape, generator=dice)

        longest = max(2, min(12, plain.context_length - nodes - 1))
        self.prompts = [tokens(2 + (5 * row + 3) % (longest - 1)) for row in range(rows)]
        parents = [
            [-1, *(int(torch.randint(max(0, i - 3), i, (), generator=dice)) for i in range(1, nodes))]
            for _ in range(rows)
        ]
        self.trees = Tree(tokens(rows, nodes), torch.tensor(parents), [nodes] * rows)

    def tree(self, exact: ExactTarget) -> tuple[Tensor, Tensor, Kept]:
        """Return features, logits and cache of one forward over all nodes."""
        cache = Kept(self.plain, max(len(prompt) for prompt in self.prompts) + self.trees.nodes, len(self.prompts))
        run = exact.runner(cache)
        run.prefill(self.prompts)
        features = run.tree(self.trees).features
        return features, exact.head(features), cache

    def difference(self, exact: ExactTarget) -> str | None:
        """Describe where the forward over the trees differs from one-token forwards, None if it does not."""
        features, logits, cache = self.tree(exact)
        children: dict[int, list[int]]
        for row, prompt in enumerate(self.prompts):
            own = Kept(self.plain, len(prompt) + self.trees.nodes)
            run = self.plain.runner(own)
            run.prefill([prompt])
            children = self.trees.children(row)
            ahead = [(0, 0)]
            while ahead:
                node, depth = ahead.pop()
                own.lengths[0] = len(prompt) + depth  # back to the parent
                single = run.tree(Tree.roots(self.trees.tokens[row, node : node + 1])).features
                pairs = [("features", features[row, node], single[0, 0])]
                pairs.append(("logits", logits[row, node], self.plain.head(single)[0, 0]))
                for layer, (keys, values) in own.held.items():
                    slot = len(prompt) + node
                    pairs.append((f"keys (layer {layer})", cache.held[layer][0][row, :, slot], keys[0, :, -1]))
                    pairs.append((f"values (layer {layer})", cache.held[layer][1][row, :, slot], values[0, :, -1]))
                # Deepest first: what went wrong in a layer shows in all after it.
                for name, given, expected in [*pairs[2:], *pairs[:2]]:
                    if not torch.equal(given, expected):
                        return name
                run.cache.commit([[0]])
                ahead += [(child, depth + 1) for child in children.get(node, [])]
        return None
