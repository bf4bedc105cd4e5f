"""Medusa-1's loss (arXiv 2401.10774, section 2.2.1), against the frozen target's distribution or its tokens.

Head k reads f_t and predicts x_{t+1+k}, of which the target's own feature f_{t+k} gives the distribution. A sequence of
L tokens has L-1-k such positions; t counts when x_{t+1+k} is a response token.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from outdraft.losses.cross_entropy import Guess, HardLabels, soft_cross_entropies
from outdraft.losses.objective import Objective, Reading, reader_of, teacher_of, weight_of_tokens
from outdraft.losses.teacher import TopProbs, predicting
from outdraft.methods.medusa.drafter import MedusaHeads
from outdraft.target.target import Target

HEAD_DECAY = 0.8
"""The decay of the heads' weights: head k weighs this to the power of k (section 2.2.1)."""


class MedusaSums(NamedTuple):
    """Sums over the counted positions; divide by `positions` for means."""

    cross_entropy: Tensor
    """The weighted sum of all heads' cross-entropies."""
    first_head: Tensor
    """The unweighted cross-entropy of head 1."""
    agreed: Tensor
    """The number of positions where head 1 and the target have the same argmax."""
    positions: Tensor
    """The number of counted positions of head 1; later heads have a few less at the ends of sequences."""


class MedusaLoss(nn.Module):
    """The heads together with their loss, the module that is trained (and wrapped for several processes).

    Args:
        drafter: the only parameters here.
        target: lends its output layer, or the function through the heads' own ones.
        hard_weight: weight of the response's own token; the target's distribution has the rest up to 1. The paper's
            loss is 1.
    """

    def __init__(self, drafter: MedusaHeads, target: Target, chunk_size: int = 512, hard_weight: float = 0.0):
        super().__init__()
        self.drafter = drafter
        self.chunk_size, self.hard_weight = chunk_size, hard_weight
        self._target = target

    def forward(
        self, features: Tensor, input_ids: Tensor, loss_mask: Tensor, said: TopProbs | None = None
    ) -> MedusaSums:
        """Compute the sums over the counted positions of a right-padded batch.

        Args:
            features: `(batch, tokens, hidden)` the target's f_0 .. f_{L-1}.
            input_ids: `(batch, tokens)`.
            loss_mask: `(batch, tokens)` True where x is a response token; False on padding.
            said: the target's most probable tokens at the first head's counted positions, if they are known already.
        """
        inputs = features.to(next(self.drafter.parameters()).dtype)
        speaking = self.drafter.speaking(self._target)
        counted = predicting(loss_mask, 2)
        guesses = []
        for k, head in enumerate(self.drafter.heads, start=1):
            behind = k - 1  # the tokens by which this head reads further back than the first, for the same guess
            whole = predicting(loss_mask, k + 1), inputs[:, : -1 - k]
            here, read = (_moved(x, behind, counted.shape[1]) for x in whole)
            own = self.drafter.outputs[k - 1] if self.drafter.config.own_head else None
            guesses.append(Guess(head(read[counted]), here[counted], own, None if own is None else speaking[k - 1]))
        losses, agreed = soft_cross_entropies(
            guesses,
            features[:, 1:-1][counted] if said is None else said,
            self._target.head,
            self.chunk_size,
            precision=features.dtype,
            labels=HardLabels(input_ids[:, 2:][counted], self.hard_weight) if self.hard_weight else None,
        )
        weights = HEAD_DECAY ** torch.arange(1, len(losses) + 1, dtype=losses.dtype, device=losses.device)
        return MedusaSums((weights * losses).sum(), losses[0], agreed[0], counted.sum())


class MedusaObjective(Objective):
    """Medusa's objective on the target's features; the teacher is the target one, two, ... tokens later."""

    parts: ClassVar = {"loss_head1": "first_head"}

    def __init__(self, target: Target, config: Any, drafter: MedusaHeads):
        self.drafter, self.target = drafter, target
        self.top_k, self.rows = teacher_of(config), config.loss_chunk_size
        self.reading = Reading(reader_of(target))
        self.loss = MedusaLoss(drafter, target, config.loss_chunk_size, weight_of_tokens(config))

    def counted(self, loss_mask: Tensor) -> Tensor:
        return predicting(loss_mask, 2)

    def arguments(
        self, batch: Mapping[str, Tensor], features: Tensor, step: int, progress: float = 1.0
    ) -> tuple[Any, ...]:
        return features, batch["input_ids"], batch["loss_mask"], self.teacher(batch, features, first=1)

    def total(self, sums: Any, progress: float = 0.0) -> Tensor:
        return sums.cross_entropy


def _moved(x: Tensor, by: int, length: int) -> Tensor:
    """Shift `(batch, tokens, ...)` right by `by` positions, zeros before, to `(batch, length, ...)`."""
    moved = x.new_zeros(len(x), length, *x.shape[2:])
    moved[:, by:] = x[:, : max(length - by, 0)]
    return moved
