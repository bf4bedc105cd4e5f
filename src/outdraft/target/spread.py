"""Layers on several devices: what all of them read crosses to a device once a forward.

A model that was loaded with a device map has hooks of accelerate, which bring a layer's inputs to its device. They send
masks and positions anew for every layer, as they know nothing of each other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn


class Stand(nn.Module):
    """Replaces a layer and shows its attributes; it holds no weight of its own."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)


class Sharing(Stand):
    """A layer that takes over what an earlier one of the same forward has brought to its device.

    Args:
        device: the device to which its hook brings its inputs, as it is named there; None leaves them where they are.
        brought: what has been brought in this forward, by its identity and the device: the tensor and its copy.
    """

    def __init__(self, layer: nn.Module, device: Any, brought: dict[Any, tuple[Tensor, Tensor]]):
        super().__init__(layer)
        self._device, self._brought = device, brought
        self.first = self.last = False
        """Whether it is the first or the last layer of a forward."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.first:
            self._brought.clear()
        if self._device is not None:
            args, kwargs = each(self._there, args), each(self._there, kwargs)
        output = self.layer(hidden_states, *args, **kwargs)
        if self.last:
            self._brought.clear()
        return output

    def _there(self, given: Tensor) -> Tensor:
        key = id(given), self._device
        if key not in self._brought:
            self._brought[key] = given, given.to(self._device)  # as long as it is kept, its identity is its own
        return self._brought[key][1]


def each(change: Callable[[Tensor], Tensor], given: Any) -> Any:
    """Return arguments with every tensor in them changed."""
    if isinstance(given, Tensor):
        return change(given)
    if type(given) in (tuple, list):
        return type(given)(each(change, part) for part in given)
    return {name: each(change, part) for name, part in given.items()} if type(given) is dict else given


def place_of(layer: nn.Module) -> Any:
    """Return the device to which a layer's hook brings its inputs, as it is named there; None without such a hook."""
    return getattr(getattr(layer, "_hf_hook", None), "execution_device", None)


def beside_embedding(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """Return a forward's inputs with positions on the embedding's device: the part that turns these into rotations need
    not have a hook, and then meets the embedding's output."""
    if "position_ids" not in inputs:
        return inputs
    embedding = model.get_input_embeddings()
    place = place_of(embedding)
    return {**inputs, "position_ids": inputs["position_ids"].to(embedding.weight.device if place is None else place)}


def sharing(layers: Sequence[nn.Module]) -> list[nn.Module]:
    """Return the layers of one forward, in their order, each with its inputs brought to the device of its hook."""
    shared: dict[Any, tuple[Tensor, Tensor]] = {}
    made = [Sharing(layer, place_of(layer), shared) for layer in layers]
    made[0].first = made[-1].last = True
    return list(made)
