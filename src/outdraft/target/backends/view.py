"""Tools for views of models on several backends: their mark, renamed attention, and the comparison with the model."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from outdraft.target.backends.packed import PackedLinear

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
