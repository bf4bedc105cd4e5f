"""Backends that run the same forward faster, by name.

`eager` is the model as it is. `graphs` (CUDA) replays forwards over trees as CUDA graphs, with kernels of our own
around the model's products. `packed` (CPU) keeps every linear layer's weight in oneDNN's own blocked layout, around
stock modules. That makes a pass over few tokens several times cheaper than reading plain rows. `compiled` (CPU) runs
forwards over few tokens through torch.compile, and others as `packed` or `eager`. The choice never changes what is
computed, only how; plain decoding is always timed on the same backend.
"""

from __future__ import annotations

import warnings
from typing import Any, Literal, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

from outdraft.errors import UserError
from outdraft.target.backends.compiled import CompiledForward, Forward, compilable_view, why_not_compiled
from outdraft.target.backends.graphs import GraphedForward, Sight, graphs_view, why_not_graphs
from outdraft.target.backends.packed import PACKABLE, PackedLinear, count_parameters, packed_view, packs, why_not_packed
from outdraft.target.backends.tree_attention import has_triton
from outdraft.target.backends.view import backend_of, mark, marked_as

__all__ = [
    "BACKENDS",
    "Backend",
    "CompiledForward",
    "GraphedForward",
    "PackedLinear",
    "Sight",
    "accelerate",
    "avoid_plans",
    "backend_of",
    "best_backend",
    "count_parameters",
    "default_backend",
    "default_dtype",
    "forward_of",
    "why_not_compiled",
    "why_not_graphs",
    "why_not_packed",
]

Backend = Literal["eager", "packed", "compiled", "graphs"]
BACKENDS = ("eager", "packed", "compiled", "graphs")

Model = TypeVar("Model", bound=nn.Module)


def accelerate(model: Model, backend: str) -> Model:
    """Return the model on this backend: itself, or a view that shares everything but what the backend replaces.

    If a backend cannot serve the model, the next simpler one does, with one warning that says why.

    Raises:
        UserError: no such backend.
    """
    if backend not in BACKENDS:
        raise UserError(f"unknown backend '{backend}'; choose one of {', '.join(BACKENDS)}")
    if backend == "eager":
        return model
    if backend == "graphs":
        reason = why_not_graphs(model) if isinstance(model, PreTrainedModel) else None
        if reason is not None:
            warnings.warn(f"backend 'graphs' cannot serve this model ({reason}); using 'eager'", stacklevel=2)
            return model
        view = graphs_view(model)
        if isinstance(model, PreTrainedModel):
            mark(view, "graphs")  # a drafter's network runs with the target's layers
        return view
    unpacked = why_not_packed(model)
    if backend == "compiled" and not isinstance(model, PreTrainedModel):
        return compilable_view(model, pack=unpacked is None)  # a drafter's network, run with the target's layers
    if backend == "compiled":
        reason = why_not_compiled(model)
        if reason is None:
            view = compilable_view(model, pack=unpacked is None)
            mark(view, "compiled")
            return view
        instead = "packed" if unpacked is None else "eager"
        warnings.warn(f"backend 'compiled' cannot serve this model ({reason}); using '{instead}'", stacklevel=2)
    elif unpacked is not None:
        warnings.warn(f"backend 'packed' cannot serve this model ({unpacked}); using 'eager'", stacklevel=2)
    return model if unpacked is not None else packed_view(model)


def forward_of(model: Any, forward: Forward, what: str) -> Forward:
    """Return the forward on the backend that the model is a view for.

    Args:
        model: model whose layers the forward runs.
        forward: takes the inputs of an inner model by name.
        what: description of the forward, for messages.
    """
    found = marked_as(model)
    if found == "graphs":
        return GraphedForward(model, forward, what)
    return CompiledForward(model, forward, what) if found == "compiled" else forward


def best_backend(model: nn.Module) -> Backend:
    """Return the backend that serves this model best on its device."""
    place = next(model.parameters())
    found = default_backend(place.device, place.dtype)
    refused = {"packed": why_not_packed, "graphs": why_not_graphs}
    return "eager" if found in refused and refused[found](model) is not None else found


def default_backend(device: torch.device, dtype: torch.dtype) -> Backend:
    """Return `graphs` on a GPU and `packed` on a CPU if they can serve, else `eager`."""
    if device.type == "cuda":
        return "graphs" if has_triton() else "eager"
    return "packed" if device.type == "cpu" and dtype in PACKABLE and packs(dtype) else "eager"


def avoid_plans() -> None:
    """Keep torch's attention off cuDNN, for the whole process. It makes a plan for every new length, which took 41 to
    58 ms on an H200, and in decoding every length is new."""
    torch.backends.cuda.enable_cudnn_sdp(False)


def default_dtype(device: torch.device) -> torch.dtype:
    """Return bfloat16 if the processor multiplies it in hardware, else float32."""
    if device.type == "cpu":
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return torch.bfloat16 if fast else torch.float32
    if device.type == "cuda" and not torch.cuda.is_bf16_supported():
        return torch.float16
    return torch.bfloat16
