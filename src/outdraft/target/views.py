"""Views of a stock model's layers, without a copy: whole or in two parts, telling what some of its layers give.

A view is a shallow copy of the inner model whose list of layers is a slice of the same modules. The layers keep their
place in the cache, so both parts write to one `SlotCache`. A part's last layer notes what it gives, and the next part's
first layer is handed that in place of its input, so what a family does to its embeddings (scaling, learned positions)
does not matter.
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


@dataclass(frozen=True)
class Reads:
    """What somebody reads of the target for every token; the states lie side by side in this order."""

    features: bool = True
    """The last hidden state after the final norm."""
    layers: tuple[int, ...] = ()
    """The outputs of these layers, counted from 1, the last one not among them."""
    split: int | None = None
    """After this layer the target runs in two parts, so that the first part may run ahead over candidates."""


class View:
    """Some layers of a model, run as the model would be, with its final norm after them.

    Args:
        model: a causal language model, on any backend.
        modules: the layers, the model's own or others like them.
        places: of each in the model's list, by which families look up its kind of attention.
        what: the view is, for messages.
        notes: indices of modules whose outputs are told.
        handed: whether hidden states come in, in place of tokens.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        modules: Sequence[nn.Module],
        places: Sequence[int],
        what: str,
        notes: Sequence[int] = (),
        handed: bool = False,
    ):
        own, self._handed = list(modules), None
        if handed:
            own[0] = self._handed = _Handed(own[0])
        self._noting = [_Noting(own[index]) for index in notes]
        for index, noting in zip(notes, self._noting, strict=True):
            own[index] = noting
        self._inner = view_of(model, own, places)
        self._run = forward_of(model, self._forward, what)

    def __call__(self, hidden: Tensor | None = None, **inputs: Any) -> tuple[Tensor, ...]:
        """Run the layers.

        Args:
            hidden: `(rows, tokens, hidden)` what the first layer is handed; others take `input_ids`.
            **inputs: as the inner model takes them.

        Returns:
            `(rows, tokens, hidden)` features after the final norm, then what each noted module gave.
        """
        return self._run(**inputs) if hidden is None else self._run(inputs_embeds=hidden, **inputs)

    def _forward(self, **inputs: Any) -> tuple[Tensor, ...]:
        if self._handed is not None:
            self._handed.hidden = inputs["inputs_embeds"]
        features = self._inner(**inputs).last_hidden_state
        return (features, *(noting.take() for noting in self._noting))


class Reader:
    """A model that tells what is read of it, whole or in two parts.

    Args:
        model: a causal language model, on any backend.
        reads: what is read.

    Raises:
        UserError: no such layer, or the model's layers cannot be found.
    """

    def __init__(self, model: PreTrainedModel, reads: Reads):
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
        places = range(first, total)
        self._last = View(model, modules[first:], places, name, notes, handed=split is not None)
        self._first = None
        if split is not None:
            notes = [layer - 1 for layer in below]
            self._first = View(model, modules[:split], range(split), "the first layers", notes)

    def __call__(self, **inputs: Any) -> tuple[Tensor, Tensor]:
        """Run all layers; `(rows, tokens, hidden)` features and `(rows, tokens, width)` what is read."""
        if self._first is None:
            features, *noted = self._last(**inputs)
            return features, self._read(features, noted)
        carried = self.lower(**inputs)
        return self.upper(carried, **{name: value for name, value in inputs.items() if name != "input_ids"})

    def lower(self, **inputs: Any) -> Tensor:
        """Run the first part as the model would be run; `(rows, tokens, carried)` what `upper` needs of it, which
        begins with the hidden state."""
        assert self._first is not None, "reads no split"
        _, *noted = self._first(**inputs)
        return _beside(noted)

    def upper(self, carried: Tensor, **inputs: Any) -> tuple[Tensor, Tensor]:
        """Run the second part on that; features and what is read, as `__call__`."""
        below = list(carried.chunk(self._below, dim=-1)) if self._below > 1 else [carried]
        features, *above = self._last(below[0], **inputs)
        return features, self._read(features, below + above)

    def _read(self, features: Tensor, noted: Sequence[Tensor]) -> Tensor:
        given = dict(zip(self._noted, noted, strict=True))
        return _beside([features] * self.reads.features + [given[layer] for layer in self.reads.layers])


def _beside(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=-1)


def exit_view(model: PreTrainedModel, layer: nn.Module) -> View:
    """A layer of one's own on hidden states that are handed in, with the model's final norm after it."""
    return View(model, [layer], [len(layers_of(model)) - 1], "the exit layer", handed=True)


def shortcut_view(model: PreTrainedModel, layers: int, layer: nn.Module) -> View:
    """The model's first layers and one's own layer right after them, in one run that notes what goes over between."""
    modules = list(layers_of(model))
    places = [*range(layers), len(modules) - 1]
    return View(model, [*modules[:layers], layer], places, "the first layers and the exit layer", [layers - 1])


def layers_of(model: PreTrainedModel) -> nn.ModuleList:
    """The model's own list of layers.

    Raises:
        UserError: there is no such list.
    """
    return _path_to_layers(model)[-1][1]  # type: ignore[return-value]


def _path_to_layers(model: PreTrainedModel) -> list[tuple[str, nn.Module]]:
    """From the inner model down to its list of layers, each with its name in the one before."""
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


def view_of(model: PreTrainedModel, layers: list[nn.Module], places: Sequence[int]) -> Any:
    """A shallow copy of the inner model with these layers, which stand for those at these places of its list."""
    path = _path_to_layers(model)
    child: nn.Module = nn.ModuleList()
    child._modules = {str(i): layer for i, layer in enumerate(layers)}
    for (_, parent), (name, _) in zip(path[-2::-1], path[:0:-1], strict=True):
        view = copy.copy(parent)
        view.__dict__.pop("forward", None)  # accelerate's hooks put one there that runs the original
        view._modules = {**parent._modules, name: child}
        _cut_kinds(view, places)
        child = view
    return child


def _cut_kinds(view: Any, places: Sequence[int]) -> None:
    """Families with several kinds of attention look a layer's kind up by its place in the list."""
    config: Any = getattr(view, "config", None)
    if getattr(config, "layer_types", None):
        view.config = copy.copy(config)
        # Not by assignment: configurations check the length of the list against the number of layers.
        view.config.__dict__["layer_types"] = [config.layer_types[place] for place in places]


class _Stand(nn.Module):
    """In place of a layer, whose attributes it shows; it holds no weight of its own."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer
        self.hidden: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)

    def take(self) -> Tensor:
        hidden, self.hidden = self.hidden, None
        assert hidden is not None
        return hidden


class _Noting(_Stand):
    """Notes what the layer gives."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.layer(*args, **kwargs)
        self.hidden = output[0] if isinstance(output, tuple) else output
        return output


class _Handed(_Stand):
    """Gives the layer the hidden state that was handed in, whatever comes to it."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.layer(self.take(), *args, **kwargs)
