"""The bench page's charts as plotly figures without colours, which the page's script adds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from outdraft.evaluation.bench.measure import PLAIN
from outdraft.evaluation.bench.summary import Summary

OVERALL = "all questions"
MARKERS = ("circle", "square", "diamond", "triangle-up", "x", "star", "triangle-down", "pentagon")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
STOCK = "transformers"
"""The prefix of the stock library's method names, whose bars are hatched."""

LABELLED_BARS = 30
"""The most bars that carry figures above them."""

Figure = dict[str, Any]
Slots = Mapping[str, int]
"""The number of each contender's colour."""


def charts(summaries: Sequence[Summary], groups: Mapping[str, Sequence[Summary]]) -> list[tuple[str, str, Figure]]:
    """Return, for every chart with data, its title, a line on how to read it, and the figure."""
    rivals = sorted((s.name for s in summaries if s.name != PLAIN), key=lambda name: name.startswith(STOCK))
    slots = {name: slot for slot, name in enumerate(rivals)}
    drafting = [summary for summary in summaries if any(summary.statistics.depths)]
    found = [
        (
            "How much faster than plain decoding, by task",
            "Median over paired runs of the same question; whiskers are bootstrap 95% intervals over questions. "
            "Hatched bars are the stock library's own methods.",
            _speedups(summaries, groups, slots),
        ),
        (
            "How often a drafted token is accepted, by its position in the draft",
            "Of the rounds that drafted to a position, the share that accepted a token there. The curves count "
            "tree levels: any one candidate of a level accepted.",
            _acceptance(drafting, slots),
        ),
        (
            "How far each method drafts",
            "Share of rounds by the number of levels drafted in them; a chain has one token a level, level 0 is a "
            "round without a draft.",
            _histogram(
                {s.name: s.statistics.depths for s in drafting}, "levels drafted in a round (tokens of a chain)", slots
            ),
        ),
        (
            "How many tokens a round yields",
            "Share of rounds by the tokens that were accepted in them, the bonus token included; the mean is tau.",
            _histogram(
                {s.name: [accepted + 1 for accepted in s.statistics.lengths] for s in drafting},
                "tokens emitted in a round",
                slots,
            ),
        ),
        (
            "Where the time of a round goes",
            "Milliseconds of an average round: drafting, the target's forward that verifies, and everything else. "
            "The prefill is not part of it; the stock library does not take its rounds apart.",
            _times([summary for summary in summaries if summary.timed]),
        ),
    ]
    return [chart for chart in found if chart[2]["data"]]


def _speedups(summaries: Sequence[Summary], groups: Mapping[str, Sequence[Summary]], slots: Slots) -> Figure:
    columns = {OVERALL: summaries, **(groups if len(groups) > 1 else {})}
    labelled = len(slots) * len(columns) <= LABELLED_BARS
    data = []
    for name in (summary.name for summary in summaries if summary.name != PLAIN):
        own = [next(s for s in column if s.name == name) for column in columns.values()]
        below, above = ([_gap(s, side) for s in own] for side in (0, 1))
        data.append(
            {
                **_bars(name, slots),
                "x": [f"{group}<br>n = {column[0].questions}" for group, column in columns.items()],
                "y": [s.speedup if math.isfinite(s.speedup) else None for s in own],
                "error_y": {"type": "data", "symmetric": False, "array": above, "arrayminus": below, "thickness": 1.4},
                "customdata": [
                    [*s.speedup_interval, s.mean_rate_speedup, s.spec_bench_speedup, s.statistics.tau] for s in own
                ],
                "hovertemplate": "%{y:.2f}x [%{customdata[0]:.2f}, %{customdata[1]:.2f}]<br>ratio of mean rates "
                "%{customdata[2]:.2f}x<br>Spec-Bench's own %{customdata[3]:.2f}x<br>tau %{customdata[4]:.2f}"
                "<extra>%{fullData.name}</extra>",
                "text": [f"{s.speedup:.2f}" for s in own] if labelled else None,
                "textposition": "inside",
                "insidetextanchor": "start",
                "textangle": -90 if len(columns) > 1 else 0,
            }
        )
    layout = _layout("task, n questions each", "speed-up (plain decoding = 1)", 400, barmode="group", bargap=0.22)
    layout["shapes"] = [
        {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": 1, "y1": 1, "line": {"width": 1.5, "dash": "dash"}}
    ]
    layout["yaxis"]["rangemode"] = "tozero"
    return {"data": data, "layout": layout}


def _acceptance(summaries: Sequence[Summary], slots: Slots) -> Figure:
    data = []
    for place, summary in enumerate(summaries):
        shares = summary.statistics.acceptance_by_position
        data.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": summary.name,
                "meta": {"slot": slots[summary.name]},
                "marker": {"symbol": MARKERS[place % len(MARKERS)], "size": 9},
                "line": {"dash": DASHES[place % len(DASHES)], "width": 2.2},
                "x": list(range(1, len(shares) + 1)),
                "y": [100 * share for share in shares],
                "customdata": summary.statistics.reached,
                "hovertemplate": "position %{x}: %{y:.1f}% of %{customdata} rounds<extra>%{fullData.name}</extra>",
            }
        )
    layout = _layout("position in the draft (tokens ahead)", "rounds that accepted there (%)", 360)
    layout["xaxis"]["dtick"] = 1
    layout["yaxis"]["range"] = [0, 103]
    return {"data": data, "layout": layout}


def _histogram(values: Mapping[str, Sequence[int]], label: str, slots: Slots) -> Figure:
    """Draw the share of rounds that have each value, by contender."""
    data = []
    for name, own in values.items():
        ticks = list(range(min(own), max(own) + 1))
        data.append(
            {
                **_bars(name, slots),
                "x": ticks,
                "y": [100 * own.count(tick) / len(own) for tick in ticks],
                "hovertemplate": "%{x}: %{y:.1f}% of " + str(len(own)) + " rounds<extra>%{fullData.name}</extra>",
            }
        )
    layout = _layout(label, "rounds (%)", 320, barmode="group")
    layout["xaxis"]["dtick"] = 1
    return {"data": data, "layout": layout}


def _times(summaries: Sequence[Summary]) -> Figure:
    upwards = summaries[::-1]
    parts = {"draft": (1, "/"), "verify": (0, ""), "rest": (6, ".")}
    data = [
        {
            "type": "bar",
            "orientation": "h",
            "name": part,
            "meta": {"slot": slot},
            "marker": {"pattern": {"shape": pattern}} if pattern else {},
            "y": [f"{s.name} (tau {s.statistics.tau:.2f})" for s in upwards],
            "x": [s.milliseconds_per_round[part] for s in upwards],
            "customdata": [s.milliseconds_per_round[part] / s.statistics.tau for s in upwards],
            "hovertemplate": f"{part} %{{x:.2f}} ms a round, %{{customdata:.2f}} ms a token<extra></extra>",
        }
        for part, (slot, pattern) in parts.items()
        if summaries
    ]
    layout = _layout("milliseconds a round", "", 130 + 44 * len(summaries), barmode="stack")
    layout["legend"]["traceorder"] = "normal"
    return {"data": data, "layout": layout}


def _bars(name: str, slots: Slots) -> dict[str, Any]:
    hatched = {"pattern": {"shape": "/", "size": 7}} if name.startswith(STOCK) else {}
    return {"type": "bar", "name": name, "meta": {"slot": slots[name]}, "marker": hatched}


def _layout(x: str, y: str, height: int, **more: Any) -> dict[str, Any]:
    axis = {"automargin": True, "fixedrange": True}
    return {
        "height": height,
        "margin": {"l": 62, "r": 16, "t": 36, "b": 62},
        "font": {"family": "system-ui, -apple-system, Segoe UI, Roboto, Arial, sans-serif", "size": 13},
        "xaxis": {"title": {"text": x}, "showgrid": False, "zeroline": False, "ticks": "outside", **axis},
        "yaxis": {"title": {"text": y}, "showline": False, **axis},
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        "showlegend": True,
        **more,
    }


def _gap(summary: Summary, side: int) -> float | str:
    """Return the distance from the speed-up to one end of its interval."""
    gap = abs(summary.speedup_interval[side] - summary.speedup)
    return gap if math.isfinite(gap) else "NaN"  # null would draw an interval of no width
