"""Exact mode: a forward over many candidates whose every row has the bits of a one-token forward.

In low precision a forward over several tokens rounds differently from one-token forwards, so greedy texts can diverge
at near-ties. Exact mode makes the forward itself the same, and with it the cache and all that follows:

Backend `native` is built that way and only checked. On `packed` and `eager`:

- Attention runs node by node: each query sees its own path only, contiguous and in order, in the same kernel call as
  plain decoding. Keys and values of committed tokens are not copied. - All other modules treat rows separately by their
  mathematics. `invariance.py` measures, for every kind of layer and
  number of rows, whether their kernels do so on this machine. Layers that fail are run per row. - Before a number of
  rows is first used, a whole forward over random trees is compared with one-token forwards, bit
  for bit: features, logits, keys, values. A difference is an error, never a warning. - Prompts run one at a time, so a
  row of a batch is decoded as plain decoding would decode it alone.

The model is neither copied nor patched: `PerRowTarget` works on a view of it.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from outdraft.errors import UserError
from outdraft.target.backends import is_native
from outdraft.target.backends.packed import quantised_part
from outdraft.target.cache import SlotCache
from outdraft.target.exact.attention import ATTENTION, Now, Paths, reads_in_place
from outdraft.target.exact.invariance import Case, Kept, OneByOne, Probe, is_leaf, kind_of, mixes, one_by_one
from outdraft.target.runner import PLAIN, ModelRunner, Output
from outdraft.target.target import Target
from outdraft.target.views import Reader, Reads

INVARIANT_CASES = ((1, 4), (2, 19))
"""Rows and nodes of the forwards by which kernels that treat rows alike by construction are checked."""


@dataclass
class Exactness:
    """Why exact text equals plain text, and the number of layers and checks since the model was loaded."""

    guarantee: str = "by construction"
    """All rows of all forwards have the bits of one-token forwards."""
    stacked: int = 0
    """Number of layers (and other modules that compute) that run over all candidates at once."""
    one_by_one: int = 0
    """Number of layers that run per row, because their kernels here are not batch-invariant."""
    checks: int = 0
    """Number of comparisons of whole forwards with one-token forwards: one per new number of rows and candidates."""
    check_seconds: float = 0.0
    """Seconds of these checks; the rounds in which they ran include them."""

    def __str__(self) -> str:
        return self.guarantee


def exactly(target: Target) -> ExactTarget:
    """Return the target in exact mode; the same one for the same target, so that nothing is checked twice.

    Raises:
        UserError: there is no guarantee for this model or device, with the reason.
    """
    if target.exact is None:
        target.exact = ExactTarget(target) if is_native(target.backend) else PerRowTarget(target)
    return target.exact


class ExactTarget(Target):
    """A target whose forward over trees gives every node the bits of plain decoding; its kernels are made so (backend
    `native`), which is only checked.

    Raises:
        UserError: a forward over trees differs from one-token forwards after all.
    """

    def __init__(self, plain: Target):
        self.__dict__.update(plain.__dict__)
        self.plain, self.exactness = plain, Exactness(stacked=plain.num_layers)
        start = time.perf_counter()
        for rows, nodes in INVARIANT_CASES:
            with torch.inference_mode():
                where = Case(plain, rows, nodes).difference(self)
            if where is not None:
                raise UserError(
                    f"a forward over {rows} x {nodes} tokens gives other {where} than one-token forwards on this "
                    "machine, so exact=True cannot be promised; use --backend packed"
                )
            self.exactness.checks += 1
        self.exactness.check_seconds = time.perf_counter() - start

    def vouch(self, run: ModelRunner) -> None:
        """Raise UserError for a runner that does not give these bits; here any way of running the layers does."""


class PerRowTarget(ExactTarget):
    """A target some of whose layers run row by row, as their kernels are not batch-invariant."""

    ragged = False

    def __init__(self, plain: Target):
        refuse(plain)
        self.__dict__.update(plain.__dict__)
        self.plain = plain
        self._run = self._whole  # for this view, not for the plain target's
        self.exactness = Exactness()
        self._now = Now()
        self._alone: set[Any] = set()  # kinds of modules that run row by row
        self._checked: set[tuple[int, ...]] = set()
        self._readers: dict[Reads, Reader] = {}  # for this view, not for the plain target's
        self._layouts: set[tuple[int, int, int, int, torch.dtype]] = set()
        self._rebuild()
        self._check(1, 4)  # most models that are to be refused are refused here, before anything is decided

    # --- what a Target does ------------------------------------------------------------------------------------

    def forward(self, tokens: Tensor, positions: Tensor, mask: Tensor, slots: Tensor, cache: SlotCache) -> Tensor:
        self._check(*mask.shape[:2])  # before the inner model is looked up, as the check may replace it
        return super().forward(tokens, positions, mask, slots, cache)

    def inputs(self, positions: Tensor, mask: Tensor, slots: Tensor, cache: SlotCache) -> dict[str, Any]:
        self._check(*mask.shape[:2])
        inputs = super().inputs(positions, mask, slots, cache)
        self._now.paths = Paths(mask, slots, cache.lengths)
        return inputs

    def head(self, features: Tensor) -> Tensor:
        """Return logits of `(rows, hidden)` for different sequences, or of `(rows, nodes, hidden)` for a forward."""
        if features.dim() == 2:
            return one_by_one(self.plain.head, features)
        self._check(*features.shape[:2])
        return self._head(features)

    def runner(self, cache: SlotCache, reads: Reads = PLAIN) -> ExactRun:
        return ExactRun(self, cache, reads)

    def vouch(self, run: ModelRunner) -> None:
        """Raise UserError for a runner of a drafter's own making."""
        if not isinstance(run, ExactRun):
            raise UserError(
                f"exact=True does not cover this method, whose {type(run).__name__} runs the target in a way of its own"
            )

    # --- the view ----------------------------------------------------------------------------------------------

    def _rebuild(self) -> None:
        self._use(lambda leaf: OneByOne(leaf) if kind_of(leaf) in self._alone else leaf)
        leaves = [leaf for leaf in self.plain.model.modules() if is_leaf(leaf)]
        self.exactness.one_by_one = sum(kind_of(leaf) in self._alone for leaf in leaves)
        self.exactness.stacked = len(leaves) - self.exactness.one_by_one

    def _use(self, wrap: Any) -> None:
        """Set a view of the model with these wrappers around its leaves."""
        view = _View(wrap, self._now)
        self.model = view(self.plain.model)
        self._inner = self.model.base_model
        self._readers.clear()
        head = self.plain._head
        # A head that does more than its output layer is run as it is, row by row.
        self._head = wrap(head) if isinstance(head, nn.Module) else OneByOne(head)

    # --- the proof ---------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def _check(self, rows: int, nodes: int) -> None:
        """Compare a forward over so many rows and nodes with one-token forwards; measured once."""
        case_key = (rows, nodes, torch.get_num_threads())
        if case_key in self._checked:
            return
        start = time.perf_counter()
        self._checked.add(case_key)  # the forwards of the check call this method, too
        try:
            case = Case(self.plain, rows, nodes)
            probes: dict[Any, Probe] = {}
            self._use(lambda leaf: probes.setdefault(id(leaf), Probe(leaf)))
            self._now.calls = 0
            case.tree(self)
            failed = {probe.kind for probe in probes.values() if not probe.stacks}
            self._alone |= failed
            self._rebuild()
            if self._now.calls != self.num_layers:
                raise UserError(
                    f"{type(self.plain.model).__name__} has an attention of its own, "
                    "so exact=True cannot give each candidate what plain decoding gives it"
                )
            for layout in self._now.layouts - self._layouts:
                if not reads_in_place(*layout, most=self.context_length):
                    raise UserError(
                        "attention over keys in place gives other bits than over their copies on this machine, "
                        "so exact=True cannot be promised"
                    )
                self._layouts.add(layout)
            where = case.difference(self)
            if where is not None:
                raise UserError(
                    f"a forward over {rows} x {nodes} tokens gives other {where} than one-token forwards with this "
                    "model and machine, so exact=True cannot be promised"
                )
        except BaseException:
            self._checked.discard(case_key)
            self._rebuild()
            raise
        self.exactness.checks += 1
        self.exactness.check_seconds += time.perf_counter() - start


def refuse(target: Target) -> None:
    """Raise UserError if exactness cannot be guaranteed, before anything runs."""
    model: Any = target.model
    if target.device.type != "cpu":
        raise UserError(
            f"exact=True is not offered on {target.device.type}: which rows its kernels round alike has not been "
            "measured; use a CPU, or leave it out"
        )
    if target.backend == "graphs":
        raise UserError(
            f"exact=True is not offered on backend '{target.backend}': which rows its kernels round alike has not been "
            "measured; use --backend eager"
        )
    if target.config._attn_implementation != "sdpa":
        raise UserError("exact=True needs attn_implementation='sdpa', whose kernel calls can be made one by one")
    quantised = getattr(model, "hf_quantizer", None) is not None or quantised_part(model) is not None
    if quantised or any("forward" in module.__dict__ for module in model.modules()):
        raise UserError("exact=True needs the model's own layers, neither quantised nor hooked; load it without")
    mixing = next((type(module).__name__ for module in model.modules() if mixes(module)), None)
    if mixing is not None:
        raise UserError(f"exact=True cannot see what {mixing} computes with weights of its own; leave it out")


class _View:
    """Shallow copies of modules that share every weight, with our attention and some leaves wrapped."""

    def __init__(self, wrap: Any, now: Now):
        self.wrap, self.now = wrap, now
        self.configs: dict[int, Any] = {}

    def __call__(self, module: nn.Module) -> Any:
        if is_leaf(module):
            return self.wrap(module)
        view: Any = copy.copy(module)
        view._modules = {name: None if child is None else self(child) for name, child in module._modules.items()}
        view.__dict__["_outdraft_now"] = self.now
        config = module.__dict__.get("config")
        if config is not None and hasattr(config, "_attn_implementation"):
            if id(config) not in self.configs:
                self.configs[id(config)] = own = copy.deepcopy(config)
                own._attn_implementation = ATTENTION
            view.__dict__["config"] = self.configs[id(config)]
        return view


# --- runs ------------------------------------------------------------------------------------------------------


class ExactRun(ModelRunner):
    """A runner that treats every row as if it were single."""

    target: PerRowTarget

    def prefill(self, prompts: Sequence[Tensor]) -> Output:
        """Run each prompt by itself and join all of them in one cache."""
        plain = self.target.plain
        caches = [Kept(plain, len(prompt)) for prompt in prompts]
        runs = [plain.runner(cache, self.reads) for cache in caches]
        outputs = [run.prefill([prompt]) for run, prompt in zip(runs, prompts, strict=True)]
        self.cache.reserve(max(len(prompt) for prompt in prompts), outputs[0].features.device)
        for layer in caches[0].held:
            keys, values = (
                pad_sequence([own.held[layer][part][0].transpose(0, 1) for own in caches], batch_first=True)
                for part in (0, 1)
            )
            self.cache.update(keys.transpose(1, 2), values.transpose(1, 2), layer)
        self.cache.commit([range(len(prompt)) for prompt in prompts])
        return Output(
            *(pad_sequence([part[0] for part in parts], batch_first=True) for parts in zip(*outputs, strict=True))
        )
