"""EESD's self-distillation loss (arXiv 2406.03853, section 3.1).

Position t reads the hidden state after the target's first N layers and predicts x_{t+1}, of which the target's own
features f_t give the distribution. A sequence of L tokens has L-1 such positions; t counts when x_{t+1} is a response
token.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from outdraft.losses.cross_entropy import HardLabels, soft_cross_entropy
from outdraft.losses.objective import Objective, Reading, reader_of, teacher_of, weight_of_tokens
from outdraft.losses.teacher import TopProbs, predicting
from outdraft.methods.eesd.network import ExitLayer
from outdraft.target.target import Target
from outdraft.target.views import exit_view, layers_of


class ExitSums(NamedTuple):
    """Sums over the counted positions; divide by `positions` for means."""

    cross_entropy: Tensor
    """The cross-entropy against the target's distribution, the response's token, or both."""
    agreed: Tensor
    """The number of positions where exit and target have the same argmax."""
    positions: Tensor
    """The number of counted positions."""


class ExitLoss(nn.Module):
    """An exit layer together with its loss, the module that is trained (and wrapped for several processes).

    Args:
        drafter: the only parameters here.
        target: lends final norm and head.
        hard_weight: weight of the response's own token; the target's distribution has the rest up to 1.
    """

    def __init__(self, drafter: ExitLayer, target: Target, chunk_size: int = 512, hard_weight: float = 0.0):
        super().__init__()
        self.drafter = drafter
        self.chunk_size, self.hard_weight = chunk_size, hard_weight
        self._view = exit_view(float32_ends(target.model), drafter.layer)
        self._target = target

    def train(self, mode: bool = True) -> ExitLoss:
        """Keep the layer in evaluation mode: without dropout, equal steps give equal bits."""
        return super().train(False)

    def forward(
        self,
        hidden: Tensor,
        features: Tensor,
        input_ids: Tensor,
        loss_mask: Tensor,
        said: TopProbs | None = None,
    ) -> ExitSums:
        """Compute the sums over the counted positions of a right-padded batch.

        Args:
            hidden: `(batch, tokens, hidden)` after the target's first layers.
            features: `(batch, tokens, hidden)` after all of them and the final norm.
            input_ids: `(batch, tokens)`.
            loss_mask: `(batch, tokens)` True where x is a response token; False on padding.
            said: the target's most probable tokens at the counted positions, if they are known already.
        """
        counted, own = predicting(loss_mask), self.drafter.head
        weight = next(self.drafter.parameters())
        out = self._view(hidden.to(weight.dtype), use_cache=False)[0]
        labels = HardLabels(input_ids[:, 1:][counted], self.hard_weight) if self.hard_weight else None
        cross_entropy, agreed = soft_cross_entropy(
            out[:, :-1][counted],
            features[:, :-1][counted] if said is None else said,
            self._target.head,
            self.chunk_size,
            precision=features.dtype,
            own_head=own,
            through=None if own is None else self._target.head_through(own),
            labels=labels,
        )
        return ExitSums(cross_entropy, agreed, counted.sum())


class ExitObjective(Objective):
    """EESD's objective: it reads the hidden state of an early layer, and the features as the teacher."""

    parts: ClassVar = {}

    def __init__(self, target: Target, config: Any, drafter: ExitLayer):
        self.drafter, self.width = drafter, target.hidden_size
        self.target, self.top_k, self.rows = target, teacher_of(config), config.loss_chunk_size
        self.reading = Reading(reader_of(target), exit_layer=drafter.config.exit_layer)
        self.loss = ExitLoss(drafter, target, config.loss_chunk_size, weight_of_tokens(config))

    def counted(self, loss_mask: Tensor) -> Tensor:
        return predicting(loss_mask)

    def arguments(
        self, batch: Mapping[str, Tensor], features: Tensor, step: int, progress: float = 1.0
    ) -> tuple[Any, ...]:
        hidden, last = features.split(self.width, dim=-1)
        return hidden, last, batch["input_ids"], batch["loss_mask"], self.teacher(batch, features)

    def total(self, sums: Any, progress: float = 0.0) -> Tensor:
        return sums.cross_entropy


def float32_ends(model: PreTrainedModel) -> PreTrainedModel:
    """A view of the model whose inner model is float32 but for layers and embeddings, which stay shared.

    The trained layer has float32 weights, so the final norm after it must take float32, too.
    """
    if model.get_input_embeddings().weight.dtype == torch.float32:
        return model
    layers = layers_of(model)

    def view(module: nn.Module) -> nn.Module:
        if module is layers or isinstance(module, nn.Embedding):
            return module
        if not any(part is layers for part in module.modules()):
            return copy.deepcopy(module).float()
        own = copy.copy(module)
        own._modules = {name: child and view(child) for name, child in module._modules.items()}
        return own

    base, outer = model.base_model, copy.copy(model)
    outer._modules = {name: view(base) if child is base else child for name, child in model._modules.items()}
    return outer
