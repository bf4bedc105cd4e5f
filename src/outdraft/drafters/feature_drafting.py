"""Decoding with a `FeatureHead`: what it remembers between rounds and how its tree grows.

The drafter's own cache keeps one entry for each decided pair (token one ahead, target feature). Each round first takes
in the pairs that the verdict decided, with the target's true features, then runs ahead on its own `r` and forgets
that run again. It does not know the network's equations (`feature_head.py`) nor how candidates are chosen
(`growth.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from outdraft.backends import count_parameters
from outdraft.cache import SlotCache
from outdraft.drafters.base import Drafter, DraftState, RowContext, TreeShape, Update
from outdraft.drafters.feature_head import DraftOutput, FeatureHead
from outdraft.drafters.growth import RunAhead, grow
from outdraft.drafters.intake import take_in
from outdraft.errors import UserError
from outdraft.layers import Tapped
from outdraft.run import TappedRun, TargetRun
from outdraft.target import Target
from outdraft.tree import Tree, attention_mask


class FeatureDrafter(Drafter):
    """A trained `FeatureHead` bound to its target's embedding and head.

    Args:
        head: the network, on the target's device and in its precision.
        target: the model it was trained for.

    Raises:
        UserError: the shapes say that it is another model's drafter.
    """

    def __init__(self, head: FeatureHead, target: Target):
        for name in ("hidden_size", "vocab_size"):
            own, others = getattr(head.config, name), getattr(target, name)
            if own != others:
                raise UserError(
                    f"the drafter was trained for a target with {name} {own}, this one has {others}; "
                    "choose its own drafter or train one (outdraft train)"
                )
        self.head, self.target, self.method = head, target, head.method
        layers = head.config.tap_layers
        self.tapped = Tapped(target.model, layers) if layers else None

    def start(self, target: Target, cache: SlotCache) -> TargetRun:
        tapped = self.tapped
        return TargetRun(target, cache) if tapped is None else TappedRun(target, tapped, cache)

    def begin(self, prompts: Sequence[Tensor], run: TargetRun) -> FeatureDraftState:
        return FeatureDraftState(self, len(prompts), run.cache.capacity)

    @property
    def num_parameters(self) -> int:
        return count_parameters(self.head)

    def embed(self, tokens: Tensor) -> Tensor:
        """The checkpoint's own embedding where it has one, else the target's."""
        own = self.head.embed_tokens
        return own(tokens) if own is not None else self.target.embed(tokens)


class FeatureDraftState(DraftState):
    """The pairs seen so far, one cache entry each."""

    def __init__(self, drafter: FeatureDrafter, rows: int, capacity: int):
        self.drafter = drafter
        self.cache = SlotCache(rows, 1, capacity)
        self._last_position = drafter.head.config.max_position_embeddings - 1

    def propose(self, update: Update, shape: TreeShape, rows: RowContext) -> Tree:
        newest = self._take_in(update)
        row = torch.arange(len(update.counts), device=update.tokens.device)
        last = torch.tensor(update.counts, device=update.tokens.device) - 1
        roots = update.tokens[row, last]
        logits = self.drafter.target.head(newest.p)
        ahead = RunAhead(self.cache, self._last_position)
        r = newest.r[:, None]

        def step(tokens: Tensor, parents: Tensor) -> Tensor:
            nonlocal r
            out = self.run(tokens, r[row[:, None], parents], *ahead.place(tokens, parents))
            r = out.r
            return self.drafter.target.head(out.p)

        tree = grow(roots, logits, step, shape, rows)
        self.cache.rollback()
        return tree

    def select_rows(self, rows: Sequence[int]) -> None:
        self.cache.select_rows(rows)

    def _take_in(self, update: Update) -> DraftOutput:
        """Run the decided pairs and keep them; the outputs `(rows, hidden)` at each row's last one."""

        def forward(piece: slice, positions: Tensor, seen: Tensor, slots: Tensor) -> DraftOutput:
            return self.run(update.tokens[:, piece], update.taps[:, piece], positions, seen, slots)

        return DraftOutput(*take_in(self.cache, update.counts, self._last_position, update.tokens.device, forward))

    def run(self, tokens: Tensor, features: Tensor, positions: Tensor, seen: Tensor, slots: Tensor) -> DraftOutput:
        """One forward of the network over reserved slots; the last three arguments as in `attention_mask`."""
        mask = attention_mask(seen, slots, self.cache.lengths, self.cache.extent, positions)
        new = positions[:, -tokens.shape[1] :]
        return self.drafter.head(self.drafter.embed(tokens), features, new, mask, self.cache)
