"""Forwards over pending tokens that read their ancestor mask and lengths themselves; no mask over the cache is made.

When a forward first runs this way it is compared with the model's own attention. If it computes something else, the
model runs without, with one warning.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from outdraft.errors import first_line
from outdraft.target.backends.tree_attention import Pending, Storing, running_over
from outdraft.target.backends.view import alike

Forward = Callable[..., tuple[Tensor, ...]]
"""An inner model's forward on `Target.inputs` and `input_ids` or `inputs_embeds`; returns `(rows, tokens, ...)`."""


@dataclass
class Sight:
    """The ancestor mask and positions of a forward, before a mask is made; `Target.inputs` passes it as the mask.

    Attributes:
        seen, slots, positions: as in `tree.attention_mask`, of all `m` pending tokens.
        lengths: committed tokens of every row.
        windows: sliding windows by kind of layer.
        masks: makes the masks that `transformers` takes.
    """

    seen: Tensor
    slots: Tensor
    positions: Tensor
    lengths: list[int]
    windows: dict[str, int | None]
    masks: Callable[[], Any]

    @property
    def alone(self) -> bool:
        """True if every token sees only itself, which no attention could get wrong."""
        return self.seen.shape[2] == 1 and max(self.lengths) == 0


class TreeForward:
    """A forward over pending tokens.

    Args:
        model: a view of a model whose attention is tree attention.
    """

    def __init__(self, model: Any, forward: Forward, what: str, backend: str):
        self.model, self.forward, self.what, self.backend = model, forward, what, backend
        self.serves = True
        """True while the forward computes what the model computes."""
        self._compared = False

    def __call__(self, **inputs: Any) -> tuple[Tensor, ...]:
        sight, cache = inputs.pop("attention_mask"), inputs.get("past_key_values")
        if not isinstance(sight, Sight):
            return self.forward(attention_mask=sight, **inputs)
        if not self.serves:
            return self.forward(attention_mask=sight.masks(), **inputs)
        name = "input_ids" if "input_ids" in inputs else "inputs_embeds"
        if not self._compared and not sight.alone:
            return self._first(name, inputs[name], sight, inputs)
        return self._over(name, inputs[name], sight, cache)

    def _over(self, name: str, given: Tensor, sight: Sight, cache: Any) -> tuple[Tensor, ...]:
        return self.over(name, given, self._pending(sight, cache))

    def _pending(self, sight: Sight, cache: Any) -> Pending:
        device = sight.seen.device
        lengths = torch.tensor(sight.lengths, dtype=torch.int32, device=device)
        return Pending(lengths, sight.seen, sight.positions, tuple(sight.windows.values()), cache)

    def over(self, name: str, given: Tensor, pending: Pending) -> tuple[Tensor, ...]:
        kinds = [torch.ones(1, 1, 1, 1 + i, dtype=torch.bool, device=given.device) for i in range(len(pending.windows))]
        config = self.model.config.get_text_config()
        several = len(kinds) > 1
        mask: Any = dict(zip(dict.fromkeys(config.layer_types), kinds, strict=True)) if several else kinds[0]
        positions = pending.positions[:, -given.shape[1] :]
        around = {"attention_mask": mask, "position_ids": positions, "past_key_values": Storing(), "use_cache": True}
        with running_over(pending):
            return self.forward(**{name: given}, **around)

    def _first(self, name: str, given: Tensor, sight: Sight, inputs: dict[str, Any]) -> tuple[Tensor, ...]:
        """Run the first call both ways and compare."""
        self._compared, reason = True, None
        expected = self.forward(attention_mask=sight.masks(), **inputs)
        try:  # second, so that the cache holds what this forward computes, like that of later calls
            found = self.over(name, given, self._pending(sight, inputs["past_key_values"]))
        except Exception as error:  # modules of any family; whatever they raise means the same
            reason = first_line(error)
        if reason is None and not alike(found, expected):
            reason = "it computes something else"
        if reason is None:
            return found
        self.serves = False
        expected = self.forward(attention_mask=sight.masks(), **inputs)  # writes the cache anew
        warnings.warn(
            f"{self.what} cannot run on backend '{self.backend}' ({reason}); it runs as 'eager'", stacklevel=4
        )
        return expected
