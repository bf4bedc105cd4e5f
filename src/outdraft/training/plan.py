"""The cost of a run before it is started: sizes are counted, one step is timed, nothing is written.

The memory of each of several devices, for decoding with a target and for training a drafter for it, is counted from the
target's configuration alone.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig

from outdraft.core.tensors import now
from outdraft.errors import UserError, first_line
from outdraft.losses.objective import Objective, TrainingExamples, collate
from outdraft.losses.teacher import most_probable, predicting
from outdraft.methods.fspad.beginning import inner_width
from outdraft.methods.registry import MeasuredSetting, method_called
from outdraft.target.named import base_of, class_for, is_hub_id, not_on_hub, place_of
from outdraft.target.ranks import indivisible
from outdraft.target.target import Target
from outdraft.training.config import DrafterConfig
from outdraft.training.feature_store import GIGABYTE, feature_store
from outdraft.training.preparation import Preparation, objective_for, prepare, use_bf16, with_measured
from outdraft.training.progress import duration

MANY_PASSES = 10


@dataclass
class TrainPlan:
    """The size of a run: counts, times and memory."""

    preset: str
    method: str
    target_parameters: int
    drafter_parameters: int
    examples: int
    tokens: int
    """The number of tokens of one pass over the data."""
    response_tokens: int
    """The number of tokens that carry loss."""
    cut_answers: int
    """The number of answers that were cut off, after which no end token is learned."""
    untrained_answers: int
    """The number of answers without loss, since the data give them weight 0."""
    steps: int
    passes: float
    """The number of passes over the data."""
    learning_rate: float
    precision: str
    step_seconds: float
    """The time of one optimizer step on this machine."""
    seconds: float
    """The time of the whole run, without measurements of tau."""
    memory_bytes: int
    """The peak memory: measured on a GPU, estimated from shapes on a CPU."""
    feature_cache_bytes: int
    """The size of the feature store; 0 where the target runs in every step."""
    notes: list[str] = field(default_factory=list)
    exit_choice: MeasuredSetting | None = None
    """The setting that was measured on the data (EESD's exit layer), where one was left open."""

    def show(self, console: Console) -> None:
        if self.exit_choice is not None:
            self.exit_choice.show(console)
        table = Table(title="training plan", show_header=False)
        share = 100 * self.drafter_parameters / self.target_parameters
        rows = {
            "recipe": f"{self.method}, preset {self.preset}, learning rate {self.learning_rate:g}, {self.precision}",
            "drafter": f"{self.drafter_parameters:,} parameters, {share:.1f}% of the target's",
            "data": f"{self.examples:,} examples, {self.tokens:,} tokens, {self.response_tokens:,} of responses",
            "steps": f"{self.steps:,} ({self.passes:.1f} passes over the data)",
            "time": f"{duration(self.seconds)} ({self.step_seconds:.3g} s a step, timed here)",
            "in hours": self._in_hours(),
            "memory": f"{self.memory_bytes / GIGABYTE:.2f} GB",
            "features": f"{self.feature_cache_bytes / GIGABYTE:.3f} GB on disk"
            if self.feature_cache_bytes
            else "online",
        }
        for name, text in rows.items():
            table.add_row(name, text)
        console.print(table)
        for note in self.notes:
            console.print(note, highlight=False)

    def _in_hours(self) -> str:
        """Return the passes over the data that one, four and twelve hours allow at the measured speed."""
        reading = max(self.seconds - self.steps * self.step_seconds, 0.0)
        a_pass = self.steps * self.step_seconds / self.passes
        counts = {hours: max(hours * 3600 - reading, 0.0) / a_pass for hours in (1, 4, 12)}
        few = max(counts.values()) < 100
        shown = ", ".join(f"{count:,.{1 if few else 0}f} passes in {hours} h" for hours, count in counts.items())
        return f"{shown}; after {MANY_PASSES} passes, more answers help more than more steps"


def plan(target: Target, config: DrafterConfig) -> TrainPlan:
    """Return size and time of the run that `train` would make."""
    ready = prepare(target, config)
    measured = method_called(ready.config.method).measure(target, ready.config, ready.examples, {})
    ready = with_measured(ready, measured)
    config, examples = ready.config, ready.examples
    objective = objective_for(target, config)
    bf16 = use_bf16(config, target.device)
    store = feature_store(target, ready, objective)
    per_example, per_step, measured_bytes = _timed(target, ready, objective, bf16, cached=store is not None)
    per_batch = config.batch_size * ready.processes
    seconds = ready.total_steps * per_step
    drafter = sum(weight.numel() for weight in objective.drafter.parameters())
    tokens = config.batch_size // config.gradient_accumulation_steps * max(map(len, examples.examples))
    estimated = sum(weight.nbytes for weight in target.model.parameters())
    estimated += drafting_bytes(target, config, drafter, tokens)
    if store is not None:
        seconds += len(store.missing(examples)) * per_example
    return TrainPlan(
        preset=config.preset,
        method=config.method,
        target_parameters=target.num_parameters,
        drafter_parameters=drafter,
        examples=len(examples),
        tokens=examples.tokens,
        response_tokens=examples.response_tokens,
        cut_answers=examples.cut_answers,
        untrained_answers=examples.untrained,
        steps=ready.total_steps,
        passes=ready.total_steps * per_batch / len(examples),
        learning_rate=config.learning_rate,
        precision="bf16" if bf16 else "fp32",
        step_seconds=per_step,
        seconds=seconds,
        memory_bytes=measured_bytes or estimated,
        feature_cache_bytes=0 if store is None else store.nbytes(examples.examples),
        notes=ready.notes,
        exit_choice=ready.measured,
    )


def _timed(
    target: Target, ready: Preparation, objective: Objective, bf16: bool, cached: bool
) -> tuple[float, float, int]:
    """Return seconds of a target forward for an example and of an optimizer step, and the GPU's peak (0 on a CPU)."""
    config, device = ready.config, target.device
    count = min(len(ready.examples), config.batch_size // config.gradient_accumulation_steps)
    chosen = random.Random(config.seed).sample(range(len(ready.examples)), count)
    data = TrainingExamples(ready.examples)
    batch = {name: value.to(device) for name, value in collate([data[i] for i in chosen]).items()}
    optimizer = torch.optim.AdamW(objective.drafter.parameters(), lr=0.0)
    held: dict[str, torch.Tensor] = {}

    def forward() -> None:
        held["features"] = objective.reading(batch["input_ids"], batch["lengths"])
        if cached and objective.top_k:
            goals = objective.reading.features(held["features"])[:, :-1][predicting(batch["loss_mask"])]
            said = most_probable(objective.reading.target, goals, objective.top_k)
            batch["teacher_ids"], batch["teacher_probs"] = said

    def piece(progress: float = 1.0) -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            sums = objective.loss(*objective.arguments(batch, held["features"], 0, progress))
        objective.total(sums).backward()

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    target_seconds, piece_seconds = _seconds(forward, device), _seconds(piece, device)
    if config.unroll_steps > 1 and config.unroll_from:
        alone = _seconds(lambda: piece(0.0), device)
        piece_seconds += config.unroll_from * (alone - piece_seconds)
    update_seconds = _seconds(lambda: optimizer.step(), device)
    online = 0.0 if cached else target_seconds
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    step = config.gradient_accumulation_steps * (online + piece_seconds) + update_seconds
    return target_seconds / count, step, peak


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """Time the second run, since the first pays for allocation and compilation."""
    work()
    began = now(device)
    work()
    return now(device) - began


DEVICES = (1, 2, 4, 8)

CACHED = 1000
"""The tokens of which the cache is counted."""

PARTED = ("colwise", "rowwise", "packed_colwise", "packed_rowwise", "embedding_rowwise", "grouped_gemm")
"""The beginnings of the names that `transformers` has for layers of which every process holds a part."""


@dataclass(frozen=True)
class DeviceMemory:
    """The memory that each of so many devices needs, in bytes."""

    devices: int
    weights: int
    """The target's weights."""
    cache: int
    """Keys and values of 1,000 tokens."""
    drafter: int
    """The drafter beside the target, whole on every device."""
    training: int
    """All of a training run: the target, the drafter in float32 with gradients and AdamW's moments, a batch."""
    tokens: int
    """The tokens that training computes at once."""


def device_memory(source: str | Path, config: DrafterConfig, dtype: torch.dtype = torch.bfloat16) -> list[DeviceMemory]:
    """Count the memory for 1, 2, 4 and 8 devices that share a target by tensor parallelism.

    Numbers of devices that cannot share it are left out; all are if the drafter's size depends on the target's weights.

    Args:
        source: folder or hub id of the target; a folder may hold its config.json alone.

    Raises:
        UserError: the configuration cannot be read, or the model cannot be a target.
    """
    model = described(str(place_of(base_of(source) or source).path), dtype)
    with torch.device("meta"):
        target = Target(model)
        config = config.with_preset(target.num_parameters)
        exit_layer = {"exit_layer": max(1, target.num_layers // 4)} if config.exit_layer == "auto" else {}
        try:
            network = method_called(config.method).new_network(target, config.model_copy(update=exit_layer))
        except RuntimeError:  # it begins from the target's own outputs, which weights that are nowhere do not give
            return []
    drafter = sum(weight.numel() for weight in network.parameters())
    text, width = target.config, dtype.itemsize
    heads = getattr(text, "num_key_value_heads", None) or getattr(text, "num_attention_heads", None) or 0
    head_dim = getattr(text, "head_dim", None) or target.hidden_size // (
        getattr(text, "num_attention_heads", None) or 1
    )
    counted = []
    for devices in DEVICES:
        if devices > 1 and (indivisible(text, devices) or not model.tp_plan):
            continue
        own, ends = _weights(model, devices)
        tokens = config.batch_size // config.gradient_accumulation_steps * min(config.max_length, target.context_length)
        reading = 8 * width * tokens * target.hidden_size  # of its width, a forward of the target holds some eight
        counted.append(
            DeviceMemory(
                devices,
                own,
                CACHED * 2 * width * target.num_layers * heads * head_dim // devices,
                width * drafter,
                own + ends + reading + drafting_bytes(target, config, drafter, tokens),
                tokens,
            )
        )
    return counted


def described(path: str, dtype: torch.dtype | None = None) -> Any:
    """Build a model by its configuration alone, on the meta device: nothing is loaded, and no weights need be there.

    Raises:
        UserError: the configuration cannot be read.
    """
    try:
        config = AutoConfig.from_pretrained(path)
        with torch.device("meta"):
            return class_for(config).from_config(config, dtype=dtype)
    except Exception as error:  # libraries under here have exceptions of their own
        if isinstance(error, OSError) and is_hub_id(path):
            raise not_on_hub(path, error) from error
        raise UserError(f"the model '{path}' cannot be read: {first_line(error)}") from error


def drafting_bytes(target: Target, config: DrafterConfig, drafter: int, tokens: int) -> int:
    """Return the bytes that training takes beside the target: drafter with gradients and AdamW's moments, a piece's
    activations, and a chunk's logits.

    Args:
        config: the settings with their preset filled in.
        drafter: parameters of the drafter.
        tokens: tokens of a piece, padding included.
    """
    # Every token has some twenty tensors of width d (inputs, noise, residuals, p, r, gradients) and eight of width i.
    inner = config.intermediate_size or inner_width(target)
    activations = 4 * tokens * (20 * target.hidden_size + 8 * inner)
    reduced = config.draft_vocabulary_for(target.vocab_size) if config.teacher_top_k else None
    logits = 4 * 4 * min(tokens, config.loss_chunk_size) * (reduced or target.vocab_size)
    return 16 * drafter + activations + logits


def _weights(model: Any, devices: int) -> tuple[int, int]:
    """Return the bytes of one device's part of the weights, and how many more it holds in training, where embedding and
    output layer are whole."""
    own = ends = 0
    outer = {id(end.weight) for end in (model.get_input_embeddings(), model.get_output_embeddings())}
    for name, weight in model.named_parameters():
        general = re.sub(r"\.\d+(?=\.|$)", ".*", name)
        style = model.tp_plan.get(general) or model.tp_plan.get(general.rpartition(".")[0]) or ""
        part = weight.nbytes // devices if style.startswith(PARTED) else weight.nbytes
        own += part
        ends += weight.nbytes - part if id(weight) in outer else 0
    return own, ends


def memory_table(counted: Sequence[DeviceMemory], method: str) -> Table:
    """Make a table of the memory of each device."""
    shared = any(one.devices > 1 for one in counted)
    of = "GB on each device that shares the target (--tp)" if shared else "memory in GB"
    table = Table(title=f"{of}, with a drafter of method {method}")
    if counted:
        table.caption = (
            f"training: {counted[0].tokens:,} tokens at once, by batch_size x max_length; "
            "gradient_accumulation_steps computes as many in pieces, in less memory"
        )
    devices = ["devices"] if shared else []
    for name in (*devices, "weights", "cache of 1,000 tokens", "drafter", "decoding", "training the drafter"):
        table.add_column(name, justify="right")
    for one in counted:
        parts = (one.weights, one.cache, one.drafter, one.weights + one.cache + one.drafter, one.training)
        table.add_row(*[str(one.devices)][: len(devices)], *(f"{part / GIGABYTE:.2f}" for part in parts))
    return table
