"""`plan`: the cost of a run before it is started. Sizes are counted, one step is timed, nothing is written."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from rich.console import Console
from rich.table import Table

from outdraft.core.tensors import now
from outdraft.losses.objective import Objective, TrainingExamples, collate
from outdraft.losses.teacher import most_probable, predicting
from outdraft.methods.registry import MeasuredSetting, method_called
from outdraft.target.target import Target
from outdraft.training.config import DrafterConfig
from outdraft.training.feature_store import GIGABYTE, feature_store
from outdraft.training.memory import drafting_bytes
from outdraft.training.preparation import Preparation, objective_for, prepare, with_measured
from outdraft.training.progress import duration
from outdraft.training.trainer import use_bf16

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
    if store is not None:
        seconds += len(store.missing(examples)) * per_example
    return TrainPlan(
        preset=config.preset,
        method=config.method,
        target_parameters=target.num_parameters,
        drafter_parameters=sum(weight.numel() for weight in objective.drafter.parameters()),
        examples=len(examples),
        tokens=examples.tokens,
        response_tokens=examples.response_tokens,
        cut_answers=examples.cut_answers,
        steps=ready.total_steps,
        passes=ready.total_steps * per_batch / len(examples),
        learning_rate=config.learning_rate,
        precision="bf16" if bf16 else "fp32",
        step_seconds=per_step,
        seconds=seconds,
        memory_bytes=measured_bytes or estimated_memory_bytes(target, ready, objective),
        feature_cache_bytes=0 if store is None else store.nbytes(examples.examples),
        notes=ready.notes,
        exit_choice=ready.measured,
    )


def estimated_memory_bytes(target: Target, ready: Preparation, objective: Objective) -> int:
    """Sum up target, drafter with gradients and AdamW's moments, a piece's activations, and a chunk's logits."""
    config = ready.config
    weights = sum(weight.numel() * weight.element_size() for weight in target.model.parameters())
    drafter = sum(weight.numel() for weight in objective.drafter.parameters())
    tokens = config.batch_size // config.gradient_accumulation_steps * max(map(len, ready.examples.examples))
    return weights + drafting_bytes(target, config, drafter, tokens)


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
