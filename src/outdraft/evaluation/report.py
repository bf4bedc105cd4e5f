"""Summaries as tables on a terminal. Computes nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from rich.console import Group
from rich.table import Table
from rich.text import Text

from outdraft.console.output import number
from outdraft.evaluation.identity import Divergence
from outdraft.evaluation.summary import Summary

SHOWN_DIVERGENCES = 8

WIDE = 110
"""Columns of a terminal that has room for all figures."""


def table(summaries: Iterable[Summary], temperature: float, wide: bool = True) -> Table:
    """One row a contender; without acceptance, first token and shares of time where there is little room."""
    law = "greedy" if temperature == 0 else f"temperature {temperature:g}"
    columns: dict[str, Callable[[Summary], str]] = {
        "method": lambda s: s.name,
        "tau": lambda s: number(s.statistics.tau),
        "tokens/s": lambda s: number(s.tokens_per_second, ".1f"),
        "speed-up [95%]": speedup,
        "identical": verdict,
    }
    if wide:
        columns |= {
            "drafted": drafted,
            "accepted": lambda s: number(s.statistics.acceptance_rate, ".0%"),
            "first token": lambda s: number(s.first_token_seconds * 1000, ".0f") + " ms",
            "draft | verify | rest": shares,
        }
    built = Table(title=law, title_justify="left")
    for name in columns:
        built.add_column(name, justify="left" if name in ("method", "identical") else "right", no_wrap=True)
    for summary in summaries:
        built.add_row(*(column(summary) for column in columns.values()))
    return built


def group_table(groups: Mapping[str, Sequence[Summary]], temperature: float) -> Table:
    """One row a contender, one column a group: tau and speed-up."""
    law = "greedy" if temperature == 0 else f"temperature {temperature:g}"
    built = Table(title=f"by task, {law}: speed-up (tau)", title_justify="left")
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
    turn = getattr(found, "turn", 0)
    return f", turn {turn + 1}," if turn else ""


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


def rendered(summaries: Sequence[Summary], temperature: float, wide: bool = True) -> Group:
    """The table, and below it where texts part."""
    notes = [Text(line, style="dim") for line in divergence_lines(summaries)]
    return Group(table(summaries, temperature, wide), *notes)
