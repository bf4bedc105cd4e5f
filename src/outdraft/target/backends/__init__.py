"""Backends that run the same forward faster, by name.

`eager` is the model as it is. `graphs` (CUDA) replays forwards over trees as CUDA graphs, with kernels of our own
around the model's products. `native` (CPU) runs whole layers by kernels of our own, compiled on the machine, at the
speed of its memory; `native-int8`, `native-int4` and `native-gguf` do so on quantised weights. `packed` (CPU) keeps
every linear layer's weight in oneDNN's own blocked layout, around stock modules; it serves families that `native` does
not, and machines without a compiler. The choice never changes what is computed, only how (but for the quantised
weights); plain decoding is always timed on the same backend.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from outdraft.errors import UserError
from outdraft.target.backends.graphs import GraphedForward, graphs_view, why_not_graphs
from outdraft.target.backends.native import (
    native_view,
    quantised_view,
    why_not_native,
    why_not_native_model,
    why_not_parts,
    why_not_quantised,
)
from outdraft.target.backends.packed import PACKABLE, PackedLinear, count_parameters, packed_view, packs, why_not_packed
from outdraft.target.backends.tree_attention import has_triton
from outdraft.target.backends.tree_forward import Forward, Sight, TreeForward, backend_of, mark, marked_as

__all__ = [
    "BACKENDS",
    "Backend",
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
    "is_native",
    "refuse_before_loading",
    "refuse_unquantisable",
    "simple_backend",
    "unloaded",
    "why_not_graphs",
    "why_not_native",
    "why_not_native_model",
    "why_not_packed",
]

Backend = Literal["eager", "packed", "native", "native-int8", "native-int4", "native-gguf", "graphs"]
BACKENDS = ("eager", "packed", "native", "native-int8", "native-int4", "native-gguf", "graphs")

QUANTISED = {"native-int8": 8, "native-int4": 4, "native-gguf": None}
"""Bits of the weights on backends that quantise them; None takes the blocks of the GGUF file."""

SIMPLER: dict[str, tuple[Backend, ...]] = {"native": ("packed", "eager"), "packed": ("eager",), "graphs": ("eager",)}
"""Backends that serve in place of one that cannot, in order."""

WHY_NOT: dict[str, Callable[[Any], str | None]] = {
    "native": why_not_native_model,
    "packed": why_not_packed,
    "graphs": why_not_graphs,
}
WHY_NOT_PARTS: dict[str, Callable[[Any], str | None]] = {
    "native": why_not_parts,
    "packed": why_not_packed,
    "graphs": lambda network: None,
}
VIEWS: dict[str, Callable[[Any], Any]] = {"packed": packed_view, "graphs": graphs_view}

Model = TypeVar("Model", bound=nn.Module)


def accelerate(model: Model, backend: str, owned: bool = False) -> Model:
    """Return the model on this backend: itself, or a view that shares everything but what the backend replaces.

    If a backend cannot serve the model, the next simpler one does, with one warning that says why.

    Args:
        owned: True if nobody else uses the model, whose weights need not stay as they are beside the backend's.

    Raises:
        UserError: no such backend.
    """
    if backend == "compiled":
        warnings.warn("backend 'compiled' is gone; 'native' takes its place", DeprecationWarning, stacklevel=2)
        backend = "native"
    if backend not in BACKENDS:
        raise UserError(f"unknown backend '{backend}'; choose one of {', '.join(BACKENDS)}")
    whole = isinstance(model, PreTrainedModel)  # a drafter's network runs with the target's layers
    if backend in QUANTISED and whole:
        refuse_unquantisable(model, backend)
        view: Any = quantised_view(model, QUANTISED[backend], owned)
        mark(view, backend)
        return view
    backend = "native" if backend in QUANTISED else backend
    view = model
    for name in (backend, *SIMPLER.get(backend, ())):
        if name == "eager":
            return model
        reason = (WHY_NOT if whole else WHY_NOT_PARTS)[name](model)
        if reason is None:
            heads: Any = () if whole else getattr(model, "own_heads", ())  # of a drafter, which decides no tokens
            view = native_view(model, owned and whole, heads) if name == "native" else VIEWS[name](model)
            break
        instead = SIMPLER[name][0]
        warnings.warn(f"backend '{name}' cannot serve this model ({reason}); using '{instead}'", stacklevel=2)
    if whole and name != "packed":
        mark(view, name)
    return view


def refuse_unquantisable(model: Any, backend: str) -> None:
    """Raise a UserError if a backend that quantises weights cannot serve the model."""
    if (reason := why_not_quantised(model, QUANTISED[backend])) is not None:
        raise UserError(f"backend '{backend}' cannot serve this model ({reason}); quantise it with torchao instead")


def forward_of(model: Any, forward: Forward, what: str) -> Forward:
    """Return the forward on the backend that the model is a view for.

    Args:
        model: model whose layers the forward runs.
        forward: takes the inputs of an inner model by name.
    """
    found = marked_as(model)
    if found == "graphs":
        return GraphedForward(model, forward, what)
    return TreeForward(model, forward, what, found) if found is not None and is_native(found) else forward


def is_native(backend: str) -> bool:
    """Return True for the backends on our CPU kernels."""
    return backend == "native" or backend in QUANTISED


def best_backend(model: nn.Module) -> Backend:
    """Return the backend that serves this model best on its device."""
    place = next(model.parameters())
    found = default_backend(place.device, place.dtype)
    while found != "eager" and WHY_NOT[found](model) is not None:
        found = SIMPLER[found][0]
    return found


def default_backend(device: torch.device, dtype: torch.dtype) -> Backend:
    """Return `graphs` on a GPU and `native` on a CPU if they can serve, else a simpler one."""
    if device.type == "cuda":
        return "graphs" if has_triton() else "eager"
    native = device.type == "cpu" and dtype in PACKABLE and why_not_native() is None
    return "native" if native else simple_backend(device, dtype)


def simple_backend(device: torch.device, dtype: torch.dtype) -> Backend:
    """Return the backend of a drafter whose target runs as it is."""
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


def unloaded(config: Any, dtype: torch.dtype, device: str | torch.device = "cpu", **options: Any) -> Any:
    """Build a model of a configuration, with random weights that take no memory: their rows are windows of one row of
    numbers. So a backend says before anything is loaded that it cannot serve a model."""
    dice = torch.Generator().manual_seed(0)

    def filled(part: Tensor) -> Tensor:
        numbers = torch.randn(sum(part.shape) + 1, generator=dice) * (0.02 if part.ndim > 1 else 1)
        return numbers.to(device, part.dtype).as_strided(part.shape, [1] * part.ndim)

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, **options)
    return model._apply(filled).eval()


def refuse_before_loading(
    path: str, dtype: torch.dtype, device: torch.device, trust_remote_code: bool, backend: str
) -> None:
    """Raise the UserError of a backend that cannot quantise a model, as far as is known before it is loaded."""
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        model = unloaded(config, dtype, device, trust_remote_code=trust_remote_code)
    except Exception:  # of any library; loading the model tells the user
        return
    refuse_unquantisable(model, backend)
