"""Stock linear layers whose weights lie in the kernels' layout alone, so that a model takes its memory once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from outdraft.target.backends.native.weights import Weight

STAYS = 8
"""Readings after which a weight stays laid out, as something else than our kernels seems to run the layer."""


class ReleasedLinear(nn.Linear):
    """A stock linear layer without a weight of its own: whoever reads the weight gets it laid out anew.

    `release` makes it of a plain layer, which it becomes again after `STAYS` readings, and before it is copied, moved
    or loaded into. Its parameter is on the device `meta`.
    """

    _packed: tuple[Weight, slice]
    _readings: int

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        packed, rows = self._packed
        shown = self._parameters["weight"]
        assert shown is not None
        with torch.inference_mode(False), torch.no_grad():
            laid_out = packed.dense()[rows].clone() if packed.outputs > self.out_features else packed.dense()
        found = nn.Parameter(laid_out, requires_grad=shown.requires_grad)
        self._readings += 1
        if self._readings >= STAYS:
            self._keep(found)
        return found

    def restore(self) -> None:
        """Make the layer plain again."""
        self._keep(self.weight)

    def _keep(self, weight: Any) -> None:
        if type(self) is ReleasedLinear:
            del self._packed, self._readings
            self.__class__ = nn.Linear  # type: ignore[assignment]
            self._parameters["weight"] = weight

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self.restore()
        return nn.Linear._apply(self, *args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.restore()
        nn.Linear._load_from_state_dict(self, *args, **kwargs)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self.weight if keep_vars else self.weight.detach()

    def __reduce_ex__(self, protocol: Any) -> Any:
        self.restore()
        return nn.Linear.__reduce_ex__(self, protocol)


def release(layers: Sequence[nn.Linear], packed: Weight) -> None:
    """Take the weights of plain layers away, which lie one below the other in `packed`."""
    begin = 0
    for layer in layers:
        shown = torch.empty_like(layer.weight, device="meta")
        layer._parameters["weight"] = nn.Parameter(shown, requires_grad=layer.weight.requires_grad)
        layer.__class__ = ReleasedLinear
        layer._packed, layer._readings = (packed, slice(begin, begin + layer.out_features)), 0  # type: ignore[assignment]
        begin += layer.out_features
