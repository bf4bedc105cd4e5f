"""Views of a stock model's layers, without a copy: whole or in two parts, with outputs of chosen layers.

A view is a shallow copy of the inner model whose list of layers is a slice of the same modules. The layers keep their
index in the cache, so both parts write to one `SlotCache`. A part's last layer records its output, and the next part's
first layer gets that instead of its input. So what a family does to its embeddings (scaling, learned positions) does
not matter.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from outdraft.errors import UserError
from outdraft.target.backends import forward_of
from outdraft.target.backends.native import NativeStack
from outdraft.target.backends.tree_attention import Pending
from outdraft.target.spread import Stand, beside_embedding, place_of, sharing


@dataclass(frozen=True)
class Reads:
    """The states that are read of the target for every token; they are concatenated in this order."""

    features: bool = True
    """The last hidden state after the final norm."""
    layers: tuple[int, ...] = ()
    """The outputs of these layers, counted from 1, except the last layer."""
    split: int | None = None
    """The target runs in two parts, split after this layer, so that the first part may run ahead over candidates."""


class View:
    """Some layers of a model, run as the model would be, with its final norm after them.

    Args:
        modules: the layers, the model's own or others like them.
        indices: index of each in the model's list, by which families look up its kind of attention.
        notes: indices of modules whose outputs are returned.
        handed: True if the input is hidden states instead of tokens.
        device: device of all outputs; by default that of the layer that makes each.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        modules: Sequence[nn.Module],
        indices: Sequence[int],
        what: str,
        notes: Sequence[int] = (),
        handed: bool = False,
        device: torch.device | None = None,
    ):
        self._model, self._device = model, device
        own, self._handed = list(modules) if device is None else sharing(modules), None
        if handed:
            own[0] = self._handed = _Handed(own[0])
        self._noting = [_Noting(own[index]) for index in notes]
        for index, noting in zip(notes, self._noting, strict=True):
            own[index] = noting
        self._inner = view_of(model, own, indices)
        self._run = forward_of(model, self._forward, what)

    def __call__(self, hidden: Tensor | None = None, **inputs: Any) -> tuple[Tensor, ...]:
        """Run the layers.

        Args:
            hidden: `(rows, tokens, hidden)` input of the first layer; without it, pass `input_ids`.

        Returns:
            `(rows, tokens, hidden)` features after the final norm, then the output of each noted module.
        """
        return self._run(**inputs) if hidden is None else self._run(inputs_embeds=hidden, **inputs)

    @property
    def ready(self) -> bool:
        """Whether `over` computes what the layers do, as the backend has found out."""
        return getattr(self._run, "ready", False)

    def over(self, pending: Pending, **given: Tensor) -> tuple[Tensor, ...]:
        """Run the layers on `input_ids` or `inputs_embeds` over pending tokens, as part of what is recorded."""
        return self._run.over(*next(iter(given.items())), pending)  # type: ignore[attr-defined]

    def _forward(self, **inputs: Any) -> tuple[Tensor, ...]:
        if self._handed is not None:
            self._handed.hidden = inputs["inputs_embeds"]
        elif self._device is not None:
            inputs = beside_embedding(self._model, inputs)
        features = self._inner(**inputs).last_hidden_state
        outputs = (features, *(noting.take() for noting in self._noting))
        return outputs if self._device is None else tuple(output.to(self._device) for output in outputs)


class Reader:
    """A model, whole or in two parts, that returns what is read of it.

    Raises:
        UserError: no such layer, or the model's layers cannot be found.
    """

    def __init__(self, model: PreTrainedModel, reads: Reads, device: torch.device | None = None):
        modules = list(layers_of(model))
        total, split, self.reads = len(modules), reads.split, reads
        if split is not None and not 1 <= split < total:
            raise UserError(f"the exit layer must be between 1 and {total - 1} for this model, not {split}")
        if odd := [layer for layer in reads.layers if not 1 <= layer < total]:
            raise UserError(f"layers to read must be between 1 and {total - 1} for this model, not {odd[0]}")
        layers = sorted(set(reads.layers))
        below = [] if split is None else [split, *(layer for layer in layers if layer < split)]
        above = [layer for layer in layers if split is None or layer > split]
        first, name = split or 0, "the target with layers read" if split is None else "the other layers"
        self._noted, self._below = [*below, *above], len(below)
        notes = [layer - first - 1 for layer in above]
        indices = range(first, total)
        self._last = View(model, modules[first:], indices, name, notes, handed=split is not None, device=device)
        self._first = None
        if split is not None:
            notes = [layer - 1 for layer in below]
            self._first = View(model, modules[:split], range(split), "the first layers", notes, device=device)

    def __call__(self, **inputs: Any) -> tuple[Tensor, Tensor]:
        """Run all layers; return `(rows, tokens, hidden)` features and `(rows, tokens, width)` states that are read."""
        if self._first is None:
            features, *noted = self._last(**inputs)
            return features, self._read(features, noted)
        carried = self.lower(**inputs)
        return self.upper(carried, **{name: value for name, value in inputs.items() if name != "input_ids"})

    def lower(self, **inputs: Any) -> Tensor:
        """Run the first part on the model's arguments; return `(rows, tokens, carried)` states for `upper`.

        These begin with the hidden state.
        """
        assert self._first is not None, "reads no split"
        _, *noted = self._first(**inputs)
        return _beside(noted)

    def upper(self, carried: Tensor, **inputs: Any) -> tuple[Tensor, Tensor]:
        """Run the second part on these states; return features and what is read, as `__call__`."""
        below = list(carried.chunk(self._below, dim=-1)) if self._below > 1 else [carried]
        features, *above = self._last(below[0], **inputs)
        return features, self._read(features, below + above)

    def _read(self, features: Tensor, noted: Sequence[Tensor]) -> Tensor:
        given = dict(zip(self._noted, noted, strict=True))
        return _beside([features] * self.reads.features + [given[layer] for layer in self.reads.layers])


def _beside(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=-1)


def exit_view(model: PreTrainedModel, layer: nn.Module, device: torch.device | None = None) -> View:
    """Return a view of one given layer on hidden states, with the final norm after it; `device` as in `View`."""
    return View(model, [layer], [len(layers_of(model)) - 1], "the exit layer", handed=True, device=device)


def shortcut_view(model: PreTrainedModel, layers: int, layer: nn.Module, device: torch.device | None = None) -> View:
    """Return a view of the model's first layers and a given layer, which also returns the state in between."""
    modules = list(layers_of(model))
    indices, what = [*range(layers), len(modules) - 1], "the first layers and the exit layer"
    return View(model, [*modules[:layers], layer], indices, what, [layers - 1], device=device)


def spread_view(model: PreTrainedModel) -> tuple[Any, list[int]]:
    """Return a view of the whole inner model for layers on several devices, and of each how many lie on its device.

    A model whose layers cannot be found is itself the view, as if each layer had a device of its own.
    """
    try:
        layers = list(layers_of(model))
    except UserError:
        return model.base_model, [1] * model.config.get_text_config().num_hidden_layers
    places = [place_of(layer) for layer in layers]
    counts = [1 if place is None else places.count(place) for place in places]
    return view_of(model, sharing(layers), range(len(layers))), counts


def layers_of(model: PreTrainedModel) -> nn.ModuleList:
    """Return the model's own list of layers.

    Raises:
        UserError: there is no such list.
    """
    return _path_to_layers(model)[-1][1]  # type: ignore[return-value]


def _path_to_layers(model: PreTrainedModel) -> list[tuple[str, nn.Module]]:
    """Return the modules from the inner model down to its list of layers, each with its name in the one before."""
    count = model.config.get_text_config().num_hidden_layers

    def search(module: nn.Module, path: list[tuple[str, nn.Module]]) -> list[tuple[str, nn.Module]] | None:
        for name, child in module._modules.items():
            if isinstance(child, nn.ModuleList) and len(child) == count:
                return [*path, (name, child)]
        for name, child in module._modules.items():
            if child is not None and not isinstance(child, nn.ModuleList):
                found = search(child, [*path, (name, child)])
                if found is not None:
                    return found
        return None

    found = search(model.base_model, [("", model.base_model)])
    if found is None:
        raise UserError(
            f"the {count} layers of {type(model).__name__} cannot be found, so it cannot exit early; use another method"
        )
    return found


def view_of(model: PreTrainedModel, layers: list[nn.Module], indices: Sequence[int]) -> Any:
    """Return a shallow copy of the inner model with these layers, in place of those at `indices` of its list."""
    path = _path_to_layers(model)
    child: nn.Module = (NativeStack if isinstance(path[-1][1], NativeStack) else nn.ModuleList)(layers)
    for (_, parent), (name, _) in zip(path[-2::-1], path[:0:-1], strict=True):
        view = copy.copy(parent)
        view.__dict__.pop("forward", None)  # accelerate's hooks put one there that runs the original
        view._modules = {**parent._modules, name: child}
        _cut_kinds(view, indices)
        child = view
    return child


def _cut_kinds(view: Any, indices: Sequence[int]) -> None:
    """Cut lists of attention kinds to the layers, for families that look a layer's kind up by its index."""
    config: Any = getattr(view, "config", None)
    if getattr(config, "layer_types", None):
        view.config = copy.copy(config)
        # Not by assignment: configurations check the length of the list against the number of layers.
        view.config.__dict__["layer_types"] = [config.layer_types[place] for place in indices]


class _Holding(Stand):
    """A layer beside which a hidden state is kept."""

    hidden: Tensor | None = None

    def take(self) -> Tensor:
        hidden, self.hidden = self.hidden, None
        assert hidden is not None
        return hidden


class _Noting(_Holding):
    """Records the layer's output."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.layer(*args, **kwargs)
        self.hidden = output[0] if isinstance(output, tuple) else output
        return output


class _Handed(_Holding):
    """Gives the layer a hidden state from outside instead of its input."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.layer(self.take(), *args, **kwargs)
