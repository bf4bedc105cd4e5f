"""The report's charts as plotly figures without colours, which the page's script adds. Computes nothing but shares."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from outdraft.evaluation.measure import PLAIN
from outdraft.evaluation.summary import Summary

OVERALL = "all questions"
MARKERS = ("circle", "square", "diamond", "triangle-up", "x", "star", "triangle-down", "pentagon")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
STOCK = "transformers"
"""What the names of peers begin with; their bars are hatched."""

LABELLED_BARS = 30
"""More bars than these carry no figures above them."""

Figure = dict[str, Any]


def charts(summaries: Sequence[Summary], groups: Mapping[str, Sequence[Summary]]) -> list[tuple[str, str, Figure]]:
    """Title, a line on how to read it, and the figure, for those that there is something to draw of."""
    rivals = sorted((s.name for s in summaries if s.name != PLAIN), key=lambda name: name.startswith(STOCK))
    slots = {name: slot for slot, name in enumerate(rivals)}
    drafting = [summary for summary in summaries if any(summary.statistics.depths)]
    found = [
        (
            "How much faster than plain decoding, by task",
            "Median over paired runs of the same question; whiskers are bootstrap 95% intervals over questions. "
            "Hatched bars are the stock library's own methods.",
            _speedups(summaries, groups, slots),
        )
    ]
    if drafting:
        found += [
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
                _histogram(drafting, slots, drafted=True),
            ),
            (
                "How many tokens a round yields",
                "Share of rounds by the tokens that were accepted in them, the bonus token included; the mean is tau.",
                _histogram(drafting, slots, drafted=False),
            ),
        ]
    timed = [summary for summary in summaries if summary.timed]
    if timed:
        found.append(
            (
                "Where the time of a round goes",
                "Milliseconds of an average round: drafting, the target's forward that verifies, and everything else. "
                "The prefill is not part of it; the stock library does not take its rounds apart.",
                _times(timed),
            )
        )
    return [(title, note, figure) for title, note, figure in found if figure["data"]]


def _speedups(
    summaries: Sequence[Summary], groups: Mapping[str, Sequence[Summary]], slots: Mapping[str, int]
) -> Figure:
    columns = {OVERALL: summaries, **(groups if len(groups) > 1 else {})}
    rivals = [summary for summary in summaries if summary.name != PLAIN]
    labelled = len(rivals) * len(columns) <= LABELLED_BARS
    data = []
    for rival in rivals:
        own = [next(s for s in column if s.name == rival.name) for column in columns.values()]
        above, below = ([_gap(s, side) for s in own] for side in (1, 0))
        data.append(
            {
                "type": "bar",
                "name": rival.name,
                "meta": {"slot": slots[rival.name]},
                "marker": _hatched(rival.name),
                "x": [f"{name}<br>n = {column[0].questions}" for name, column in columns.items()],
                "y": [_number(s.speedup) for s in own],
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
    layout = _layout("task, n questions each", "speed-up (plain decoding = 1)", 400)
    layout["barmode"] = "group"
    layout["bargap"] = 0.22
    layout["shapes"] = [
        {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": 1, "y1": 1, "line": {"width": 1.5, "dash": "dash"}}
    ]
    layout["yaxis"]["rangemode"] = "tozero"
    return {"data": data, "layout": layout}


def _acceptance(summaries: Sequence[Summary], slots: Mapping[str, int]) -> Figure:
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


def _histogram(summaries: Sequence[Summary], slots: Mapping[str, int], drafted: bool) -> Figure:
    data = []
    for summary in summaries:
        counts = summary.statistics
        values = counts.depths if drafted else [accepted + 1 for accepted in counts.lengths]
        ticks = list(range(min(values), max(values) + 1))
        data.append(
            {
                "type": "bar",
                "name": summary.name,
                "meta": {"slot": slots[summary.name]},
                "marker": _hatched(summary.name),
                "x": ticks,
                "y": [100 * values.count(tick) / len(values) for tick in ticks],
                "hovertemplate": "%{x}: %{y:.1f}% of " + str(len(values)) + " rounds<extra>%{fullData.name}</extra>",
            }
        )
    label = "levels drafted in a round (tokens of a chain)" if drafted else "tokens emitted in a round"
    layout = _layout(label, "rounds (%)", 320)
    layout["barmode"] = "group"
    layout["xaxis"]["dtick"] = 1
    return {"data": data, "layout": layout}


def _times(summaries: Sequence[Summary]) -> Figure:
    parts = {"draft": (1, "/"), "verify": (0, ""), "rest": (6, ".")}
    names = [f"{s.name} (tau {s.statistics.tau:.2f})" for s in reversed(summaries)]
    data = [
        {
            "type": "bar",
            "orientation": "h",
            "name": part,
            "meta": {"slot": slot},
            "marker": {"pattern": {"shape": pattern}} if pattern else {},
            "y": names,
            "x": [s.milliseconds_per_round[part] for s in reversed(summaries)],
            "customdata": [s.milliseconds_per_round[part] / s.statistics.tau for s in reversed(summaries)],
            "hovertemplate": f"{part} %{{x:.2f}} ms a round, %{{customdata:.2f}} ms a token<extra></extra>",
        }
        for part, (slot, pattern) in parts.items()
    ]
    layout = _layout("milliseconds a round", "", 130 + 44 * len(summaries))
    layout["barmode"] = "stack"
    layout["legend"]["traceorder"] = "normal"
    layout["yaxis"]["automargin"] = True
    return {"data": data, "layout": layout}


def _layout(x: str, y: str, height: int) -> dict[str, Any]:
    return {
        "height": height,
        "margin": {"l": 62, "r": 16, "t": 36, "b": 62},
        "font": {"family": "system-ui, -apple-system, Segoe UI, Roboto, Arial, sans-serif", "size": 13},
        "xaxis": {
            "title": {"text": x},
            "showgrid": False,
            "zeroline": False,
            "automargin": True,
            "ticks": "outside",
            "fixedrange": True,
        },
        "yaxis": {"title": {"text": y}, "automargin": True, "showline": False, "fixedrange": True},
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        "showlegend": True,
    }


def _hatched(name: str) -> dict[str, Any]:
    return {"pattern": {"shape": "/", "size": 7}} if name.startswith(STOCK) else {}


def _gap(summary: Summary, side: int) -> float | str:
    """From the speed-up to one end of its interval."""
    gap = abs(summary.speedup_interval[side] - summary.speedup)
    return gap if math.isfinite(gap) else "NaN"  # null would draw an interval of no width


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
