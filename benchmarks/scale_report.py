"""How scale curves are shown: tables, a page with a plot for every curve, and the page of the docs with both filled in.

Takes the points that `scale.py` has measured; measures nothing and knows no model.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import studies
from rich.console import Console

from outdraft.errors import UserError
from outdraft.evaluation.bench.measure import PLAIN
from outdraft.output import number, plain

Point = dict[str, Any]
Panel = tuple[str, str, str, list[Any]]
"""Title, label of the x axis, label of the y axis, traces."""

TITLES = {
    "tree": "Size of the draft",
    "context": "Length of the prompt",
    "batch": "Rows decoded together",
    "temperature": "Temperature",
    "shape": "Depth and width of the target (random weights: times are real, taus are not)",
    "memory": "Memory beyond the models",
}
MEGABYTE = 1e6


def report(points: Sequence[Point], taus: Sequence[float], folder: Path, console: Console) -> None:
    """`scale.json`, `scale.md` and, with plotly, `scale.html`; the tables on stdout too."""
    studies.write(folder / "scale.json", json.dumps(plain({"taus": list(taus), "points": list(points)}), indent=1))
    text = "\n\n".join(f"## {TITLES[curve]}\n\n{table}" for curve, table in tables(points, taus).items())
    studies.write(folder / "scale.md", text + "\n")
    print(text)
    page(points, taus, folder / "scale.html", console)


# --- tables ----------------------------------------------------------------------------------------------------------


def tables(points: Sequence[Point], taus: Sequence[float]) -> dict[str, str]:
    """Markdown by curve, for those that have points."""
    found = {}
    for curve in TITLES:
        own = [point for point in points if point["curve"] == curve]
        if own:
            lines = {"shape": lambda own: shape_table(own, taus), "memory": memory_table}.get(curve, speed_table)(own)
            found[curve] = "\n".join([*lines, "", made_on(own)])
    return found


def speed_table(points: Sequence[Point]) -> list[str]:
    """Speed-up and tau of every rival at every point."""
    axis = points[0]["curve"]
    named = {"context": "prompt tokens", "batch": "rows"}.get(axis, axis)
    head = ["drafts", "nodes verified"] if axis == "tree" else [named, "drafts"]
    lines = row([*head, "speed-up", "turns from - to", "tau", "tokens/s", "plain tokens/s"], head=True)
    for point in points:
        for name, one in rivals_of(point):
            place = [name, nodes_of(name)] if axis == "tree" else [f"{point[axis]:g}", drafts(name, point)]
            low, high = one["spread"]
            speed = [f"{one['speedup']:.2f}", f"{low:.2f} - {high:.2f}", f"{one['tau']:.2f}"]
            rates = [one["tokens_per_second"], point["rivals"][PLAIN]["tokens_per_second"]]
            lines += row([*map(str, place), *speed, *(f"{rate:.1f}" for rate in rates)])
    return lines


def shape_table(points: Sequence[Point], taus: Sequence[float]) -> list[str]:
    """What a round costs in plain tokens, which is the tau that breaks even, and what stated taus would gain."""
    head = ["layers x width", "drafts", "plain ms a token", "a round in plain tokens = tau to break even"]
    lines = row([*head, "turns from - to", *(f"speed-up at tau {tau:g}" for tau in taus)], head=True)
    for point in points:
        milliseconds = 1000 / point["rivals"][PLAIN]["tokens_per_second"]
        for name, one in rivals_of(point):
            low, high = one["round_spread"]
            gains = [number(gain(one, tau)) for tau in taus]
            cost = [f"{milliseconds:.2f}", f"{one['round_in_plain_tokens']:.2f}", f"{low:.2f} - {high:.2f}"]
            lines += row([point["shape"], drafts(name, point), *cost, *gains])
    return lines


def memory_table(points: Sequence[Point]) -> list[str]:
    head = ["prompt tokens", "rows", "keys and values of the tokens MB", "plain peak MB", "drafted peak MB"]
    lines = row(head, head=True)
    for point in points:
        sizes = [point[name] / MEGABYTE for name in ("keys_and_values_bytes", f"{PLAIN}_bytes", "default_bytes")]
        lines += row([str(point["context"]), str(point["batch"]), *(f"{size:.1f}" for size in sizes)])
    return lines


def row(cells: Sequence[str], head: bool = False) -> list[str]:
    line = f"| {' | '.join(cells)} |"
    return [line, "|---" * len(cells) + "|"] if head else [line]


def made_on(points: Sequence[Point]) -> str:
    """Where the points come from, and how busy it was."""
    about = points[0]["environment"]
    loads = [point["environment"]["load_average"] for point in points]
    busy = f", load average {max(load[0] for load in loads):.1f} at most" if all(loads) else ""
    where = about["gpu"] if about["device"].startswith("cuda") else f"{about['cpu']}, {about['threads']} threads"
    revision = (about["git_revision"] or "unknown")[:12]
    return f"{where}; {about['dtype']}, {about['backend']}; revision {revision}{busy}."


def rivals_of(point: Point) -> list[tuple[str, dict[str, Any]]]:
    return [(name, one) for name, one in point["rivals"].items() if name != PLAIN]


def drafts(name: str, point: Point) -> str:
    """A rival's draft in words."""
    return point["default"] if name == "default" else name


def nodes_of(name: str) -> int:
    """Nodes that the target verifies in a round of a named draft, the root included."""
    return int(name.split()[1]) + 1 if name.startswith("chain ") else int(name.split("/")[2])


def gain(one: dict[str, Any], tau: float) -> float | None:
    """The speed-up that so long a tau would bring; None where no path of the draft is so long."""
    return tau / one["round_in_plain_tokens"] if tau <= one["longest_tau"] else None


# --- the page --------------------------------------------------------------------------------------------------------


def page(points: Sequence[Point], taus: Sequence[float], path: Path, console: Console) -> None:
    """One row of two panels for every curve; nothing but a remark where plotly is missing."""
    try:
        from plotly import graph_objects, subplots
    except ImportError:
        console.print("no plot: it needs plotly; pip install 'outdraft[report]'", markup=False)
        return
    panels: list[Panel] = []
    for curve in TITLES:
        own = [point for point in points if point["curve"] == curve]
        if own:
            panels += panels_of(curve, own, taus, graph_objects)
    rows = len(panels) // 2
    titles = [title for title, *_ in panels]
    figure = subplots.make_subplots(rows=rows, cols=2, subplot_titles=titles, vertical_spacing=0.3 / max(rows, 2))
    for place, (_, x, y, traces) in enumerate(panels):
        at = {"row": place // 2 + 1, "col": place % 2 + 1}
        for trace in traces:
            figure.add_trace(trace, **at)
        figure.update_xaxes(title_text=x, **at)
        figure.update_yaxes(title_text=y, rangemode="tozero", **at)
        if y == "speed-up":
            figure.add_hline(y=1, line={"dash": "dot", "color": "#7f7f7f"}, **at)
    figure.update_layout(height=360 * rows, width=1200, template="plotly_white", showlegend=False, margin={"t": 60})
    studies.write(path, figure.to_html(include_plotlyjs=True, config={"displayModeBar": False}))


def panels_of(curve: str, points: Sequence[Point], taus: Sequence[float], plotly: Any) -> list[Panel]:
    """The two panels of one curve."""
    line = line_maker(plotly)
    if curve == "memory":
        batches = sorted({point["batch"] for point in points})
        names = {PLAIN: "plain decoding", "default": "drafting"}
        return [
            (
                f"Peak memory beyond the models, {what}",
                "prompt tokens",
                "MB",
                [
                    line(
                        f"{batch} row{'s' * (batch > 1)}",
                        [(p["context"], p[f"{name}_bytes"] / MEGABYTE, None) for p in points if p["batch"] == batch],
                        place,
                    )
                    for place, batch in enumerate(batches)
                ],
            )
            for name, what in names.items()
        ]
    if curve == "shape":
        return shape_panels(points, taus, plotly)
    if curve == "tree":
        (point,) = points
        kinds = {"chains": [], "trees": []}  # type: dict[str, list[Any]]
        for name, one in rivals_of(point):
            kinds["chains" if name.startswith("chain") else "trees"].append((nodes_of(name), one))
        series = {kind: sorted(own, key=lambda pair: pair[0]) for kind, own in kinds.items() if own}
        axis = "nodes verified in a round"
    else:
        series = {}
        for point in points:
            for name, one in rivals_of(point):
                series.setdefault(name, []).append((point[curve], one))
        axis = {"context": "prompt tokens", "batch": "rows"}.get(curve, curve)
    speeds = [
        line(name, [(x, one["speedup"], one["spread"]) for x, one in own], place)
        for place, (name, own) in enumerate(series.items())
    ]
    lengths = [
        line(name, [(x, one["tau"], None) for x, one in own], place) for place, (name, own) in enumerate(series.items())
    ]
    return [(f"{TITLES[curve]}: speed-up", axis, "speed-up", speeds), (f"{TITLES[curve]}: tau", axis, "tau", lengths)]


def shape_panels(points: Sequence[Point], taus: Sequence[float], plotly: Any) -> list[Panel]:
    """Bars of the tau to break even, and of what stated taus would gain with the default draft."""
    shapes = [point["shape"] for point in points]
    names = list(dict.fromkeys(name for point in points for name, _ in rivals_of(point)))
    even = []
    for place, name in enumerate(names):
        found = [point["rivals"][name] for point in points]
        heights = [one["round_in_plain_tokens"] for one in found]
        spread = bars([(height, one["round_spread"]) for height, one in zip(heights, found, strict=True)])
        text = [name] * len(shapes)
        even.append(plotly.Bar(x=shapes, y=heights, name=name, text=text, error_y=spread, marker_color=colour(place)))
    gains = [
        plotly.Bar(
            x=shapes,
            y=[gain(point["rivals"][names[0]], tau) for point in points],
            name=f"tau {tau:g}",
            text=[f"tau {tau:g}"] * len(shapes),
            marker_color=colour(len(names) + place),
        )
        for place, tau in enumerate(taus)
    ]
    return [
        ("Random weights: tau needed to break even", "layers x width", "a round in plain tokens", even),
        ("Random weights: speed-up if tau were as stated", "layers x width", "speed-up", gains),
    ]


def line_maker(plotly: Any) -> Callable[[str, Sequence[tuple[Any, Any, Any]], int], Any]:
    """Makes lines of (x, y, spread or None), named at their last point."""

    def line(name: str, own: Sequence[tuple[Any, Any, Any]], place: int) -> Any:
        spread = bars([(y, ends) for _, y, ends in own]) if own[0][2] is not None else None
        return plotly.Scatter(
            x=[x for x, _, _ in own],
            y=[y for _, y, _ in own],
            name=name,
            mode="lines+markers+text",
            text=[*[""] * (len(own) - 1), name],
            textposition="top center",
            cliponaxis=False,
            error_y=spread,
            line={"color": colour(place)},
        )

    return line


def bars(found: Sequence[tuple[float, Sequence[float]]]) -> dict[str, Any]:
    """Error bars from the least to the most of the turns."""
    above = [ends[1] - middle for middle, ends in found]
    below = [middle - ends[0] for middle, ends in found]
    return {"type": "data", "symmetric": False, "array": above, "arrayminus": below}


def colour(place: int) -> str:
    return studies.COLOURS[place % len(studies.COLOURS)]


# --- the docs --------------------------------------------------------------------------------------------------------


def fill_in(path: Path, points: Sequence[Point], taus: Sequence[float], folder: Path, console: Console) -> None:
    """Put every curve's table between its marks in a page, and the plot as a picture beside the page.

    Raises:
        UserError: the page lacks the marks of a curve.
    """
    text = path.read_text(encoding="utf-8")
    for curve, table in tables(points, taus).items():
        begin, end = f"<!-- {curve} -->", f"<!-- end of {curve} -->"
        before, found, rest = text.partition(begin)
        _, found_too, after = rest.partition(end)
        if not (found and found_too):
            raise UserError(f"{path} has no {begin} ... {end}; add them where the table shall stand")
        text = f"{before}{begin}\n{table}\n{end}{after}"
    studies.write(path, text)
    picture(folder / "scale.html", path.with_suffix(".png"), len({point["curve"] for point in points}), console)


def picture(html: Path, png: Path, rows: int, console: Console) -> None:
    """The page as a browser shows it; a remark where there is no Chromium or no page."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    browser = next((found for name in names if (found := shutil.which(name))), None)
    if browser is None or not html.is_file():
        console.print(f"no {png.name}: it needs plotly and Chromium on PATH", markup=False)
        return
    with tempfile.TemporaryDirectory() as profile:
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=8000"]
        size = [f"--window-size=1220,{360 * rows + 20}", f"--user-data-dir={profile}", f"--screenshot={png.resolve()}"]
        command = [browser, *flags, *size, html.resolve().as_uri()]
        png.unlink(missing_ok=True)
        with contextlib.suppress(subprocess.TimeoutExpired):  # some write the picture and then do not end
            subprocess.run(command, capture_output=True, timeout=60, check=False)
    if not png.is_file():
        console.print(f"no {png.name}: the browser gave none", markup=False)
