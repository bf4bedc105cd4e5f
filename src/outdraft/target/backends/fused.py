"""Which modules of a model have a fused replacement (`fused_modules.py`): recognised by their parts, and compared.

Modules are recognised by their parts, not by their family. A replacement is used only if it gave the module's results,
on inputs small and large; any other module stays as it is.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from outdraft.target.backends.fused_modules import (
    DIRECT,
    FusedAttention,
    FusedMLP,
    FusedNorm,
    Join,
    Rotation,
    epsilon,
)
from outdraft.target.backends.fused_modules import joined as joined  # backend native joins its weights with it

MAGNITUDES = (1e-3, 1.0, 1e3)
"""Input magnitudes on which a replacement is compared with its module; they show clipping, capping and epsilon."""

TOLERANCE = 1e-4
"""Largest difference of a replacement in single precision, relative to the largest number."""

PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj"}
NORMS = {"q_norm", "k_norm"}
"""Parts of an attention that are norms of single heads, and may be absent."""

TRIED = 5
"""Tokens of an input of the comparison."""


class Doubles:
    """Makes fused replacements for one model, and remembers which kinds of modules have one."""

    def __init__(self, join: Join):
        self.join, self.rotation = join, Rotation()
        self._verdicts: dict[Any, bool] = {}

    def double(self, module: nn.Module) -> nn.Module | None:
        """Return a fused replacement of the module, None if there is none."""
        make = self._maker(module)
        if make is None or any(hooked(part) for part in module.modules()):
            return None
        own = kind(module)
        if own not in self._verdicts:
            self._verdicts[own] = _alike(module, make)
        return make(module, self.join) if self._verdicts[own] else None

    def _maker(self, module: Any) -> Callable[[Any, Join], nn.Module] | None:
        parts, held = set(module._modules), set(module._parameters)
        if any(tensor is not None for tensor in module._buffers.values()):
            return None
        if not parts:
            one = held == {"weight"} and module.weight is not None and module.weight.dim() == 1
            return FusedNorm if one and epsilon(module) is not None else None
        if any(parameter is not None for parameter in module._parameters.values()):
            return None
        if parts == {"gate_proj", "up_proj", "down_proj", "act_fn"}:
            return FusedMLP if linear(module, "gate_proj", "up_proj", "down_proj") else None
        if parts - NORMS == PROJECTIONS and parts & NORMS in (set(), NORMS) and attends(module):
            plain = partial(Doubles.double, self)  # a subclass may replace norms by others than attention takes
            return lambda own, join: FusedAttention(own, join, self.rotation, plain)
        return None


def hooked(module: nn.Module) -> bool:
    """Return True if calls of the module also run hooks, which a replacement would leave out."""
    return "forward" in module.__dict__ or bool(module._forward_hooks or module._forward_pre_hooks)


def linear(module: Any, *names: str) -> bool:
    """Return True if these parts are plain linear layers; if they are to be joined, all or none must have a bias."""
    parts = [module._modules[name] for name in names]
    joined = [part for name, part in zip(names, parts, strict=True) if name not in ("o_proj", "down_proj")]
    return all(type(part) is nn.Linear for part in parts) and len({part.bias is None for part in joined}) == 1


def attends(module: Any) -> bool:
    wanted = {"hidden_states", "position_embeddings", "attention_mask", "past_key_values"}
    if not wanted <= set(inspect.signature(module.forward).parameters):
        return False
    size = getattr(module, "head_dim", None)
    whole = (
        isinstance(size, int)
        and size % 2 == 0
        and not any(part.out_features % size for part in (module.q_proj, module.k_proj, module.v_proj))
    )
    known = all(hasattr(module, name) for name in ("layer_idx", "scaling", "num_key_value_groups"))
    config = getattr(module, "config", None)
    return bool(whole and known and getattr(config, "_attn_implementation", None) in DIRECT)


def kind(module: Any) -> tuple[Any, ...]:
    """Return a key of the module's kind: modules of one kind differ only in weights and position."""
    settings = tuple(
        (name, repr(value))
        for name, value in sorted(vars(module).items())
        if name != "layer_idx" and isinstance(value, bool | int | float | str | tuple | None)
    )
    shapes = tuple((name, tuple(tensor.shape)) for name, tensor in module.state_dict().items())
    return type(module), settings, shapes, id(vars(module).get("config"))


@torch.inference_mode()
def _alike(module: Any, make: Callable[[Any, Join], nn.Module]) -> bool:
    """Return True if a replacement with plain single-precision layers gives the module's results."""
    own = copy.deepcopy(module).float().eval()
    try:
        double = make(own, plain_layer)
        return all(same(own(**given), double(**given)) for given in _inputs(own)) and not turns_a_part(own)
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError):
        return False  # its signature differs from its looks


def _inputs(module: Any) -> list[dict[str, Any]]:
    dice = torch.Generator().manual_seed(0)
    device = next(module.parameters()).device
    first = next((part for part in module.children() if isinstance(part, nn.Linear)), None)
    width = len(module.weight) if first is None else first.in_features
    tried = [torch.randn(1, TRIED, width, generator=dice).to(device) * size for size in MAGNITUDES]
    name = next(iter(inspect.signature(module.forward).parameters))
    if first is None or not hasattr(module, "q_proj"):
        return [{name: x} for x in tried]
    angles = torch.rand(1, TRIED, module.head_dim // 2, generator=dice).to(device).repeat(1, 1, 2) * 6
    mask = torch.ones(TRIED, TRIED, dtype=torch.bool, device=device).tril()[None, None]
    around = {"position_embeddings": (angles.cos(), angles.sin()), "attention_mask": mask, "past_key_values": None}
    return [{name: x, **around} for x in tried]


def turns_a_part(module: Any) -> bool:
    """Return True if the module is an attention that rotates only as much of a head as the tables are wide. A
    replacement rotates all of it, and only a model's forward shows its tables."""
    *_, given = _inputs(module)
    if "position_embeddings" not in given:
        return False
    narrow = tuple(table[..., : module.head_dim // 2] for table in given["position_embeddings"])
    try:
        module(**{**given, "position_embeddings": narrow})
    except RuntimeError:  # sizes that do not fit
        return False
    return True


def plain_layer(weight: Tensor, bias: Tensor | None) -> nn.Module:
    layer: Any = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
    return layer


def same(one: Any, other: Any) -> bool:
    one, other = (x[0] if isinstance(x, tuple) else x for x in (one, other))
    return one.shape == other.shape and bool((one - other).abs().max() <= TOLERANCE * one.abs().max())
