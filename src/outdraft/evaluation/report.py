"""Summaries as tables on a terminal. Computes nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

from rich.console import Group
from rich.table import Table
from rich.text import Text

from outdraft.evaluation.identity import Divergence
from outdraft.evaluation.measure import PLAIN
from outdraft.evaluation.peers import STOCK
from outdraft.evaluation.summary import Summary
from outdraft.output import number

Column = Callable[[Summary], str]

SHOWN_DIVERGENCES = 8

WIDE = 110
"""Columns of a terminal on which the figures of rounds are shown too."""


def table(summaries: Sequence[Summary], temperature: float) -> Table:
    """One row a contender: how fast, and whether the text is the same; Spec-Bench's own speed-up where there is one."""
    columns: dict[str, Column] = {
        "method": lambda s: s.name,
        "tau": lambda s: number(s.statistics.tau),
        "tokens/s": lambda s: number(s.tokens_per_second, ".1f"),
        "speed-up [95%]": speedup,
    }
    if any(math.isfinite(summary.over_stock) for summary in summaries):
        columns["over stock"] = lambda s: f"{number(s.over_stock)}x"
    if any(math.isfinite(summary.spec_bench_speedup) for summary in summaries):
        columns["Spec-Bench's own"] = lambda s: f"{number(s.spec_bench_speedup)}x"
    return _table(summaries, {**columns, "identical": verdict}, law(temperature))


def rounds_table(summaries: Sequence[Summary]) -> Table:
    """One row a contender: what happens in a round, and what it costs."""
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


def law(temperature: float) -> str:
    """In a word or two."""
    return "greedy" if temperature == 0 else f"temperature {temperature:g}"


def group_table(groups: Mapping[str, Sequence[Summary]], temperature: float) -> Table:
    """One row a contender, one column a group: tau and speed-up."""
    built = Table(title=f"by task, {law(temperature)}: speed-up (tau)", title_justify="left")
    built.add_column("method", no_wrap=True)
    for name, summaries in groups.items():
        built.add_column(f"{name} ({summaries[0].questions})", justify="right")
    for row in zip(*groups.values(), strict=True):
        figures = (f"{number(s.speedup)}x ({number(s.statistics.tau)})" for s in row)
        built.add_row(row[0].name, *figures)
    return built


def speedup(summary: Summary) -> str:
    """With its interval."""
    low, high = summary.speedup_interval
    return f"{number(summary.speedup)}x [{number(low)}, {number(high)}]"


def drafted(summary: Summary) -> str:
    """Levels drafted in a round, on average, and the share of rounds that drafted at all where some did not."""
    depths = summary.statistics.depths
    if not any(depths):
        return "-"
    idle = depths.count(0) / len(depths)
    return f"{sum(depths) / len(depths):.1f}" + (f" ({1 - idle:.0%})" if idle > 0.005 else "")


def shares(summary: Summary) -> str:
    """Where the time after the prefill went."""
    counts = summary.statistics
    if not summary.timed:
        return "-"
    parts = (counts.draft_seconds, counts.verify_seconds, counts.rest_seconds)
    return " | ".join(f"{part / counts.decode_seconds:.0%}" for part in parts)


def verdict(summary: Summary) -> str:
    """On the texts, in a few words."""
    if summary.divergences is None:
        return "-"
    if not summary.divergences:
        return "yes"
    ties = sum(divergence.tie for divergence in summary.divergences)
    parted = f"{len(summary.divergences)} part"
    return f"{parted} at near-ties" if ties == len(summary.divergences) else f"{parted}, {ties} at near-ties"


def _turn(found: Divergence) -> str:
    return f", turn {found.turn + 1}," if found.turn else ""


def divergence_lines(summaries: Iterable[Summary]) -> list[str]:
    """Position, gap and noise of the first few divergences."""
    lines = [
        f"{summary.name}: prompt {found.prompt + 1}{_turn(found)} parts at token {found.position + 1}, logit gap "
        f"{number(found.gap, '.4f')}, noise {number(found.noise, '.4f')}"
        for summary in summaries
        for found in summary.divergences or []
    ]
    more = len(lines) - SHOWN_DIVERGENCES
    return lines[:SHOWN_DIVERGENCES] + ([f"... and {more} more (all with --json)"] if more > 0 else [])


def closing(summaries: Sequence[Summary]) -> str:
    """Which way of drafting was the fastest, how sure that is, and which ones lost, in a sentence."""
    drafting = [summary for summary in summaries if summary.method != "none"]
    if not drafting:
        return f"Only {PLAIN} decoding ran, so there is nothing to compare."
    best = max(drafting, key=lambda summary: summary.speedup)
    if best.speedup > 1:
        text = f"Fastest here: {best.name}, {speedup(best)} over {PLAIN} decoding"
        if math.isfinite(best.over_stock):
            text += f", {number(best.over_stock)}x over {STOCK}"
        if not best.speedup_interval[0] > 1:
            text += " (not proven: too few questions to rule out 1x)"
    else:
        text = f"Nothing was faster than {PLAIN} decoding here"
    if losing := [f"{summary.name} ({number(summary.speedup)}x)" for summary in drafting if summary.speedup < 1]:
        text += f"; slower than {PLAIN} decoding: {', '.join(losing)}"
    return text + "."


def rendered(summaries: Sequence[Summary], temperature: float, wide: bool = True) -> Group:
    """The table, where there is room one of the rounds too, and below them where texts part."""
    notes = [Text(line, style="dim") for line in divergence_lines(summaries)]
    return Group(table(summaries, temperature), *([rounds_table(summaries)] if wide else []), *notes)
