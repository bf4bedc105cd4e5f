"""What `torch.cuda` and Triton offer on a machine whose CUDA devices are pretended (`pretended.py`), and its rounds."""

from __future__ import annotations

import ctypes
import sys
import types
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from outdraft.engine.round import Batch
from outdraft.target import backends
from outdraft.target.backends import graphs, packed, tree_attention
from pretended import Device, OnDevice, numbered


def _let_devices_change() -> None:
    """Let torch's C++ change the current CUDA device, which a build without CUDA refuses: by the guard of `meta`."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    table = (ctypes.c_void_p * 22).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    cuda, meta = 1, 14  # c10::DeviceType
    if not table[cuda]:
        table[cuda] = table[meta]


class Generator(torch.Generator):
    """A device's generator of random numbers."""

    def __new__(cls, device: Any = "cpu") -> Any:
        made = super().__new__(cls)
        made.place = torch.device(device)
        return made

    def __init__(self, device: Any = "cpu"):
        pass

    @property
    def device(self) -> torch.device:
        return numbered(self.place)


class Graph:
    """A captured graph: a replay runs its kernels again, on the same memory."""

    def __init__(self, device: Device):
        self.device = device
        self.tape: list[tuple[Callable[..., Any], Any, Any, Any]] = []

    @contextmanager
    def captured(self) -> Iterator[None]:
        self.device.tape = self.tape
        try:
            yield
        finally:
            self.device.tape = None

    def replay(self) -> None:
        self.device.note("replays")
        with torch.utils._python_dispatch._disable_current_modes():
            for run, args, kwargs, results in self.tape:
                for old, new in zip(tree_leaves(results), tree_leaves(run(*args, **kwargs)), strict=True):
                    if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)


def _event(device: Device) -> type:
    class Event:
        """What waits for the device only as long as nothing else has since it was recorded."""

        def __init__(self, enable_timing: bool = False):
            self.drains = -1

        def record(self, stream: Any = None) -> None:
            self.drains = device.drains

        def synchronize(self) -> None:
            if self.drains == device.drains:
                device.note("waits")

        def elapsed_time(self, other: Any) -> float:
            return 1.0

    return Event


def _current(device: Device) -> Callable[[torch.device], Any]:
    @contextmanager
    def made_current(place: torch.device) -> Iterator[None]:
        before, device.current = device.current, numbered(place)
        try:
            yield
        finally:
            device.current = before

    return made_current


def _rotated(
    mixed: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, pending: int
) -> Tensor:
    seen = torch.ones(len(lengths), mixed.shape[1], pending, dtype=torch.bool)
    own = tree_attention.Pending(lengths, seen, torch.zeros(len(lengths), pending), (None,), None)
    return tree_attention.rotated_and_stored(mixed, (cos, sin), keys, values, own)


def _normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x.float(), weight.shape, None, eps).to(x.dtype) * weight


def _gated(both: Tensor) -> Tensor:
    gate, rest = both.chunk(2, dim=-1)
    return F.silu(gate) * rest


@contextmanager
def pretended() -> Iterator[Device]:
    """A machine with CUDA devices, for as long as this lasts."""
    own, plain = Device(), packed.is_plain

    def pinned(x: Tensor) -> Tensor:
        made = x.clone()
        made.is_pinned_here = True  # type: ignore[attr-defined]
        return made

    kernels: Any = types.ModuleType("outdraft.target.backends.tree_kernels")
    of_triton = {
        "attend": tree_attention.tree_attention,
        "rotate_and_store": _rotated,
        "rms_norm": _normed,
        "gate": _gated,
    }
    for name, run in of_triton.items():
        setattr(kernels, name, own.kernel(run))
    of_cuda = {
        "_lazy_init": lambda: None,
        "device": _current(own),
        "Event": _event(own),
        "current_stream": lambda device=None: None,
        "synchronize": lambda device=None: own.note("waits"),
        "is_bf16_supported": lambda *args: True,
        "CUDAGraph": lambda: Graph(own),
        "graph": lambda graph, **given: graph.captured(),
        "graph_pool_handle": lambda: None,
    }
    patches = [
        *(mock.patch.object(torch.cuda, name, value) for name, value in of_cuda.items()),
        *(mock.patch.object(module, "has_triton", lambda: True) for module in (backends, graphs)),
        mock.patch.object(backends, "tree_kernels", kernels, create=True),
        mock.patch.dict(sys.modules, {kernels.__name__: kernels}),
        mock.patch.object(packed, "is_plain", lambda weight: isinstance(weight, OnDevice) or plain(weight)),
        mock.patch.object(Tensor, "pin_memory", pinned),
        mock.patch.object(torch, "Generator", Generator),
    ]
    _let_devices_change()
    overwrites = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # a weight that moves is another tensor here
    before = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)  # numbers of the host are seen on their way to a device
    with ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        stack.callback(torch._C._set_only_lift_cpu_tensors, before)
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, overwrites)
        stack.enter_context(torch.no_grad())
        stack.enter_context(own)
        yield own


class Rounds:
    """What every decoding round does on the device, as long as this is entered.

    Attributes:
        steady: counts of the rounds in which all rows stayed.
        ending: those of the rounds in which one ended.
    """

    def __init__(self, device: Device):
        self.device = device
        self.steady, self.ending = list[Counter[str]](), list[Counter[str]]()

    def __enter__(self) -> Rounds:
        own, device = Batch.round, self.device

        def counted(batch: Batch) -> Any:
            rows, device.counts, device.counting = len(batch.rows), Counter(), True
            try:
                return own(batch)
            finally:
                device.counting = False
                (self.steady if len(batch.rows) == rows else self.ending).append(device.counts)

        self._patch = mock.patch.object(Batch, "round", counted)
        self._patch.start()
        return self

    def __exit__(self, *args: Any) -> None:
        self._patch.stop()
