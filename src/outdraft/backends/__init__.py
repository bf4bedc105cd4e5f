"""Accelerations of the same forward, by name.

`eager` is the model as it is. `packed` (CPU) keeps every linear layer's weight in oneDNN's own blocked layout, which
makes a pass over few tokens several times cheaper than reading plain rows; stock modules stay around it. `compiled`
runs forwards over few tokens through torch.compile, and others as `packed` or `eager` would. The choice never changes
what is computed, only how; plain decoding is always timed on the same backend. Knows nothing of drafting.
"""

from __future__ import annotations

import warnings
from typing import Literal, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

from outdraft.backends.compiled import (
    CompiledForward,
    backend_of,
    compilable_view,
    forward_of,
    marked,
    why_not_compiled,
)
from outdraft.backends.packed import PACKABLE, PackedLinear, count_parameters, packed_view, packs, why_not_packed
from outdraft.errors import UserError

__all__ = [
    "BACKENDS",
    "Backend",
    "CompiledForward",
    "PackedLinear",
    "accelerate",
    "backend_of",
    "count_parameters",
    "default_backend",
    "default_dtype",
    "forward_of",
    "why_not_compiled",
    "why_not_packed",
]

Backend = Literal["eager", "packed", "compiled"]
BACKENDS = ("eager", "packed", "compiled")

Model = TypeVar("Model", bound=nn.Module)


def accelerate(model: Model, backend: str) -> Model:
    """The model on this backend: itself, or a view that shares everything but what the backend replaces.

    A backend that cannot serve the model gives way to the next simpler one, with one warning that says why.

    Raises:
        UserError: no such backend.
    """
    if backend not in BACKENDS:
        raise UserError(f"unknown backend '{backend}'; choose one of {', '.join(BACKENDS)}")
    if backend == "eager":
        return model
    unpacked = why_not_packed(model)
    if backend == "compiled" and not isinstance(model, PreTrainedModel):
        return compilable_view(model, pack=unpacked is None)  # a drafter's network, run with the target's layers
    if backend == "compiled":
        reason = why_not_compiled(model)
        if reason is None:
            return marked(compilable_view(model, pack=unpacked is None))
        instead = "packed" if unpacked is None else "eager"
        warnings.warn(f"backend 'compiled' cannot serve this model ({reason}); using '{instead}'", stacklevel=2)
    elif unpacked is not None:
        warnings.warn(f"backend 'packed' cannot serve this model ({unpacked}); using 'eager'", stacklevel=2)
    return model if unpacked is not None else packed_view(model)


def default_backend(device: torch.device, dtype: torch.dtype) -> Backend:
    """`packed` where it can serve, else `eager`."""
    return "packed" if device.type == "cpu" and dtype in PACKABLE and packs(dtype) else "eager"


def default_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the processor multiplies it in hardware, else float32."""
    if device.type == "cpu":
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return torch.bfloat16 if fast else torch.float32
    if device.type == "cuda" and not torch.cuda.is_bf16_supported():
        return torch.float16
    return torch.bfloat16
