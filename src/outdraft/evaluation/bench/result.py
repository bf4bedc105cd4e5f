"""The findings of a benchmark, as JSON and as tables on a terminal."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from outdraft.data.provenance import busy
from outdraft.evaluation.audit.stock import Divergence
from outdraft.evaluation.bench import spec_bench
from outdraft.evaluation.bench.baselines import STOCK
from outdraft.evaluation.bench.measure import PLAIN, Contender, Run
from outdraft.evaluation.bench.questions import LeftOut, Question
from outdraft.evaluation.bench.summary import Summary, paired, scattered, summarise
from outdraft.output import counted, number
from outdraft.target.target import Target


@dataclass
class Comparison:
    """The comparison of all contenders at one temperature."""

    temperature: float
    summaries: list[Summary]
    """The figures over all questions."""
    runs: dict[str, list[Run]]
    groups: dict[str, list[Summary]] = field(default_factory=dict)
    """The figures over the questions of each group (task)."""
    questions: Sequence[Question] = ()

    def __getitem__(self, name: str) -> Summary:
        return next(summary for summary in self.summaries if summary.name == name)

    @property
    def cut_short(self) -> int:
        """The number of a contender's conversations that ended early, as the next turn did not fit the context."""
        return sum(
            len(run.answers) < len(self.questions[run.prompt].turns)
            for own in self.runs.values()
            for run in own
            if self.questions
        )


@dataclass
class BenchResult:
    """The comparisons at every temperature, with the facts of machine, model and settings."""

    settings: dict[str, Any]
    environment: dict[str, Any]
    comparisons: list[Comparison]
    questions: Sequence[Question] = ()
    left_out: Sequence[LeftOut] = ()
    """The lines that could not be used, and the questions too long for the model."""

    def as_dict(self) -> dict[str, Any]:
        return {
            "settings": self.settings,
            "environment": self.environment,
            "left_out": [asdict(one) for one in self.left_out],
            "results": [
                {
                    "temperature": one.temperature,
                    "verdict": closing(one.summaries),
                    "disturbed": scattered(one.runs),
                    "conversations_cut_short": one.cut_short,
                    "methods": {s.name: s.as_dict() for s in one.summaries},
                    "groups": {
                        group: {s.name: s.as_dict() for s in summaries} for group, summaries in one.groups.items()
                    },
                }
                for one in self.comparisons
            ],
        }

    def show(self, console: Console, all_figures: bool = False) -> None:
        """Print a table for every temperature, and one by group where there are several.

        Args:
            all_figures: print the other ways of computing a speed-up, too.
        """
        facts = self.environment
        console.print(
            f"{facts['cpu']}, {counted(facts['threads'], 'thread')}, {facts['device']}, {facts['dtype']}, "
            f"{facts['backend']} backend; {counted(self.settings['prompts'], 'prompt')}, "
            f"{counted(self.settings['repetitions'], 'repetition')}",
            markup=False,
        )
        for one in self.comparisons:
            console.print(rendered(one.summaries, one.temperature, console.width >= WIDE, all_figures))
            if len(one.groups) > 1:
                console.print(group_table(one.groups, one.temperature))
            if one.cut_short:
                console.print(f"{one.cut_short} conversations ended early: the next turn did not fit the context")
            console.print(closing(one.summaries), style="bold", markup=False)
        for note in (busy(facts), *(scattered(one.runs) for one in self.comparisons)):
            if note is not None:
                console.print(note)
        for left in self.left_out[:8]:
            console.print(f"left out: {left.source}: {left.reason}", markup=False)
        if len(self.left_out) > 8:
            console.print(f"... and {len(self.left_out) - 8} more left out (all with --json)")


def summed_up(
    target: Target,
    rivals: Sequence[Contender],
    runs: dict[str, list[Run]],
    parted: Mapping[str, list[Divergence] | None],
    temperature: float,
    questions: Sequence[Question],
) -> Comparison:
    """Sum up the figures of all runs, and those of every group."""
    groups = list(dict.fromkeys(question.group for question in questions))
    answers = {
        rival.name: spec_bench.records(rival.name, runs[rival.name], questions, target.tokenizer)
        for rival in rivals
        if questions
    }

    def of(rival: Contender, group: str | None) -> Summary:
        indices = {i for i, question in enumerate(questions) if question.group == group}
        own, plain, stock = (
            [run for run in runs.get(name, []) if group is None or run.prompt in indices]
            for name in (rival.name, PLAIN, STOCK)
        )
        found = parted[rival.name]
        if found is not None and group is not None:
            found = [divergence for divergence in found if divergence.prompt in indices]
        summary = summarise(rival.name, rival.method, rival.parameters, own, plain, found)
        if stock:
            summary.over_stock, summary.over_stock_interval = paired(own, stock)
        if questions:
            lines, base = (
                [
                    line
                    for line, question in zip(answers[name], questions, strict=True)
                    if group in (None, question.group)
                ]
                for name in (rival.name, PLAIN)
            )
            summary.spec_bench_speedup = spec_bench.figures(lines, base, target.tokenizer)["speedup"]
        return summary

    return Comparison(
        temperature,
        [of(rival, None) for rival in rivals],
        runs,
        {group: [of(rival, group) for rival in rivals] for group in groups},
        questions,
    )


Column = Callable[[Summary], str]

SHOWN_DIVERGENCES = 8

WIDE = 110
"""The least width of a terminal, in columns, that also shows the figures of rounds."""


def table(summaries: Sequence[Summary], temperature: float, all_figures: bool = False) -> Table:
    """Make a table of speed and equal texts, one row a contender; with the other speed-ups that are known, if asked."""
    columns: dict[str, Column] = {
        "method": lambda s: s.name,
        "tau": lambda s: number(s.statistics.tau),
        "tokens/s": lambda s: number(s.tokens_per_second, ".1f"),
        "speed-up [95%]": speedup,
    }
    others = {
        "over stock": "over_stock",
        "of mean rates": "mean_rate_speedup",
        "Spec-Bench's own": "spec_bench_speedup",
    }
    for name, attribute in others.items() if all_figures else ():
        if any(math.isfinite(getattr(summary, attribute)) for summary in summaries):
            columns[name] = partial(lambda attribute, s: f"{number(getattr(s, attribute))}x", attribute)
    return _table(summaries, {**columns, "identical": verdict}, temperature_name(temperature))


def rounds_table(summaries: Sequence[Summary]) -> Table:
    """Make a table of a round's counts and costs, one row a contender."""
    columns: dict[str, Column] = {
        "method": lambda s: s.name,
        "drafted": drafted,
        "accepted": lambda s: number(s.statistics.acceptance_rate, ".0%"),
        "first token": lambda s: number(s.first_token_seconds * 1000, ".0f") + " ms",
        "draft | verify | rest": shares,
    }
    return _table(summaries, columns, "rounds: levels drafted, candidates accepted, time after the first token")


def _table(summaries: Sequence[Summary], columns: Mapping[str, Column], title: str) -> Table:
    built = Table(title=title, title_justify="left")
    for name in columns:
        built.add_column(
            name, justify="left" if name in ("method", "identical") else "right", no_wrap=name != "identical"
        )
    for summary in summaries:
        built.add_row(*(column(summary) for column in columns.values()))
    return built


def temperature_name(temperature: float) -> str:
    """Name a temperature: `greedy` or `temperature 1`."""
    return "greedy" if temperature == 0 else f"temperature {temperature:g}"


def group_table(groups: Mapping[str, Sequence[Summary]], temperature: float) -> Table:
    """Make a table of tau and speed-up, one row a contender, one column a group."""
    built = Table(title=f"by task, {temperature_name(temperature)}: speed-up (tau)", title_justify="left")
    built.add_column("method", no_wrap=True)
    for name, summaries in groups.items():
        built.add_column(f"{name} ({summaries[0].questions})", justify="right")
    for row in zip(*groups.values(), strict=True):
        figures = (f"{number(s.speedup)}x ({number(s.statistics.tau)})" for s in row)
        built.add_row(row[0].name, *figures)
    return built


def speedup(summary: Summary) -> str:
    """Format the speed-up with its interval, which one question does not have."""
    low, high = summary.speedup_interval
    if not math.isfinite(low):
        return f"{number(summary.speedup)}x"
    return f"{number(summary.speedup)}x [{number(low)}, {number(high)}]"


def drafted(summary: Summary) -> str:
    """Format the mean levels drafted in a round, and the share of rounds that drafted where some did not."""
    depths = summary.statistics.depths
    if not any(depths):
        return "-"
    idle = depths.count(0) / len(depths)
    return f"{sum(depths) / len(depths):.1f}" + (f" ({1 - idle:.0%})" if idle > 0.005 else "")


def shares(summary: Summary) -> str:
    """Format the shares of the time after the prefill."""
    counts = summary.statistics
    if not summary.timed:
        return "-"
    parts = (counts.draft_seconds, counts.verify_seconds, counts.rest_seconds)
    return " | ".join(f"{part / counts.decode_seconds:.0%}" for part in parts)


def verdict(summary: Summary) -> str:
    """Say in a few words whether the texts equal plain decoding's."""
    if summary.divergences is None:
        return "-"
    if not summary.divergences:
        return "yes"
    ties = sum(divergence.tie for divergence in summary.divergences)
    parted = f"{len(summary.divergences)} differ"
    return f"{parted} at near-ties" if ties == len(summary.divergences) else f"{parted}, {ties} at near-ties"


def divergence_lines(summaries: Iterable[Summary]) -> list[str]:
    """List position, gap and noise of the first few divergences."""
    lines = [
        f"{summary.name}: prompt {found.prompt + 1}"
        + (f", turn {found.turn + 1}," if found.turn else "")
        + f" differs from token {found.position + 1} on, "
        + f"logit gap {number(found.gap, '.4f')}, noise {number(found.noise, '.4f')}"
        for summary in summaries
        for found in summary.divergences or []
    ]
    more = len(lines) - SHOWN_DIVERGENCES
    return lines[:SHOWN_DIVERGENCES] + ([f"... and {more} more (all with --json)"] if more > 0 else [])


def closing(summaries: Sequence[Summary]) -> str:
    """Return a sentence on the fastest way of drafting, its certainty, and the ways that lost."""
    drafting = [summary for summary in summaries if summary.method != "none"]
    if not drafting:
        return f"Only {PLAIN} decoding ran, so there is nothing to compare."
    if not any(summary.statistics.rounds for summary in summaries):
        return "No answer was longer than one token, so nothing was drafted and no speed-up means anything."
    best = max(drafting, key=lambda summary: summary.speedup)
    if best.speedup > 1:
        text = f"Fastest here: {best.name}, {speedup(best)} over {PLAIN} decoding"
        if math.isfinite(best.over_stock):
            text += f", {number(best.over_stock)}x over {STOCK}"
        if not best.speedup_interval[0] > 1:
            text += " (not proven: too few questions to rule out 1x)"
    else:
        text = f"Nothing was faster than {PLAIN} decoding here"
    if losing := [f"{summary.name} ({number(summary.speedup)}x)" for summary in drafting if summary.speedup < 0.995]:
        text += f"; slower than {PLAIN} decoding: {', '.join(losing)}"
    return text + "."


def rendered(summaries: Sequence[Summary], temperature: float, wide: bool = True, all_figures: bool = False) -> Group:
    """Return the table, where the width allows also that of rounds, and the divergences below them."""
    notes = [Text(line, style="dim") for line in divergence_lines(summaries)]
    return Group(table(summaries, temperature, all_figures), *([rounds_table(summaries)] if wide else []), *notes)
