"""Forwards over pending tokens that read their ancestor mask and lengths themselves; no mask over the cache is made.

When a forward first runs this way it is compared with the model's own attention. If it computes something else, the
model runs without, with one warning. Views of models carry the mark of their backend and an attention of another name.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from outdraft.core.tensors import sent
from outdraft.errors import first_line
from outdraft.target.backends.packed import PackedLinear
from outdraft.target.backends.tree_attention import Pending, Storing, running_over

MARK = "_outdraft_backend"

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
"""Largest difference of a result from the model's own, relative to its norm."""

ROUGH = 0.2
"""Largest relative difference in 16 bits, of the middle token: on some tokens, such as one over and over, models are
chaotic, and a forward that computes something else differs at most of them."""


def why_not_renamed(model: Any) -> str | None:
    """Return why the model cannot use an attention of another name (`with_attention`), None if it can."""
    if getattr(model.config.get_text_config(), "_attn_implementation", None) != "sdpa":
        return "its attention is not 'sdpa'"
    # Families of an older make look at the name themselves, and take one that they do not know for 'eager'.
    return None if getattr(model, "_supports_attention_backend", False) else "its attention cannot be replaced"


def with_attention(view: Any, name: str, configs: dict[int, Any] | None = None) -> None:
    """Make every module of a view use the attention of this name, by configs and modules of its own.

    Args:
        view: a copy, whose own tables may be changed.
        configs: configs made so far, by the original's id.
    """
    configs = {} if configs is None else configs
    config = view.__dict__.get("config")
    if getattr(config, "_attn_implementation", None) == "sdpa":  # other attentions take more than masks, such as sinks
        if id(config) not in configs:
            configs[id(config)] = own = copy.deepcopy(config)
            own._attn_implementation = name
        view.__dict__["config"] = configs[id(config)]
    own_modules = {name: copy.copy(child) for name, child in view._modules.items()}
    view._modules = own_modules
    for child in own_modules.values():
        if child is not None:
            with_attention(child, name, configs)


def alike(some: tuple[Tensor, ...], others: tuple[Tensor, ...]) -> bool:
    """Return True if two results differ by no more than rounding."""
    for one, other in zip(some, others, strict=True):
        least = TOLERANCE.get(other.dtype)
        one, other = one.double(), other.double()
        apart, size = ((one - other).norm(), other.norm()) if least else _of_tokens(one - other, other)
        if not bool(apart <= (least or ROUGH) * size):
            return False
    return True


def _of_tokens(difference: Tensor, whole: Tensor) -> tuple[Tensor, Tensor]:
    """Return the middle token's relative difference, and one."""
    relative = (difference.norm(dim=-1) / whole.norm(dim=-1).clamp(min=1e-30)).flatten()
    return relative.median(), torch.ones(())


def mark(view: Any, backend: str | None) -> None:
    """Mark a view with the backend of its forwards, for `forward_of`; None: as its modules are."""
    view.__dict__[MARK] = backend


def marked_as(model: Any) -> str | None:
    """Return the backend that `mark` set, or None."""
    return getattr(model, MARK, None)


def backend_of(model: nn.Module) -> str:
    """Return the backend that `accelerate` chose for this model."""
    if (found := marked_as(model)) is not None:
        return found
    return "packed" if any(isinstance(module, PackedLinear) for module in model.modules()) else "eager"


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
        lengths = sent(sight.lengths, sight.seen.device, torch.int32)
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
