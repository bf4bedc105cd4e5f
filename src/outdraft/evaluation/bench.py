"""The comparison that `outdraft bench` and the demo print: measure, judge the texts, sum up.

Ties the rooms of the evaluation together; each decision is made in one of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from outdraft.errors import UserError
from outdraft.evaluation.contenders import contenders
from outdraft.evaluation.environment import environment
from outdraft.evaluation.identity import divergences
from outdraft.evaluation.measure import PLAIN, Contender, Run, compare
from outdraft.evaluation.prompts import Prompt, encode, read_prompts
from outdraft.evaluation.report import WIDE, rendered
from outdraft.evaluation.summary import Summary, summarise
from outdraft.loading import REFERENCE, load_target
from outdraft.reference import load_prompts
from outdraft.target import Target


@dataclass
class BenchSettings:
    """What to compare on what."""

    model: str
    draft_models: list[str] = field(default_factory=list)
    """`PATH` or `NAME=PATH` each."""
    methods: list[str] | None = None
    data: Path | None = None
    """The shipped held-out prompts when None."""
    limit: int | None = None
    temperatures: list[float] = field(default_factory=lambda: [0.0])
    repetitions: int = 1
    max_new_tokens: int = 128
    seed: int = 0
    tree: dict[str, Any] = field(default_factory=dict)
    controllers: list[str] = field(default_factory=lambda: ["fixed"])
    """How far to draft; every drafter runs with each."""
    include_transformers: bool = False
    dtype: str | None = None
    device: str | None = None
    backend: str | None = None

    def __post_init__(self) -> None:
        for name in ("limit", "repetitions", "max_new_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
        for temperature in self.temperatures:
            if temperature < 0:
                raise UserError(f"temperature must be 0 (greedy) or more, not {temperature:g}")


@dataclass
class Comparison:
    """All contenders at one temperature."""

    temperature: float
    summaries: list[Summary]
    runs: dict[str, list[Run]]

    def __getitem__(self, name: str) -> Summary:
        return next(summary for summary in self.summaries if summary.name == name)


@dataclass
class BenchResult:
    """Comparisons at every temperature, and what they were made on."""

    settings: dict[str, Any]
    environment: dict[str, Any]
    comparisons: list[Comparison]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "settings": self.settings,
            "environment": self.environment,
            "results": [
                {"temperature": one.temperature, "methods": {s.name: s.as_dict() for s in one.summaries}}
                for one in self.comparisons
            ],
        }

    def show(self, console: Console) -> None:
        """Print a table for every temperature."""
        facts = self.environment
        console.print(
            f"{facts['cpu']}, {facts['threads']} threads, {facts['device']}, {facts['dtype']}, {facts['backend']} "
            f"backend; {self.settings['prompts']} prompts, {self.settings['repetitions']} repetitions",
            markup=False,
        )
        for one in self.comparisons:
            console.print(rendered(one.summaries, one.temperature, wide=console.width >= WIDE))


def run_bench(settings: BenchSettings, remarks: Console) -> BenchResult:
    """Load, measure, sum up.

    Args:
        settings: what to compare.
        remarks: where progress goes.

    Raises:
        UserError: something that cannot be loaded, read or decoded.
    """
    prompts: Sequence[Prompt]
    if settings.data is not None:
        prompts = read_prompts(settings.data, settings.limit)
    else:
        prompts = load_prompts("heldout")[: settings.limit]
    target = load_target(settings.model, dtype=settings.dtype, device=settings.device, backend=settings.backend)
    encoded = encode(prompts, target)
    rivals = contenders(
        target,
        settings.draft_models,
        settings.methods,
        backend=settings.backend,
        tree=settings.tree,
        controllers=settings.controllers,
        shipped=settings.model == REFERENCE,
        include_transformers=settings.include_transformers,
    )
    comparisons = [
        measured(
            target,
            rivals,
            encoded,
            temperature=temperature,
            repetitions=settings.repetitions,
            max_new_tokens=settings.max_new_tokens,
            seed=settings.seed,
            remarks=remarks,
        )
        for temperature in settings.temperatures
    ]
    shown = {
        "model": settings.model,
        "draft_models": settings.draft_models,
        "data": None if settings.data is None else str(settings.data),
        "prompts": len(encoded),
        "repetitions": settings.repetitions,
        "max_new_tokens": settings.max_new_tokens,
        "seed": settings.seed,
        "controllers": settings.controllers,
        **settings.tree,
    }
    return BenchResult(shown, environment(target), comparisons)


def measured(
    target: Target,
    rivals: Sequence[Contender],
    prompts: Sequence[list[int]],
    *,
    temperature: float = 0.0,
    repetitions: int = 1,
    max_new_tokens: int = 128,
    seed: int = 0,
    remarks: Console,
) -> Comparison:
    """One comparison of rivals, one of which is `PLAIN`; arguments as in `measure.compare`."""
    title = "greedy" if temperature == 0 else f"temperature {temperature:g}"
    with _progress(remarks, title, len(rivals) * len(prompts) * repetitions) as advance:
        runs = compare(
            rivals,
            prompts,
            repetitions=repetitions,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            progress=advance,
        )
    plain = _first_texts(runs[PLAIN])
    summaries = []
    for rival in rivals:
        own = runs[rival.name]
        parted = divergences(target, prompts, plain, _first_texts(own)) if temperature == 0 else None
        summaries.append(summarise(rival.name, rival.method, rival.parameters, own, runs[PLAIN], parted))
    return Comparison(temperature, summaries, runs)


def _first_texts(runs: Sequence[Run]) -> list[list[int]]:
    """Of every prompt, in order; repetitions of a greedy text say nothing new."""
    return [run.answer.tokens for run in runs if run.repetition == 0]


@contextmanager
def _progress(console: Console, title: str, total: int) -> Iterator[Any]:
    """A bar on a terminal, nothing elsewhere; yields what advances it."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=total)
        yield lambda: bar.advance(task)
