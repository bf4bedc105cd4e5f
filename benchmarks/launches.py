"""Launches, waits and copies of a round as a GPU would have them, counted on a CPU.

Backend `graphs` runs on a CPU what it would record on a GPU, so every operation is seen: those inside of a recording
are one launch together, those outside are one each; views and empty tensors are none. What asks for a tensor's value is
a wait; a tensor made of host numbers outside of a recording is a copy to the device, which waits unless it is pinned.

    python benchmarks/launches.py [METHOD...]
"""

from __future__ import annotations

import sys
from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

import outdraft
from outdraft.core import coupling, sampling, tensors
from outdraft.drafting import expand
from outdraft.engine.round import Batch
from outdraft.methods.eesd.network import ExitLayer, ExitLayerConfig
from outdraft.methods.fspad.network import FeatureHead, FeatureHeadConfig
from outdraft.methods.fspad_1f.network import OneForwardConfig, OneForwardHead
from outdraft.target.backends.graphs import Replayed

ASKING = {Tensor.tolist, Tensor.item, Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__index__, Tensor.cpu}
SHAPES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "vocab_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
METHODS = ("none", "fspad", "eesd", "prompt-lookup", "fspad-1f")
KINDS = ("outside", "replays", "waits", "copies", "pinned")
FREE = ("detach_", "promote_types", "result_type")
"""Operations that start no kernel, though they return no view."""
SKIPPED = 3
"""Rounds that are not counted: the first ones record, and make tables that later ones share."""


class Operations(TorchDispatchMode):
    """Counts operations that start a kernel or bring numbers from the host."""

    def __init__(self, counts: Counter[str]):
        super().__init__()
        self.counts, self.recorded = counts, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.partition("::")[2]
        shares = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if name == "lift_fresh" and _pinned():
            self.counts["pinned"] += not self.recorded
        elif name == "lift_fresh":
            self.counts["copies"] += not self.recorded
        elif not shares and name not in FREE and "empty" not in name and not name.startswith("_local_scalar"):
            self.counts["inside" if self.recorded else "outside"] += 1
        return func(*args, **(kwargs or {}))


def _pinned() -> bool:
    """Return True within the functions that copy from pinned memory, which does not wait."""
    frame: Any = sys._getframe(2)
    for _ in range(4):
        if frame is None or frame.f_code.co_name in ("sent", "put"):
            break
        frame = frame.f_back
    return frame is not None and frame.f_code.co_name in ("sent", "put")


class Waits(TorchFunctionMode):
    """Counts what asks for a tensor's value; random numbers are drawn on the host."""

    def __init__(self, counts: Counter[str]):
        super().__init__()
        self.counts = counts

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        thrown = func is Tensor.item and args[0].dtype == torch.float64  # dice lie on the host
        if func in ASKING and not thrown:
            self.counts["waits"] += 1
        return func(*args, **(kwargs or {}))


def target(exits: bool = False) -> Any:
    """Make the target; `exits` makes its middle layers add so little that an exit layer is often right."""
    torch.manual_seed(0)
    config = LlamaConfig(num_hidden_layers=4, max_position_embeddings=512, **SHAPES)
    model = LlamaForCausalLM(config).float().eval()
    for layer in model.model.layers[1:-1] if exits else ():
        for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
            linear.weight.data.mul_(0.3)
    return model


def drafter(method: str) -> dict[str, Any]:
    if method in ("none", "prompt-lookup"):
        return {"method": method}
    if method == "eesd":
        return {"draft_model": ExitLayer.beginning(target(exits=True), ExitLayerConfig(1))}
    if method == "fspad-1f":
        return {"draft_model": OneForwardHead(OneForwardConfig(**SHAPES, block_size=5, slot_candidates=8))}
    return {"draft_model": FeatureHead(FeatureHeadConfig(**SHAPES))}


def counted(method: str, settings: dict[str, Any], rows: int) -> dict[str, float]:
    """Return counts a round, by kind."""
    counts: Counter[str] = Counter()
    operations, waits, rounds = Operations(counts), Waits(counts), 0
    own_round, own_call = Batch.round, Replayed.__call__

    def round_(batch: Batch) -> Any:
        nonlocal rounds
        rounds += 1
        if rounds <= SKIPPED:
            return own_round(batch)
        with operations, waits:
            return own_round(batch)

    def call(recording: Replayed) -> Any:
        operations.recorded += 1
        counts["replays"] += rounds > SKIPPED
        try:
            return own_call(recording)
        finally:
            operations.recorded -= 1

    model = outdraft.load(target(method == "eesd"), backend="graphs", **drafter(method))
    prompts = [[(7 * i + 3 * row) % 200 + 5 for i in range(12 + 3 * row)] for row in range(rows)]
    Batch.round, Replayed.__call__ = round_, call  # type: ignore[method-assign, assignment]
    try:
        model.generate(prompts, max_new_tokens=40, eos_token_id=10**6, **settings)
    finally:
        Batch.round, Replayed.__call__ = own_round, own_call  # type: ignore[method-assign]
    return {kind: counts[kind] / (rounds - SKIPPED) for kind in KINDS}


def as_on_a_gpu() -> list[tuple[Any, str, Any]]:
    """Return what is done otherwise on a GPU: modules, names, and values there."""
    drawn = "exponential", lambda shape, generator: torch.empty(shape).exponential_(generator=generator)
    best = [(module, "greatest", lambda scores: scores.argmax(-1)) for module in (expand, sampling)]
    return [(tensors, "READ_FREELY", ()), (coupling, *drawn), *best]


def settings_of(method: str, temperature: float) -> dict[str, Any]:
    settings: dict[str, Any] = {"controller": "fixed"}  # others decide by draws of their own on the host
    if temperature:
        settings |= {"seed": 1, "temperature": temperature}
    if method in ("fspad", "eesd", "fspad-1f"):
        settings |= {"tree_depth": 5, "tree_top_k": 4, "tree_size": 16, "prompt_lookup_min": 0}
    return settings


def main() -> None:
    for place, name, value in as_on_a_gpu():
        setattr(place, name, value)
    torch.set_num_threads(1)
    print("| method | rows | T | launches outside | replays | waits | copies, waiting | copies, pinned |")
    print("|---" * 8 + "|")
    for method in sys.argv[1:] or METHODS:
        for temperature in (0.0, 1.0):
            for rows in (1, 8):
                found = counted(method, settings_of(method, temperature), rows)
                figures = " | ".join(f"{found[kind]:.1f}" for kind in KINDS)
                print(f"| {method} | {rows} | {temperature:g} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
