"""A stock model cut in two at a layer, without a copy: its first layers, the rest, and a layer of one's own at the end;
or whole, telling what some of its layers give.

A view is a shallow copy of the inner model whose list of layers is a slice of the same modules. The layers keep their
place in the cache, so both parts write to one `SlotCache`. What goes over the cut is the hidden state: the lower part's
last layer notes what it gives, and the upper part's first layer is handed that in place of its input, so what a family
does to its embeddings (scaling, learned positions) does not matter.

Knows how inner models of `transformers` are built; nothing of trees, drafting or training.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from outdraft.errors import UserError
from outdraft.target.backends import forward_of


class Cut:
    """An inner model cut after its first `layers` layers.

    Args:
        model: a causal language model, on any backend.
        layers: of the lower part, at least 1 and less than the model has.

    Raises:
        UserError: no such layer, or the model's layers cannot be found.
    """

    def __init__(self, model: PreTrainedModel, layers: int):
        self._model: Any = model
        total = len(layers_of(model))
        if not 1 <= layers < total:
            raise UserError(f"the exit layer must be between 1 and {total - 1} for this model, not {layers}")
        self.layers = layers
        modules = list(layers_of(model))
        self._noting, self._handed = _Noting(modules[layers - 1]), _Handed(modules[layers])
        self._lower = view_of(model, [*modules[: layers - 1], self._noting], range(layers))
        self._upper = view_of(model, [self._handed, *modules[layers + 1 :]], range(layers, total))
        self._run_lower = forward_of(model, self._noted, "the first layers")
        self._run_upper = forward_of(model, self._continued, "the other layers")

    def lower(self, **inputs: Any) -> Tensor:
        """Run the first layers as the model would be run; `(rows, tokens, hidden)` what the last of them gives."""
        return self._run_lower(**inputs)[0]

    def upper(self, hidden: Tensor, **inputs: Any) -> Tensor:
        """Run the other layers on that; `(rows, tokens, hidden)` features after the final norm."""
        return self._run_upper(inputs_embeds=hidden, **inputs)[0]

    def _noted(self, **inputs: Any) -> tuple[Tensor, ...]:
        self._lower(**inputs)
        return (self._noting.take(),)

    def _continued(self, inputs_embeds: Tensor, **inputs: Any) -> tuple[Tensor, ...]:
        return (self._handed.run(self._upper, inputs_embeds, **inputs),)

    def both(self, **inputs: Any) -> tuple[Tensor, Tensor]:
        """Run all layers at once: what `lower` and what `upper` give."""
        hidden = self.lower(**inputs)
        rest = {name: value for name, value in inputs.items() if name != "input_ids"}
        return hidden, self.upper(hidden, **rest)


class Tapped:
    """An inner model that tells what some of its layers give, beside its features.

    Args:
        model: a causal language model, on any backend.
        layers: counted from 1, in the order in which they are told, the last one not among them.

    Raises:
        UserError: no such layer, or the model's layers cannot be found.
    """

    def __init__(self, model: PreTrainedModel, layers: Sequence[int]):
        modules = list(layers_of(model))
        if odd := [layer for layer in layers if not 1 <= layer < len(modules)]:
            raise UserError(f"layers to read must be between 1 and {len(modules) - 1} for this model, not {odd[0]}")
        self._layers = list(layers)
        self._noting = {layer: _Noting(modules[layer - 1]) for layer in layers}
        for layer, noting in self._noting.items():
            modules[layer - 1] = noting
        self._inner = view_of(model, modules, range(len(modules)))
        self._run = forward_of(model, self._tapping, "the target with its taps")

    def __call__(self, **inputs: Any) -> Tensor:
        """Run the model; `(rows, tokens, (1 + layers) * hidden)` its features, then what each of the layers gives."""
        return self._run(**inputs)[0]

    def _tapping(self, **inputs: Any) -> tuple[Tensor, ...]:
        features = self._inner(**inputs).last_hidden_state
        given = {layer: noting.take() for layer, noting in self._noting.items()}
        return (torch.cat([features, *(given[layer] for layer in self._layers)], dim=-1),)


class ExitView:
    """A layer of one's own on hidden states of the model, with the model's final norm after it.

    Args:
        model: whose inner model lends everything but the layer.
        layer: a module like the model's last layer.
    """

    def __init__(self, model: PreTrainedModel, layer: nn.Module):
        self._handed = _Handed(layer)
        self._inner = view_of(model, [self._handed], [len(layers_of(model)) - 1])
        self._run = forward_of(model, self._exiting, "the exit layer")

    def __call__(self, hidden: Tensor, **inputs: Any) -> Tensor:
        """`(rows, tokens, hidden)` to as many features after the final norm; other inputs as the model takes them."""
        return self._run(inputs_embeds=hidden, **inputs)[0]

    def _exiting(self, inputs_embeds: Tensor, **inputs: Any) -> tuple[Tensor, ...]:
        return (self._handed.run(self._inner, inputs_embeds, **inputs),)


class Shortcut:
    """The first layers and a layer of one's own right after them, in one run that notes what goes over between them.

    Args:
        model: a causal language model, on any backend.
        layers: of the model that come first, as in `Cut`.
        layer: a module like the model's last layer.
    """

    def __init__(self, model: PreTrainedModel, layers: int, layer: nn.Module):
        modules = list(layers_of(model))
        self._noting = _Noting(modules[layers - 1])
        places = [*range(layers), len(modules) - 1]
        self._inner = view_of(model, [*modules[: layers - 1], self._noting, layer], places)
        self._run = forward_of(model, self._shortcut, "the first layers and the exit layer")

    def __call__(self, **inputs: Any) -> tuple[Tensor, Tensor]:
        """Run it as the model would be run.

        Returns:
            both `(rows, tokens, hidden)`: what `Cut.lower` gives, and what `ExitView` makes of it.
        """
        hidden, features = self._run(**inputs)
        return hidden, features

    def _shortcut(self, **inputs: Any) -> tuple[Tensor, ...]:
        features = self._inner(**inputs).last_hidden_state
        return self._noting.take(), features


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

    def run(self, inner: Any, hidden: Tensor, **inputs: Any) -> Tensor:
        self.hidden = hidden
        return inner(inputs_embeds=hidden, **inputs).last_hidden_state

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.layer(self.take(), *args, **kwargs)
