"""The HTML pages of `bench` and `verify`, each one file that loads nothing from elsewhere.

`templates/` holds texts and layout; this module fills the templates. The bench's charts need plotly, whose script is
embedded.
"""

from __future__ import annotations

import json
import math
import time
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from outdraft.data.provenance import busy
from outdraft.data.text import Detokenizer
from outdraft.errors import UserError
from outdraft.evaluation.audit.findings import Audit, noise_line, sampling_line
from outdraft.evaluation.bench.measure import PLAIN, Answer
from outdraft.evaluation.bench.result import BenchResult, Comparison, closing, temperature_name, verdict
from outdraft.evaluation.bench.summary import Summary, scattered
from outdraft.evaluation.report.charts import charts
from outdraft.output import counted, number, write_whole
from outdraft.output import plain as in_json

SLOTS = {
    "light": ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#8a8a8a", "#7a5c00"],
    "dark": ["#4aa3df", "#f0b429", "#2cc295", "#e39cc4", "#f07f3c", "#8fd0f5", "#a9a9a9", "#c9a94a"],
}
"""Colour of the n-th contender: Okabe and Ito's, which colour-blind readers can tell apart, a little lighter on dark
paper. A label, a marker or a pattern repeats whatever colour says."""

THEMES = {
    "light": {"ink": "#1b1f24", "muted": "#59636e", "grid": "#e3e7eb", "paper": "#ffffff", "slots": SLOTS["light"]},
    "dark": {"ink": "#e8eaed", "muted": "#a4adb8", "grid": "#343b44", "paper": "#1b2027", "slots": SLOTS["dark"]},
}

SAMPLES, SAMPLE_TOKENS, SHOWN = 3, 160, 40
"""The most samples, tokens of a sample, and rows of long lists."""

FASTEST = 4
"""The number of methods whose speed-up stands large above the table."""

FEW_QUESTIONS = 20


def _page(template: str, **values: Any) -> str:
    return _templates().get_template(f"{template}.html.j2").render(**values)


@cache
def _templates() -> Environment:
    loader = FileSystemLoader(Path(__file__).parent / "templates")
    found = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    found.policies["json.dumps_kwargs"] = {}  # keys in their own order
    found.filters |= {"number": number, "interval": _interval, "said": _said, "verdict": verdict}
    return found


def _interval(ends: tuple[float, float]) -> str:
    """Format an interval; empty where one question leaves none."""
    low, high = ends
    return f"[{number(low)}, {number(high)}]" if math.isfinite(low) else ""


def _said(value: Any) -> str:
    """Format a fact or a setting in words."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {_said(entry)}" for name, entry in value.items()) or "–"
    if value is None or value == []:
        return "–"
    if isinstance(value, list):
        return ("; " if any(isinstance(entry, dict) for entry in value) else ", ").join(map(_said, value))
    return value if isinstance(value, str) else json.dumps(value, default=str)


# --- of an audit -----------------------------------------------------------------------------------------------------


def save_audit(audit: Audit, path: Path) -> None:
    """Write the page of an audit, and make its folder if missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(audit_page(audit), encoding="utf-8")


def audit_page(audit: Audit) -> str:
    names = " with ".join(str(audit.settings[name]) for name in ("model", "draft_model") if audit.settings.get(name))
    return _page(
        "audit",
        title=f"Losslessness of {names or audit.settings['method']}",
        audit=audit,
        sampling=sampling_line(audit),
        noise=noise_line(audit),
        json=json.dumps(in_json(audit.as_dict()), indent=1, ensure_ascii=False),
    )


# --- of a benchmark --------------------------------------------------------------------------------------------------


def check_page(path: Path) -> None:
    """Check that a page can be written, before anything is measured.

    Raises:
        UserError: it is a folder.
        OSError: its folder cannot be made or written to.
    """
    if path.is_dir():
        raise UserError(f"--report {path} is a folder; give the name of a file, such as report.html")
    path.parent.mkdir(parents=True, exist_ok=True)
    probe = path.with_name(path.name + ".partial")
    probe.touch()
    probe.unlink()


def plotly_script() -> str:
    """Return Plotly's own script, from its Python package."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise UserError("--report needs plotly; install it with: pip install 'outdraft[report]'") from None
    return str(get_plotlyjs())


def save_bench(result: BenchResult, path: Path, tokenizer: Any) -> None:
    """Write the page of a benchmark, whole or not at all; `tokenizer` turns the samples' tokens into text."""
    write_whole(path, bench_page(result, tokenizer))


def bench_page(result: BenchResult, tokenizer: Any) -> str:
    figures: list[dict[str, Any]] = []
    comparisons = [_section(place, one, tokenizer, figures) for place, one in enumerate(result.comparisons)]
    settings = result.settings
    return _page(
        "bench",
        title=f"outdraft bench: {Path(str(settings['model'])).name} on {settings['suite']}",
        made_on=made_on(result.environment, settings),
        notes=notes(result),
        comparisons=comparisons,
        environment=result.environment,
        settings=settings,
        left_out=result.left_out,
        shown=SHOWN,
        figures=in_json(figures),
        themes=THEMES,
        plotly=plotly_script(),
    )


def _section(place: int, one: Comparison, tokenizer: Any, figures: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the template's variables for one temperature; the charts' data go to `figures`."""
    drawn: list[dict[str, str]] = []
    for title, note, figure in charts(one.summaries, one.groups):
        drawn.append({"id": f"chart-{place}-{len(drawn)}", "title": title, "note": note})
        figures.append({"id": drawn[-1]["id"], **figure})
    drafting = (summary for summary in one.summaries if summary.method != "none")
    return {
        "name": temperature_name(one.temperature),
        "temperature": one.temperature,
        "closing": closing(one.summaries),
        "fastest": sorted(drafting, key=lambda summary: -summary.speedup)[:FASTEST],
        "summaries": one.summaries,
        "groups": one.groups,
        "charts": drawn,
        "samples": samples(one, tokenizer),
        "divergences": [
            (summary.name, one.questions[found.prompt].id if one.questions else found.prompt + 1, found)
            for summary in one.summaries
            for found in summary.divergences or []
        ],
    }


def made_on(facts: dict[str, Any], settings: dict[str, Any]) -> str:
    threads = counted(facts["threads"], "thread")
    device = facts["gpu"] if str(facts["device"]).startswith("cuda") else f"{facts['cpu']}, {threads}"
    when = facts.get("ended") or facts.get("began") or time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    asked = f"{counted(settings['prompts'], 'question')}, {counted(settings['repetitions'], 'repetition')}"
    return (
        f"{device}; {facts['dtype']}, {facts['backend']} backend; {asked}, "
        f"up to {settings['max_new_tokens']} new tokens; {when}"
    )


def notes(result: BenchResult) -> list[str]:
    """Return sentences that a reader should know before believing the figures."""
    found = [busy(result.environment)]
    sizes = {name: s[0].questions for one in result.comparisons for name, s in one.groups.items()}
    few = [f"{name} {count}" for name, count in sizes.items() if count < FEW_QUESTIONS]
    if few:
        found.append(f"Few questions in some tasks ({', '.join(few)}): their intervals say little.")
    if count := len(result.left_out):
        found.append(f"Left out: {count} question{'' if count == 1 else 's'}, named at the end.")
    sittings = result.environment.get("sittings") or []
    if len(sittings) > 1:
        revisions = {str(sitting.get("git_revision"))[:12] for sitting in sittings}
        found.append(
            f"Measured in {len(sittings)} sittings (source revisions {', '.join(sorted(revisions))}); controllers that "
            "learn began anew in each."
        )
    for one in result.comparisons:
        found.append(scattered(one.runs))
        if one.cut_short:
            found.append(f"{one.cut_short} conversations ended early: the next turn did not fit the context.")
        odd = [s.name for s in one.summaries if any(not d.tie for d in s.divergences or [])]
        if odd:
            found.append(f"Texts of {', '.join(odd)} part from plain decoding's beyond rounding noise: look below.")
    return [note for note in found if note is not None]


def samples(one: Comparison, tokenizer: Any) -> list[dict[str, Any]]:
    """Collect the longest answers of a few groups by every method that drafts, token by token."""
    drafting = [summary for summary in one.summaries if summary.statistics.tau > 1 and summary.name != PLAIN]
    if not drafting or not one.questions:
        return []
    longest: dict[str, int] = {}
    lengths = {run.prompt: len(run.answer.tokens) for run in one.runs[PLAIN]}
    for place, question in enumerate(one.questions):
        if question.group not in longest or lengths[place] > lengths[longest[question.group]]:
            longest[question.group] = place
    found = []
    for group, place in list(longest.items())[:SAMPLES]:
        question = one.questions[place]
        asked = question.turns[0] if question.turns else question.prompt
        found.append(
            {
                "group": group,
                "id": question.id,
                "text": asked if isinstance(asked, str) else (asked or [{"content": ""}])[-1]["content"],
                "answers": [
                    _sample(
                        summary, next(run for run in one.runs[summary.name] if run.prompt == place).answer, tokenizer
                    )
                    for summary in sorted(drafting, key=lambda summary: -summary.speedup)
                ],
            }
        )
    return found


def _sample(summary: Summary, answer: Answer, tokenizer: Any) -> dict[str, Any]:
    """Split an answer's text into pieces, each marked if a drafter had guessed it."""
    detokenizer = Detokenizer(tokenizer)
    tokens = list(zip(answer.tokens, answer.accepted, strict=True))[:SAMPLE_TOKENS]
    pieces = [(detokenizer.add(token), hit) for token, hit in tokens]
    if tokens:
        pieces.append((detokenizer.finish(), tokens[-1][1]))
    return {
        "name": summary.name,
        "tokens": len(answer.tokens),
        "tau": answer.statistics.tau,
        "pieces": [(text, hit) for text, hit in pieces if text],
        "cut": len(answer.tokens) > SAMPLE_TOKENS,
    }
