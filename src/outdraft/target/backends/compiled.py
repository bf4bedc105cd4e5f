"""Forwards over trees through torch.compile; forwards over prompts stay uncompiled.

A forward is compiled twice: for one token, and for any number of them up to `MOST_TOKENS`, all rows in one line
(`opaque_attention.py`). Weights are frozen into the graphs, so the compiler can pack them and fuse the operations
around them. A graph is compared with the model itself when it is first used. If it cannot be made, or computes
something else, the model runs uncompiled from then on, with one warning. This is for CPUs; GPUs have `graphs.py`.
"""

from __future__ import annotations

import copy
import inspect
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from outdraft.errors import first_line
from outdraft.target.backends.opaque_attention import ATTENTION, Outside, looking_at, stand_in_masks
from outdraft.target.backends.packed import PackedLinear, packed_view, why_not_replaced
from outdraft.target.backends.view import alike, backend_of, mark, marked_as, why_not_renamed, with_attention

MOST_TOKENS = 256
"""Largest number of tokens of all rows for which a forward is compiled."""

FROZEN: dict[str, Any] = {"freezing": True}
"""Settings of the compiler: weights become constants."""

ARGUMENTS = ("line", "positions")
"""Names of a graph's arguments."""

Model = TypeVar("Model", bound=nn.Module)
Forward = Callable[..., tuple[Tensor, ...]]
"""An inner model's forward on `Target.inputs` and `input_ids` or `inputs_embeds`; returns `(rows, tokens, ...)`."""


def why_not_compiled(model: Any) -> str | None:
    """Return why this model cannot be compiled here, None if it can."""
    device = next(model.parameters()).device.type
    if device != "cpu":
        return f"it lies on {device}; backend 'graphs' is for GPUs"
    return why_not_renamed(model) or why_not_replaced(model) or _no_cpp()


def _no_cpp() -> str | None:
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except Exception as error:  # torch's own class for this moves from version to version
        return f"no C++ compiler: {first_line(error)}"
    return None


def compilable_view(model: Model, pack: bool) -> Model:
    """Return a shallow copy of the module tree that can be compiled, and otherwise runs as packed or plain modules.

    Args:
        model: the model, which stays as it is.
        pack: True packs linear layers for calls that run uncompiled.
    """
    view: Any = packed_view(model, _Compilable) if pack else copy.copy(model)
    with_attention(view, ATTENTION)
    return view


class _Compilable(PackedLinear):
    """A packed layer that the compiler sees as a plain one, and packs in its own way."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__(weight, bias)
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return F.linear(x, self.weight, self.bias)
        return super().forward(x)


class CompiledForward:
    """A forward whose calls over few tokens run through graphs, made when first needed.

    Args:
        model: a model of `compilable_view`; graphs are given up for all of its forwards together.
        forward: the forward to compile.
        what: description of the forward, for messages.
    """

    def __init__(self, model: Any, forward: Forward, what: str):
        self.model, self.forward, self.what = model, forward, what
        self.seconds: dict[str, float] = {}
        """Seconds that each graph took to make."""
        self._graphs: dict[tuple[bool, str], Callable[..., tuple[Tensor, ...]]] = {}

    def __call__(self, **inputs: Any) -> tuple[Tensor, ...]:
        given = inputs["input_ids"] if "input_ids" in inputs else inputs["inputs_embeds"]
        if not self._compiles(given, inputs.get("past_key_values")):
            return self.forward(**inputs)
        name = "input_ids" if "input_ids" in inputs else "inputs_embeds"
        key = (given.shape[0] * given.shape[1] == 1, name)
        if key in self._graphs:
            return self._run(self._graphs[key], given, inputs)
        return self._first(key, given, inputs)

    def _compiles(self, given: Tensor, cache: Any) -> bool:
        """Return True if graphs serve this call: over a cache of slots (or several as one), and not over prompts,
        whose rows have nothing committed."""
        few = given.shape[0] * given.shape[1] <= MOST_TOKENS
        return few and marked_as(self.model) == "compiled" and min(getattr(cache, "lengths", [0])) > 0

    def _first(self, key: tuple[bool, str], given: Tensor, inputs: dict[str, Any]) -> tuple[Tensor, ...]:
        """Make the graph, and compare it with the model."""
        single, name = key
        size = "1 token" if single else f"2 to {MOST_TOKENS} tokens"
        print(f"compiling {self.what} over {size} ...", end=" ", file=sys.stderr, flush=True)
        start = time.perf_counter()
        graph = self._compile(single, name, inputs)
        try:
            with translating():
                found = self._run(graph, given, inputs)
            self.seconds[size] = time.perf_counter() - start
            print(f"{self.seconds[size]:.1f} s", file=sys.stderr, flush=True)
            expected = self.forward(**inputs)
            reason = None if alike(found, expected) else "its graph computes something else"
        except Exception as error:  # the compiler's exceptions are of many kinds, and any of them means the same
            print("failed", file=sys.stderr, flush=True)
            expected, reason = self.forward(**inputs), first_line(error)
        if reason is not None:
            mark(self.model, None)
            instead = backend_of(self.model)
            warnings.warn(f"backend 'compiled' cannot serve this model ({reason}); using '{instead}'", stacklevel=4)
            return expected
        self._graphs[key] = graph
        return found

    def _run(self, graph: Callable[..., Any], given: Tensor, inputs: dict[str, Any]) -> tuple[Tensor, ...]:
        rows, tokens = given.shape[:2]
        masks = inputs["attention_mask"]
        count = rows * tokens
        # Fresh tensors: a graph must not see of what kind or how strided those were that they come from.
        line = given.reshape(1, count, *given.shape[2:]).clone(memory_format=torch.contiguous_format)
        positions = inputs["position_ids"].expand(rows, tokens).reshape(1, count).clone()
        real = list(masks.values()) if isinstance(masks, dict) else [masks]
        with looking_at(rows, tokens, real, inputs["past_key_values"]):
            found = graph(line, positions)
        return tuple(part.reshape(rows, tokens, *part.shape[2:]) for part in found)

    def _compile(self, single: bool, name: str, inputs: dict[str, Any]) -> Callable[..., tuple[Tensor, ...]]:
        masks, device, forward = inputs["attention_mask"], inputs["position_ids"].device, self.forward
        kinds = list(masks) if isinstance(masks, dict) else [None]
        stand_ins = stand_in_masks(len(kinds), device)
        mask: Any = dict(zip(kinds, stand_ins, strict=True)) if isinstance(masks, dict) else stand_ins[0]
        cache = Outside()

        def graph(line: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
            around = {"attention_mask": mask, "position_ids": positions, "past_key_values": cache, "use_cache": True}
            return forward(**{name: line}, **around)

        return through_compiler(graph, not single)


@contextmanager
def translating() -> Iterator[None]:
    """Context of a graph's first call, which makes it: weights become its constants.

    `options` reach the compiler too late for this: tracing the model settles whether weights are constants.
    """
    from torch._inductor import config

    with config.patch(FROZEN):
        yield


def through_compiler(graph: Callable[..., Any], dynamic: bool) -> Callable[..., Any]:
    """Return the function, compiled when it is first called.

    Args:
        graph: function of a line of tokens and their positions.
        dynamic: True for lines of any length from 2 on; False for the length that comes first.
    """
    options: dict[str, Any] = {"guard_filter_fn": _of_lengths} | FROZEN
    more: dict[str, Any] = {}
    if "isolate_recompiles" in inspect.signature(torch.compile).parameters:
        more["isolate_recompiles"] = True  # otherwise the graphs of all models count towards one limit
    return torch.compile(graph, dynamic=dynamic, fullgraph=True, options=options, **more)


def _of_lengths(guards: Any) -> list[bool]:
    """Select the compiler's checks to keep before every call: only the length of the line ever changes."""
    return [
        guard.guard_type == "SHAPE_ENV" or (guard.guard_type == "TENSOR_MATCH" and guard.name in ARGUMENTS)
        for guard in guards
    ]
