"""EESD's network (arXiv 2406.03853, section 3.1): one trained layer on a hidden state of the target, then its head.

The layer is of the family's own kind and begins as a copy of the target's last one. Everything else (the first layers
below it, embedding, final norm, head unless it has its own) belongs to the target. One class trains and decodes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from outdraft.errors import UserError, first_line
from outdraft.methods.checkpoint import TARGET_FACTS, Network
from outdraft.target.backends.packed import plain_weights
from outdraft.target.target import Target
from outdraft.target.views import exit_view, layers_of


@dataclass(frozen=True)
class ExitLayerConfig:
    """The settings of an exit layer, beside the target that it belongs to."""

    exit_layer: int
    """The number of the target's layers that run before the exit layer, at least 1."""
    own_head: bool = False
    """True if the drafter has its own output layer; else it uses the target's."""


class ExitLayer(Network):
    """A layer on the hidden states after the target's first `config.exit_layer` layers.

    Args:
        layer: a layer of the target's family.
        head: its own output layer, if `config.own_head`.
    """

    method, needs = "eesd", TARGET_FACTS

    def __init__(self, config: ExitLayerConfig, layer: nn.Module, head: nn.Module | None = None):
        super().__init__()
        if config.own_head != (head is not None):
            raise ValueError("an own head is there exactly when the config says so")
        self.config, self.layer, self.head = config, layer, head

    @classmethod
    def beginning(cls, model: PreTrainedModel, config: ExitLayerConfig) -> ExitLayer:
        """Build the layer that training starts from: float32 copies of the model's last layer and, for `own_head`, its
        head.

        Raises:
            UserError: the model has no such layer to exit after, or its weights cannot be trained.
        """
        exit_layer = empty(model, config)
        originals = {"layer": layers_of(model)[-1], "head": model.get_output_embeddings()}
        weights = {
            f"{part}.{name}": weight.to(torch.float32, copy=True)
            for part, own in exit_layer._modules.items()
            if own is not None
            for name, weight in plain_weights(originals[part], own.state_dict()).items()
        }
        if weights.keys() != exit_layer.state_dict().keys():
            raise UserError(
                "the target's last layer has weights of another form than its family's; load it unquantised"
            )
        exit_layer.load_state_dict(weights, assign=True)
        return exit_layer.requires_grad_(True)

    @property
    def fits(self) -> dict[str, int]:
        return {}  # the facts that it needs say it

    def bind(self, target: Target) -> BoundExit:
        """Bind the layer to the parts of its target that it borrows."""
        return BoundExit(self, target)


def empty(model: PreTrainedModel, config: ExitLayerConfig) -> ExitLayer:
    """Build an exit layer of the model's family without weights (`load_state_dict(assign=True)` loads them)."""
    count = len(layers_of(model))
    if not 1 <= config.exit_layer < count:
        raise UserError(f"the exit layer must be between 1 and {count - 1} for this model, not {config.exit_layer}")
    try:
        with torch.device("meta"):
            pattern = type(model)(model.config)
    except Exception as error:  # a model's own code may do anything
        raise UserError(
            f"{type(model).__name__} cannot be built again from its config ({first_line(error)})"
        ) from error
    layer = layers_of(pattern)[-1]
    _lend_buffers(layer, layers_of(model)[-1])
    head = copy.copy(pattern.get_output_embeddings()) if config.own_head else None
    return ExitLayer(config, layer, head).eval()


def _lend_buffers(layer: nn.Module, original: nn.Module) -> None:
    """Lend constants that no checkpoint holds (masks, frequencies) from the model's own layer; a backend's additions
    are left out."""
    for name, buffer in original._buffers.items():
        if name in layer._buffers:
            layer._buffers[name] = buffer
    for name, child in original._modules.items():
        if child is not None and layer._modules.get(name) is not None:
            _lend_buffers(layer._modules[name], child)  # type: ignore[arg-type]


class BoundExit:
    """An exit layer with the final norm and the head of its target; it holds views, no weights."""

    def __init__(self, exit_layer: ExitLayer, target: Target):
        self.view = exit_view(target.model, exit_layer.layer, target.gathered_on)
        self.head: Callable[[Tensor], Tensor] = (
            target.head if exit_layer.head is None else target.head_through(exit_layer.head)
        )

    def features(self, hidden: Tensor, **inputs: Any) -> Tensor:
        """Map `(rows, tokens, hidden)` hidden states to the head's input; other inputs are those of the inner model."""
        return self.view(hidden, **inputs)[0]
