"""Forwards over trees on a GPU, each recorded once as a CUDA graph and then replayed.

An 8B target has some 1,500 launches per forward, which a host takes longer to issue than the GPU needs to read the
weights. A recording is issued as one launch. It serves every length: attention reads the rows' lengths on the device
(`tree_attention.py`), and buffers of keys and values stay in place (`buffers.py`). Rows and tokens are padded to
few sizes, so that few recordings are made. Norms, MLPs and attentions of known form have fused replacements with fewer
launches (`fused.py`).

A forward that cannot be recorded runs unrecorded, with one warning. On a CPU the same functions run unrecorded.
"""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from outdraft.core.tensors import current
from outdraft.errors import first_line
from outdraft.target.backends.fused import Doubles, FusedAttention, FusedMLP, hooked, plain_layer
from outdraft.target.backends.packed import why_not_replaced
from outdraft.target.backends.tree_attention import ATTENTION, Pending, has_triton
from outdraft.target.backends.tree_forward import Forward, Sight, TreeForward, why_not_renamed, with_attention

MOST_TOKENS = 512
"""Largest number of tokens of all rows for which a forward is recorded; beyond, launches are not what takes time."""

SIZES = (*range(1, 9), 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 384, 512)
"""Tokens per row that forwards are recorded for; other numbers are padded to the next."""

MOST_RECORDINGS = 64
"""Largest number of recordings kept per forward."""

Model = TypeVar("Model", bound=nn.Module)


def why_not_graphs(model: Any) -> str | None:
    """Return why this model's forwards cannot be recorded, None if they can."""
    device = next(model.parameters()).device.type
    if device not in ("cpu", "cuda"):
        return "it lies on " + device
    if device == "cuda" and not has_triton():
        return "triton is not installed"
    return why_not_renamed(model) or why_not_replaced(model)


def graphs_view(model: Model) -> Model:
    """Return a shallow copy of the module tree with fused replacements and our attention; weights are shared.

    Weights that a replacement reads as one tensor are moved next to each other, so that they take no more memory: the
    model's own modules then hold parts of the whole.
    """
    view = _doubled(model, Doubles(plain_layer))
    with_attention(view, ATTENTION)
    return view


def _doubled(module: Any, doubles: Doubles) -> Any:
    view = copy.copy(module)
    view._modules = {name: _double(child, doubles) for name, child in module._modules.items()}
    return view


def _double(module: Any, doubles: Doubles) -> Any:
    if module is None or hooked(module):
        return module
    double = doubles.double(module)
    if isinstance(double, FusedMLP):
        _lie_in(double.gate_up_proj, module.gate_proj, module.up_proj)
    if isinstance(double, FusedAttention):
        _lie_in(double.qkv_proj, module.q_proj, module.k_proj, module.v_proj)
    return _doubled(module, doubles) if double is None else double


def _lie_in(whole: Any, *parts: Any) -> None:
    """Turn the parts' weights into views of the whole, which holds the same numbers."""
    start = 0
    for part in parts:
        end = start + len(part.weight)
        part.weight.data = whole.weight.data[start:end]
        if part.bias is not None:
            part.bias.data = whole.bias.data[start:end]
        start = end


class Recordings:
    """The recordings of one function, by what they are for; of more than `MOST_RECORDINGS` the least recently used go.

    Args:
        failure: the function that cannot be recorded, and what happens then: a format with `{}` for the reason.
    """

    def __init__(self, failure: str):
        self.failure, self.records = failure, True
        """`records` is True while the function can be recorded."""
        self.recordings: OrderedDict[Any, Any] = OrderedDict()
        self._memory: Any = None

    def filled(self, key: Any, make: Callable[[], Any], fill: Callable[[Any], None], device: torch.device) -> Any:
        """Return the recording for this key with its inputs filled in; None, with a warning, if it cannot be made."""
        found = self.recordings.get(key)
        if found is not None:
            self.recordings.move_to_end(key)
            fill(found)
            return found
        found = make()
        fill(found)
        try:
            if self._memory is None and device.type == "cuda":
                self._memory = torch.cuda.graph_pool_handle()
            found.record(self._memory)
        except Exception as error:
            self.records = False
            warnings.warn(self.failure.format(first_line(error)), stacklevel=5)
            return None
        self.recordings[key] = found
        if len(self.recordings) > MOST_RECORDINGS:
            self.recordings.popitem(last=False)
        return found


class GraphedForward(TreeForward, Recordings):
    """A forward over pending tokens, recorded if they are few.

    Args:
        model: a model of `graphs_view`.
    """

    def __init__(self, model: Any, forward: Forward, what: str):
        TreeForward.__init__(self, model, forward, what, "graphs")
        Recordings.__init__(self, f"{what} cannot be recorded ({{}}); it runs unrecorded")

    @property
    def ready(self) -> bool:
        """Whether it has run, computes what the model does and can be recorded, also as part of something larger."""
        return self._compared and self.serves and self.records

    def _over(self, name: str, given: Tensor, sight: Sight, cache: Any) -> tuple[Tensor, ...]:
        rows, tokens = given.shape[:2]
        if not self.records or rows * tokens > MOST_TOKENS or min(sight.lengths) == 0:
            return super()._over(name, given, sight, cache)
        return self._replay(name, given, sight, cache)

    def _replay(self, name: str, given: Tensor, sight: Sight, cache: Any) -> tuple[Tensor, ...]:
        rows, tokens = given.shape[:2]
        pending = sight.seen.shape[2]
        most = cache.capacity - max(sight.lengths)
        room = next((size for size in SIZES if tokens <= size <= most), tokens) if pending == tokens else tokens
        key = (name, cache.addresses, cache.room, room, pending + room - tokens)
        run, windows = partial(self.over, name), tuple(sight.windows.values())
        recording = self.filled(
            key,
            lambda: Recording(run, given, cache, room, pending + room - tokens, windows),
            lambda found: found.fill(given, sight, cache),
            given.device,
        )
        if recording is None:
            return self.over(name, given, self._pending(sight, cache))
        return tuple(part[:rows, :tokens] for part in recording.replay())


class Recording:
    """A forward over so many rows and tokens, with inputs and results at fixed addresses.

    Args:
        run: the forward, of its input and the pending tokens.
        given: `(rows, tokens, ...)` an input of the forward, for its dtype and shape.
        cache: cache of the rows; rows are padded to those of its buffers.
        tokens, pending: padded numbers of tokens per row.
        windows: as in `Pending`.
    """

    def __init__(
        self,
        run: Callable[[Tensor, Pending], tuple[Tensor, ...]],
        given: Tensor,
        cache: Any,
        tokens: int,
        pending: int,
        windows: tuple[int | None, ...],
    ):
        self._run, device, rows = run, given.device, cache.room
        self.line = torch.zeros((rows, tokens, *given.shape[2:]), dtype=given.dtype, device=device)
        # Padding sees itself, so that no token sees nothing.
        self._alone = torch.eye(pending, dtype=torch.bool, device=device)[pending - tokens :].expand(rows, -1, -1)
        self.pending = Pending(
            torch.zeros(rows, dtype=torch.int32, device=device),
            self._alone.clone(),
            torch.zeros(rows, pending, dtype=torch.long, device=device),
            windows,
            None,
        )
        self._shape: tuple[int, ...] = ()

    def fill(self, given: Tensor, sight: Sight, cache: Any) -> None:
        """Copy in the inputs of the next run."""
        rows, tokens = given.shape[:2]
        pending, own = sight.seen.shape[2], self.pending
        shape = (rows, tokens, pending)
        if shape != self._shape:
            own.seen.copy_(self._alone)
            own.positions.zero_()
            self._shape = shape
            own.lengths.zero_()
        put(own.lengths, sight.lengths)
        self.line[:rows, :tokens] = given
        own.seen[:rows, :tokens, :pending] = sight.seen
        own.positions[:rows, :pending] = sight.positions
        own.cache = cache

    def record(self, memory: Any) -> None:
        self._replayed = Replayed(lambda: self._run(self.line, self.pending), self.line.device, memory)

    def replay(self) -> tuple[Tensor, ...]:
        """Run the recording, and return results that later runs do not overwrite."""
        results = self._replayed()
        self.pending.cache = None  # the cache may be freed; the recording knows its buffers
        return results


class Replayed:
    """A function of tensors at fixed addresses, recorded on a GPU; elsewhere it is simply called.

    Args:
        run: the function; it runs once unrecorded, as libraries and compilers make what they need on the first call.
        memory: a pool of `torch.cuda.graph_pool_handle` for intermediate results.
    """

    def __init__(self, run: Callable[[], tuple[Tensor, ...]], device: torch.device, memory: Any):
        self._run, self._graph = run, None
        if device.type != "cuda":
            return
        with current(device):
            run()
            torch.cuda.synchronize()
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, pool=memory, capture_error_mode="thread_local"):
                self._results = run()
        self._run = None  # type: ignore[assignment]  # what it holds may end

    def __call__(self) -> tuple[Tensor, ...]:
        """Return the results, as tensors that later runs do not overwrite."""
        if self._graph is None:
            return self._run()
        self._graph.replay()
        return tuple(part.clone() for part in self._results)


def put(to: Tensor, numbers: Any) -> None:
    """Copy host numbers to the beginning of a tensor, without waiting for the device."""
    given = torch.tensor(numbers, dtype=to.dtype)
    if to.is_cuda:
        given = given.pin_memory()
    to[tuple(slice(size) for size in given.shape)].copy_(given, non_blocking=True)
