"""The demo: trains an FSPAD drafter for the reference target in a given time, then decodes held-out prompts without and
with drafters, in turns, and shows that the texts are the same and how much sooner they come.

Training and measuring are those of every user; only the choice of data, steps and contenders is made here.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.text import Text

from outdraft.console.output import painted
from outdraft.errors import UserError
from outdraft.evaluation.bench import Comparison, measured
from outdraft.evaluation.contenders import WITH_LOOKUP
from outdraft.evaluation.environment import environment
from outdraft.evaluation.measure import PLAIN, WARM_UP_TOKENS, Contender, speculative
from outdraft.evaluation.prompts import encode
from outdraft.evaluation.report import WIDE, rendered
from outdraft.generation import SpeculativeModel
from outdraft.loading import load_drafter_for, load_target
from outdraft.named import REFERENCE
from outdraft.reference.prompts import DATA, Messages, load_prompts
from outdraft.target import Target
from outdraft.text import Detokenizer
from outdraft.training.config import TrainingConfig
from outdraft.training.plan import TrainPlan, plan
from outdraft.training.regenerate import regenerate
from outdraft.training.train import train

CONVERSATIONS = DATA / "train_conversations.jsonl"
"""Training prompts with the target's own answers."""

LOOKUP, TRAINED, SHIPPED = "prompt-lookup", "fspad-demo", "fspad-shipped"
REPEATS = SHIPPED + WITH_LOOKUP

BATCH = 8

RECIPE: dict[str, Any] = {
    "max_length": 384,
    "batch_size": BATCH,
    "learning_rate": 3e-3,
    "lr_schedule": "cosine",
    "features": "cached",
}
"""For a run of a minute or two: a high peak, small batches, and the target, dearer than its drafter, run only once."""

PASSES = 5
"""Over the conversations. In equal time, 420 steps over 600 reached tau 3.4, single passes over more only 2.8."""

SHARE_FOR_STEPS = 0.9
"""Of the time for training; the rest is saving, and steps slower than the one that was timed."""

FEWEST = 10
"""Steps, and conversations."""

DECODE_SECONDS = 90.0
"""For decoding in all; slow machines decode fewer prompts than asked for."""

FEWEST_PROMPTS = 3


@dataclass
class DemoSettings:
    """What `outdraft demo` takes."""

    train_seconds: float = 90.0
    prompts: int = 12
    max_new_tokens: int = 96
    dtype: str | None = None
    backend: str | None = None
    output_dir: Path | None = None
    skip_training: bool = False

    def __post_init__(self) -> None:
        if self.train_seconds <= 0 or self.prompts < 1 or self.max_new_tokens < 2:
            raise UserError("--train-seconds and --prompts must be more than 0, --max-new-tokens more than 1")


@dataclass
class DemoResult:
    """What the demo has found."""

    comparison: Comparison
    environment: dict[str, Any]
    training: dict[str, Any] | None
    """Of the drafter trained in the demo; None without training."""
    sample: Text
    """One answer, accepted draft tokens coloured."""

    def as_dict(self) -> dict[str, Any]:
        """The headline figures by method; everything else beside them."""
        summaries = self.comparison.summaries
        return {
            "methods": {summary.name: summary.headline() for summary in summaries},
            "details": {summary.name: summary.as_dict() for summary in summaries},
            "environment": self.environment,
            "training": self.training,
        }

    def show(self, console: Console) -> None:
        """Print the sample, the table, and what the table's last column means."""
        console.print(self.sample)
        console.print()
        console.print(rendered(self.comparison.summaries, self.comparison.temperature, wide=console.width >= WIDE))
        facts = self.environment
        console.print(f"{facts['cpu']}, {facts['threads']} threads, {facts['dtype']}, {facts['backend']} backend")
        if any(summary.divergences for summary in self.comparison.summaries):
            console.print(
                f"Texts part where {facts['dtype']} rounds a near-tie between two tokens differently in one-token and "
                "many-token forwards; with --dtype float32 they are identical."
            )


def run_demo(settings: DemoSettings, remarks: Console) -> DemoResult:
    """Train, decode, compare; on two idle cores in less than four minutes.

    Args:
        settings: how much of it.
        remarks: where progress goes.

    Raises:
        UserError: the reference target is missing, or a setting cannot be kept.
    """
    trainable = load_target(REFERENCE, dtype=settings.dtype, backend="eager")
    target = decoding_target(trainable, settings.backend)
    prompts = encode(load_prompts("heldout")[: settings.prompts], target)
    rivals = [speculative(PLAIN, target, None), _speculative(LOOKUP, target, None, LOOKUP, settings)]
    shipped = _speculative(SHIPPED, target, REFERENCE, "fspad", settings)
    training = None
    with ExitStack() as stack:
        if not settings.skip_training:
            folder = settings.output_dir or Path(stack.enter_context(tempfile.TemporaryDirectory())) / "drafter"
            training = train_drafter(trainable, target, folder, settings.train_seconds, remarks)
            rivals.append(_speculative(TRAINED, target, folder, "fspad", settings))
        rivals += [shipped, _speculative(REPEATS, target, REFERENCE, "fspad", settings, repeats=True)]
        prompts = prompts[: affordable(rivals, prompts[0], settings.max_new_tokens)]
        remarks.print(f"decoding {len(prompts)} held-out prompts, {len(rivals)} ways each", highlight=False)
        comparison = measured(target, rivals, prompts, max_new_tokens=settings.max_new_tokens, remarks=remarks)
    return DemoResult(comparison, environment(target), training, _sample(comparison, target))


def affordable(rivals: Sequence[Contender], prompt: list[int], max_new_tokens: int) -> int:
    """How many prompts can be decoded in about `DECODE_SECONDS`, judged by the first rival on one prompt."""
    for _ in range(2):  # the first one warms up
        answer = rivals[0].decode(prompt, {"max_new_tokens": WARM_UP_TOKENS})
    seconds = answer.seconds / len(answer.tokens) * max_new_tokens * len(rivals)
    return max(FEWEST_PROMPTS, int(DECODE_SECONDS / seconds))


def decoding_target(target: Target, backend: str | None) -> Target:
    """The same weights on the backend for decoding."""
    return load_target(target.model, target.tokenizer, backend=backend)


def train_drafter(target: Target, decoding: Target, folder: Path, seconds: float, remarks: Console) -> dict[str, Any]:
    """Train an FSPAD drafter in about so many seconds; what came of it.

    Args:
        target: on the plain backend, for gradients go through its head.
        decoding: the same target, to write answers where none are shipped.
        folder: of the drafter.
        seconds: time for it all.
        remarks: where progress goes.
    """
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        aside = Path(name)
        data = CONVERSATIONS if CONVERSATIONS.exists() else write_answers(decoding, aside, remarks)
        config = TrainingConfig(
            **RECIPE,
            data=data,
            output_dir=folder,
            feature_cache_dir=aside / "features",
            report_to=["none"],
            save_steps=10**6,
            max_steps=1,
        )
        trial = plan(target, config)
        count, steps = fitting(trial, SHARE_FOR_STEPS * (seconds - (time.perf_counter() - began)))
        remarks.print(f"training an FSPAD drafter: {steps} steps on {count} conversations", highlight=False)
        chosen = aside / "chosen.jsonl"
        chosen.write_text("".join(data.read_text(encoding="utf-8").splitlines(True)[:count]), encoding="utf-8")
        changes = {"data": chosen, "max_steps": steps, "logging_steps": max(1, steps // 10)}
        result = train(target, config.model_copy(update=changes), console=remarks)
    return {"conversations": count, "steps": result.steps, "seconds": time.perf_counter() - began, **result.metrics}


def fitting(trial: TrainPlan, seconds: float) -> tuple[int, int]:
    """How many conversations, and steps over them, take about so many seconds.

    Args:
        trial: of a run of one step over all conversations, with cached features.
        seconds: for features and steps.
    """
    each = (trial.seconds - trial.step_seconds) / trial.examples
    count = int(seconds / (each + PASSES * trial.step_seconds / BATCH))
    count = max(min(FEWEST, trial.examples), min(count, trial.examples))
    return count, max(FEWEST, int((seconds - count * each) / trial.step_seconds))


def write_answers(target: Target, folder: Path, remarks: Console, count: int = 48) -> Path:
    """The target's own answers to some training prompts, where none are shipped."""
    questions = folder / "prompts.jsonl"
    records: list[Messages] = load_prompts("train")[:count]
    questions.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in records), encoding="utf-8")
    regenerate(SpeculativeModel(target), questions, folder / "answers.jsonl", max_new_tokens=128, console=remarks)
    return folder / "answers.jsonl"


def _speculative(
    name: str, target: Target, source: Any, method: str, settings: DemoSettings, repeats: bool = False
) -> Contender:
    drafter = load_drafter_for(target, source, method=method, backend=settings.backend)
    return speculative(name, target, drafter, repeats=repeats)


@torch.inference_mode()
def _sample(comparison: Comparison, target: Target) -> Text:
    """The first answer by the last drafter, with the tokens it had guessed coloured."""
    name = comparison.summaries[-1].name
    answer = comparison.runs[name][0].answer
    assert target.tokenizer is not None
    detokenizer = Detokenizer(target.tokenizer)
    pieces = [(detokenizer.add(token), hit) for token, hit in zip(answer.tokens, answer.accepted, strict=True)]
    pieces.append((detokenizer.finish(), answer.accepted[-1]))
    return Text.assemble(
        (f"First held-out prompt by {name}, accepted draft tokens coloured:\n", "bold"), painted(pieces)
    )
