"""The demo: an answer streams without and with a drafter, then all ways of decoding answer held-out questions in turns.

It runs on SmolLM2-135M-Instruct, or on the small reference target if that is not available or a drafter is trained
first. The demo uses the public decoding, measuring and training; it chooses the questions, the methods, and how many
prompts the machine can afford.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from outdraft.api.generation import SpeculativeModel
from outdraft.api.loading import load_drafter_for, load_target
from outdraft.api.prompts import Message, encode, encode_chat, read_prompts
from outdraft.console.generate import Streamed, legend, stream
from outdraft.data.provenance import busy, environment
from outdraft.data.records import split_lines
from outdraft.errors import UserError
from outdraft.evaluation.audit.stock import Divergence
from outdraft.evaluation.bench.baselines import STOCK
from outdraft.evaluation.bench.bench import Comparison, measured
from outdraft.evaluation.bench.measure import PLAIN, WARM_UP_TOKENS, Contender, Difference, divergences
from outdraft.evaluation.bench.methods import LOOKUP, WITH_LOOKUP, BenchSettings, contenders
from outdraft.evaluation.bench.result import WIDE, closing, rendered
from outdraft.output import counted, number
from outdraft.reference import DATA
from outdraft.target.named import NAMED, REFERENCE, SMOLLM2, place_of, shipped_drafter, shipped_drafters
from outdraft.target.target import Target
from outdraft.training.config import DrafterConfig
from outdraft.training.plan import TrainPlan, plan
from outdraft.training.train import train

MODELS = (SMOLLM2, REFERENCE)

TRAINED, SHIPPED = "fspad-demo", "fspad-shipped"
"""The names of the two drafters where one is trained."""

ORDER = ("eagle", "fspad", "eesd")
"""The order of the drafters in the table."""
FAVOURITES = ("fspad", "eagle", "eesd")
"""The methods whose first shipped drafter drafts the streamed answer."""

TRAIN_SECONDS = 90.0

DECODE_SECONDS = 105.0
"""The time for all decoding; slow machines decode fewer prompts, and shorter answers, than requested."""

FEWEST_PROMPTS, FEWEST_TOKENS = 7, 24
"""The fewest prompts, one of every task, and the length below which answers are not cut before that."""


@dataclass
class DemoSettings:
    """Settings of `outdraft demo`."""

    model: str | None = None
    """The model, one of `MODELS`; None takes the first that is available."""
    train: bool = False
    """First train a drafter for the tiny target."""
    train_seconds: float | None = None
    """Time for training a drafter; with --train.  [90]"""
    output_dir: Path | None = None
    """Keep the trained drafter here; with --train."""
    prompts: int = 28
    """Most held-out prompts to decode."""
    max_new_tokens: int = 64
    """Most tokens to generate."""
    dtype: str | None = None
    backend: str | None = None

    def __post_init__(self) -> None:
        if self.model is not None and self.model not in MODELS:
            raise UserError(
                f"--model {self.model} has no demo; choose from {', '.join(MODELS)}, or use `outdraft bench`"
            )
        if self.train and self.model == SMOLLM2:
            raise UserError(
                f"--train is for the small target, not '{SMOLLM2}'; leave out --model, or use outdraft train"
            )
        for flag, value in (("--train-seconds", self.train_seconds), ("--output-dir", self.output_dir)):
            if value is not None and not self.train:
                raise UserError(f"{flag} is about training a drafter; add --train, or leave it out")
        if (self.train_seconds is not None and self.train_seconds <= 0) or self.prompts < 1 or self.max_new_tokens < 2:
            raise UserError("--train-seconds and --prompts must be more than 0, --max-new-tokens more than 1")


@dataclass
class Race:
    """Two answers to one question, by plain decoding and then with a drafter."""

    question: str
    name: str
    """The name of the way of drafting."""
    plain: Streamed
    drafted: Streamed
    divergence: Divergence | None
    """The divergence of the texts; None if they are the same."""

    @property
    def ratio(self) -> float:
        return self.drafted.tokens_per_second / self.plain.tokens_per_second

    def line(self) -> str:
        """Return both rates, their ratio, and whether the texts are equal, in one line."""
        rates = f"{number(self.plain.tokens_per_second, '.1f')} tokens/s, {self.name}"
        text = "the same text"
        if (found := self.divergence) is not None:
            kind = "a near-tie that rounding decides" if found.tie else "more than rounding explains"
            gap = f"logit gap {number(found.gap, '.4f')}, noise {number(found.noise, '.4f')}"
            text = f"the texts differ from token {found.position + 1} on, {kind} ({gap})"
        return (
            f"{PLAIN} {rates} {number(self.drafted.tokens_per_second, '.1f')} tokens/s: {number(self.ratio)}x, {text}"
        )

    def as_dict(self) -> dict[str, Any]:
        return {
            "question": self.question,
            "method": self.name,
            "plain": self.plain.as_dict(),
            "drafted": self.drafted.as_dict(),
            "ratio": self.ratio,
            "identical": True if self.divergence is None else self.divergence.as_dict(),
        }


@dataclass
class DemoResult:
    """The demo's figures."""

    model: str
    race: Race
    comparison: Comparison
    environment: dict[str, Any]
    training: dict[str, Any] | None
    """The figures of the drafter trained in the demo; None without training."""

    def as_dict(self) -> dict[str, Any]:
        summaries = self.comparison.summaries
        return {
            "model": self.model,
            "answer": self.race.as_dict(),
            "methods": {summary.name: summary.headline() for summary in summaries},
            "details": {summary.name: summary.as_dict() for summary in summaries},
            "environment": self.environment,
            "training": self.training,
        }

    def show(self, console: Console) -> None:
        """Print the table, notes on disturbances, and the conclusion; the streamed answer was shown before."""
        summaries = self.comparison.summaries
        console.print()
        console.print(rendered(summaries, self.comparison.temperature, wide=console.width >= WIDE))
        facts = self.environment
        made_on = f"{facts['cpu']}, {counted(facts['threads'], 'thread')}, {facts['dtype']}, {facts['backend']} backend"
        console.print(f"held-out prompts: {summaries[0].questions}; {made_on}")
        if any(summary.divergences for summary in summaries):
            console.print(
                f"Texts differ where {facts['dtype']} rounds a near-tie of two tokens differently in one-token and "
                "many-token forwards; rare with --dtype float32, ruled out by `outdraft generate --exact`."
            )
        if (note := busy(facts)) is not None:
            console.print(note)
        console.print(closing(summaries), style="bold")


def run_demo(settings: DemoSettings, console: Console, remarks: Console) -> DemoResult:
    """Train if requested, stream an answer, then compare. Two idle cores need under three minutes without training."""
    name = chosen(settings, remarks)
    whole = load_target(name, dtype=settings.dtype, backend="eager")
    target = load_target(whole.model, whole.tokenizer, backend=settings.backend)  # the same weights
    prompts: list[Any] = read_prompts(NAMED[name].prompts, settings.prompts)
    with ExitStack() as stack:
        training, drafters, methods, first = None, list[str](), methods_of(name), name
        if settings.train:
            folder = settings.output_dir or Path(stack.enter_context(tempfile.TemporaryDirectory())) / "drafter"
            seconds = settings.train_seconds or TRAIN_SECONDS
            training = train_drafter(whole, folder, seconds, remarks)
            drafters = [f"{TRAINED}={folder}", f"{SHIPPED}={shipped_drafter(name)}"]
            methods, first = [LOOKUP, "fspad", "fspad" + WITH_LOOKUP], str(folder)
        elif methods == [LOOKUP]:
            remarks.print(f"no drafter ships for {name} in this version: prompt lookup drafts alone", soft_wrap=True)
        end = time.perf_counter() + DECODE_SECONDS
        method = next((one for one in FAVOURITES if one in methods), LOOKUP)
        drafter = load_drafter_for(target, None if method == LOOKUP else first, method=method, backend=settings.backend)
        streamed = race(
            SpeculativeModel(target, drafter),
            method if method == LOOKUP else (TRAINED if settings.train else method) + WITH_LOOKUP,
            prompts[0],
            console,
            2 * settings.max_new_tokens,
        )
        asked = BenchSettings(name, drafters, methods, include_transformers=True, backend=settings.backend)
        rivals = contenders(target, asked, stock=whole)
        rivals.sort(key=lambda rival: rival.name != STOCK)  # what users have today comes first
        encoded = encode(prompts, target)
        count, tokens = affordable(rivals, encoded[0], len(encoded), settings.max_new_tokens, end)
        remarks.print(f"decoding {count} held-out prompts, {len(rivals)} ways each, {tokens} tokens at most")
        comparison = measured(target, rivals, encoded[:count], max_new_tokens=tokens, remarks=remarks, end=end)
    return DemoResult(name, streamed, comparison, environment(target), training)


def race(model: SpeculativeModel, name: str, messages: list[Message], console: Console, max_new_tokens: int) -> Race:
    alone = model.with_drafter(None)
    greedy: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": False}
    for one in (alone, model):  # first calls are slower
        one.generate(messages, **greedy | {"max_new_tokens": min(WARM_UP_TOKENS, max_new_tokens)})
    question = messages[-1]["content"]
    console.print(Text.assemble(("Question: ", "bold"), question), "")

    console.print(Text(f"{PLAIN} decoding, one pass of the model a token", "bold"))
    plain = stream(alone.stream(messages, **greedy), console)
    console.print(plain.line(), "", style="dim", markup=False, sep="\n")

    console.print(Text(f"with drafting ({name})", "bold"))
    if console.is_terminal and not console.no_color:
        console.print(legend())
    drafted = stream(model.stream(messages, **greedy), console, show_drafts=True)
    console.print(drafted.line(), "", style="dim", markup=False, sep="\n")

    divergence = None
    if plain.tokens != drafted.tokens:
        assert model.tokenizer is not None  # it has streamed text
        difference = Difference(0, encode_chat(messages, model.tokenizer), plain.tokens, drafted.tokens)
        divergence = divergences(model.target, [difference])[0]
    found = Race(question, name, plain, drafted, divergence)
    console.print(Text(found.line(), "bold"))
    return found


def chosen(settings: DemoSettings, remarks: Console) -> str:
    """Choose the model among `MODELS`; print a remark where the real one is not available."""
    if settings.train or settings.model is not None:
        return REFERENCE if settings.train else str(settings.model)
    try:
        place_of(SMOLLM2)
    except UserError as error:
        line = f"{error}. The demo goes on with the small reference target that ships with outdraft."
        remarks.print(line, markup=False, soft_wrap=True)
        return REFERENCE
    return SMOLLM2


def methods_of(name: str) -> list[str]:
    """List prompt lookup and every drafter that ships for a named model; FSPAD's also with n-gram drafts."""
    there = [method for method in ORDER if method in shipped_drafters(name)]
    both = [(method, method + WITH_LOOKUP) if method == "fspad" else (method,) for method in there]
    return [LOOKUP, *(method for several in both for method in several)]


def affordable(
    rivals: Sequence[Contender], prompt: list[int], prompts: int, max_new_tokens: int, end: float
) -> tuple[int, int]:
    """Return the prompts, and tokens of each, that all contenders can decode until about `end` (`perf_counter`)."""
    seconds = 0.0
    for rival in rivals:
        for _ in range(2):  # the first one warms up
            answer = rival.decode(prompt, {"max_new_tokens": min(WARM_UP_TOKENS, max_new_tokens)})
        seconds += answer.seconds / len(answer.tokens)
    fitting = max(0.0, end - time.perf_counter()) / seconds  # tokens of every rival
    tokens = min(max_new_tokens, max(FEWEST_TOKENS, int(fitting / FEWEST_PROMPTS)))
    return min(prompts, max(FEWEST_PROMPTS, int(fitting / tokens))), tokens


# --- training a drafter in a given time, with data and steps chosen to fit ------------------------------------------


CONVERSATIONS = DATA / "train_conversations.jsonl"
"""The file of training prompts with the target's own answers."""

BATCH = 8

RECIPE: dict[str, Any] = {
    "max_length": 384,
    "batch_size": BATCH,
    "learning_rate": 3e-3,
    "lr_schedule": "cosine",
    "features": "cached",
}
"""The settings for a minute or two: high peak rate, small batches, and a single run of the target, the costly part."""

PASSES = 5
"""The number of passes over the conversations. In equal time, 420 steps over 600 reached tau 3.4, single passes over
more 2.8."""

SHARE_FOR_STEPS = 0.9
"""The share of the time spent on features and steps; the rest is for saving and for slower steps than the timed one."""

FEWEST = 10
"""The fewest steps, and the fewest conversations."""


def train_drafter(target: Target, folder: Path, seconds: float, remarks: Console) -> dict[str, Any]:
    """Train an FSPAD drafter in about `seconds`; return the run's figures.

    Args:
        target: the target on the plain backend, since gradients pass through its head.
    """
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        aside = Path(name)
        config = DrafterConfig(
            **RECIPE,
            data=CONVERSATIONS,
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
        kept = split_lines(CONVERSATIONS.read_text(encoding="utf-8"))[:count]
        chosen.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        changes = {"data": chosen, "max_steps": steps, "logging_steps": max(1, steps // 10)}
        result = train(target, config.model_copy(update=changes), console=remarks)
    return {"conversations": count, "steps": result.steps, "seconds": time.perf_counter() - began, **result.metrics}


def fitting(trial: TrainPlan, seconds: float) -> tuple[int, int]:
    """Return the conversations, and the steps over them, that take about `seconds`.

    Args:
        trial: plan of a run of one step over all conversations, with cached features.
        seconds: time for features and steps.
    """
    each = (trial.seconds - trial.step_seconds) / trial.examples
    count = int(seconds / (each + PASSES * trial.step_seconds / BATCH))
    count = max(min(FEWEST, trial.examples), min(count, trial.examples))
    return count, max(FEWEST, int((seconds - count * each) / trial.step_seconds))
