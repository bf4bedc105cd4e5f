"""CUDA devices that are not there: tensors that say they lie on one, and a count of what would launch, wait or copy.

The numbers are held by CPU tensors, and every operation runs on those. What a CPU hides is made visible: a tensor that
meets one of another device is an error, and so is a question of the host while a CUDA graph is captured. A graph is
replayed as on a GPU: what was captured runs again on the same addresses, and no Python does. What it cannot show is
time, which kernels torch chooses, several streams, and NaN or rounding of a GPU's own kernels.
"""

from __future__ import annotations

import copy
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

FIRST, SECOND = torch.device("cuda:0"), torch.device("cuda:1")

STARTS_NOTHING = {
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "detach_", "alias"),
    *("lift_fresh", "_unsafe_view", "_reshape_alias", "resize_", "set_", "squeeze_", "unsqueeze_", "t_", "transpose_"),
}
"""Operations without a kernel, beside views."""

ASKS = {
    *("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "bincount", "histogram"),
    *("_unique2", "unique_dim", "unique_consecutive"),
}
"""Operations that need a value, or a size that is one, on the host."""

TAKES_NUMBERS = {"masked_fill", "masked_fill_", "fill_", "index_put", "index_put_", "_index_put_impl_"}
"""Operations beside pointwise ones in which a CPU tensor without dimensions may meet a GPU's."""

ONE_KERNEL = {"scaled_dot_product_attention", "_fused_rms_norm", "rms_norm"}
"""Operations that torch puts together of others on a CPU, and a GPU does in one."""


class DeviceMistake(Exception):
    """Tensors of two devices in one operation."""


class CaptureError(RuntimeError):
    """A question of the host, or numbers of it, while a graph is captured."""


class OnDevice(Tensor):
    """A tensor that says it lies on a device; `held` are its numbers."""

    held: Tensor

    @staticmethod
    def __new__(cls, real: Tensor, device: torch.device) -> OnDevice:
        with torch.inference_mode(False):  # a view of a weight, which is no inference tensor
            made = Tensor._make_wrapper_subclass(
                cls, real.size(), real.stride(), real.storage_offset(), dtype=real.dtype, device=device
            )
        made.held = real
        return made

    def __deepcopy__(self, memo: Any) -> Any:
        made = OnDevice(self.held.detach().clone(), self.device)
        return nn.Parameter(made, requires_grad=False) if isinstance(self, nn.Parameter) else made

    def __repr__(self, *args: Any, **kwargs: Any) -> str:
        return f"OnDevice({self.held!r})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func in (Tensor.data_ptr, Tensor.untyped_storage):
                return func(args[0].held)
            if func is Tensor.tolist:  # refused for every subclass
                return args[0].cpu().tolist()
            if func is Tensor.data.__set__:  # type: ignore[attr-defined]
                args[0].held = args[1].held
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} on a device that nobody pretends")


class Device(TorchDispatchMode):
    """Within it there are CUDA devices; what happens on them while `counting` is counted.

    Attributes:
        counts: launches outside of graphs, replays of graphs, waits of the host for the device, copies to the device
            that wait, and those of pinned memory, which do not; crossings are those launches that copy from one device
            to another.
        lines: the same, with the package's line that did it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counting = False
        self.counts, self.lines = Counter[str](), Counter[str]()
        self.current = FIRST
        """The device on which graphs are captured and kernels of Triton run."""
        self.drains = 0
        """How often the host has waited until the device had nothing left to do."""
        self.tape: list[tuple[Callable[..., Any], Any, Any, Any]] | None = None
        """What the graph that is being captured holds: functions, arguments and results."""

    def note(self, kind: str) -> None:
        if self.tape is not None and kind != "launches":
            raise CaptureError(f"{kind} in a graph: {_line()}")
        self.drains += kind == "waits"
        if self.counting and self.tape is None:
            self.counts[kind] += 1
            self.lines[f"{kind} {_line()}"] += 1

    def placed(self, module: Any, device: torch.device = FIRST) -> Any:
        """Return a copy of a module whose weights and buffers lie on a device."""
        module = copy.deepcopy(module)
        for part in module.modules():
            for name, weight in part._parameters.items():
                if weight is not None:
                    part._parameters[name] = nn.Parameter(OnDevice(weight.detach(), device), requires_grad=False)
            for name, buffer in part._buffers.items():
                part._buffers[name] = None if buffer is None else OnDevice(buffer, device)
        return module

    # --- operations --------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map(numbered, (args, dict(kwargs or {})))
        name = func._schema.name.partition("::")[2]
        if name == "_to_copy" and kwargs.get("device") == torch.device("meta"):
            kwargs["device"] = FIRST  # `cuda` without a number, by the guard that is `meta`'s
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        lent = [x for x in given if isinstance(x, OnDevice)]
        asked = next((x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.device)), None)
        if not lent and (asked is None or asked.type != "cuda"):
            return func(*args, **kwargs)
        composite = torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")
        if composite and name not in ONE_KERNEL:
            with self:
                done = func.decompose(*args, **kwargs)
            if done is not NotImplemented:
                return done
        source = given[1] if name == "copy_" else given[0] if name == "_to_copy" else None
        to = given[0].device if name == "copy_" else asked if name == "_to_copy" else None
        crosses = source is not None and to is not None and source.device != to
        if crosses and source is not None and to is not None:
            self._cross(source, to)
        else:
            self._meet(func, name, args, given)
            if name in ASKS or self._by_truth(name, args):
                self.note("waits")
            if not func.is_view and name not in STARTS_NOTHING and name != "_local_scalar_dense":
                self.note("launches")
        if self.tape is not None and any(x.device != self.current for x in lent):
            raise CaptureError(f"{func} in a graph of {self.current}, of tensors of another device: {_line()}")
        bare, named = tree_map(_bare, args), tree_map(_bare, kwargs)
        result = func(*bare, **named)
        if self.tape is not None and not func.is_view and name not in STARTS_NOTHING:
            self.tape.append((func, bare, named, result))
        return self._back(func, args, kwargs, result, asked or next(iter(lent)).device)

    def _back(self, func: Any, args: Any, kwargs: Any, result: Any, device: torch.device) -> Any:
        """Return the result as it lies: what was written to, or new tensors on the device."""
        schema, out = func._schema, []
        for i, argument in enumerate(schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                out.append(args[i] if i < len(args) else kwargs[argument.name])
        if out and not func.is_view and len(out) == len(schema.returns):
            return out[0] if len(out) == 1 else tuple(out)
        if device.type != "cuda":
            return result
        return tree_map(lambda x: OnDevice(x, device) if isinstance(x, Tensor) else x, result)

    def _cross(self, source: Tensor, to: torch.device) -> None:
        if to.type == "cpu":
            self.note("waits")
        elif source.device.type == "cpu":
            self.note("pinned" if getattr(source, "is_pinned_here", False) else "copies")
        else:
            self.note("launches")
            self.note("crossings")

    def _meet(self, func: Any, name: str, args: Any, given: list[Tensor]) -> None:
        devices = {x.device for x in given}
        if len(devices) == 1:
            return
        if name in ("index", "index_put", "index_put_", "_index_put_impl_") and args[0].device.type == "cuda":
            indices = [x for x in args[1] if x is not None and x.device.type == "cpu"]
            for _ in indices:
                self.note("copies")  # torch brings them over
            given = [x for x in given if all(x is not index for index in indices)]
        numbers = torch.Tag.pointwise in func.tags or name in TAKES_NUMBERS
        devices = {x.device for x in given if not (numbers and x.dim() == 0 and x.device.type == "cpu")}
        if len(devices) > 1:
            raise DeviceMistake(f"{func} of {[(str(x.device), tuple(x.shape)) for x in given]}: {_line()}")

    def _by_truth(self, name: str, args: Any) -> bool:
        """Return True for indices by truth values, whose number the host must know."""
        if not name.startswith(("index", "_index_put")) or len(args) < 2 or not isinstance(args[1], list | tuple):
            return False
        return any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])

    def kernel(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function as one kernel of the device's own, in place of one of Triton's."""

        def launch(*args: Any) -> Any:
            lent = [x for x in tree_leaves(args) if isinstance(x, Tensor)]
            if {x.device for x in lent} != {self.current}:
                raise DeviceMistake(f"{run.__name__} on {self.current}: {_line()}")
            self.note("launches")
            bare = tree_map(_bare, args)
            with torch.utils._python_dispatch._disable_current_modes():
                result = run(*bare)
            if self.tape is not None:
                self.tape.append((run, bare, {}, result))
            return OnDevice(result, lent[0].device)

        return launch


def numbered(x: Any) -> Any:
    return FIRST if isinstance(x, torch.device) and x.type == "cuda" and x.index is None else x


def _bare(x: Any) -> Any:
    if isinstance(x, OnDevice):
        return x.held
    return torch.device("cpu") if isinstance(x, torch.device) and x.type == "cuda" else x


def _line() -> str:
    """Return the innermost line of the package that runs."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        _, found, path = frame.f_code.co_filename.rpartition("/outdraft/")
        if found:
            return f"{path}:{frame.f_lineno}"
        frame = frame.f_back
    return "elsewhere"
