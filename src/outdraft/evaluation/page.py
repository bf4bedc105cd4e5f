"""The report as one page of HTML that needs nothing beside it: figures, charts, texts, and what they were made on.

Puts together what `page_parts.py` and `page_charts.py` make. Needs plotly, whose script is embedded.
"""

from __future__ import annotations

import json
from html import escape
from pathlib import Path
from typing import Any

from outdraft.errors import UserError
from outdraft.evaluation import page_parts as parts
from outdraft.evaluation.page_charts import charts
from outdraft.evaluation.page_style import STYLE, script
from outdraft.evaluation.report import closing, law
from outdraft.evaluation.result import BenchResult, Comparison
from outdraft.output import plain as in_json


def check(path: Path) -> None:
    """Whether the page could be written, asked before anything is measured.

    Raises:
        UserError: plotly is not installed.
        OSError: its folder cannot be made or written to.
    """
    plotly_script()
    path.parent.mkdir(parents=True, exist_ok=True)
    aside(path).touch()
    aside(path).unlink()


def aside(path: Path) -> Path:
    """Where the page is written before it takes its name."""
    return path.with_name(path.name + ".partial")


def plotly_script() -> str:
    """Plotly's own script, from its Python package.

    Raises:
        UserError: the package is missing.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise UserError("--report needs plotly; install it with: pip install 'outdraft[report]'") from None
    return str(get_plotlyjs())


def write(path: Path, result: BenchResult, tokenizer: Any) -> None:
    """The page, whole or not at all."""
    aside(path).write_text(page(result, tokenizer), encoding="utf-8")
    aside(path).replace(path)


def page(result: BenchResult, tokenizer: Any) -> str:
    """The page's text.

    Args:
        result: what to show.
        tokenizer: turns the samples' tokens into text.
    """
    figures: list[dict[str, Any]] = []
    sections = [_section(number, one, result, tokenizer, figures) for number, one in enumerate(result.comparisons)]
    facts, settings = result.environment, result.settings
    title = f"outdraft bench: {Path(str(settings['model'])).name} on {settings['suite']}"
    data = json.dumps(in_json(figures)).replace("</", "<\\/")
    links = "".join(
        f'<a href="#law-{number}">{law(one.temperature)}</a>' for number, one in enumerate(result.comparisons)
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<header>
<h1>{escape(title)}</h1>
<p class="muted">{escape(parts.made_on(facts, settings))}</p>
<nav>{links}<a href="#method">How it was measured</a><a href="#made-on">Environment and settings</a></nav>
</header>
{parts.notes(result)}
{"".join(sections)}
{parts.METHOD}
{parts.environment_and_settings(result)}
</main>
<script id="figures" type="application/json">{data}</script>
<script>{plotly_script()}</script>
<script>{script()}</script>
</body>
</html>
"""


def _section(number: int, one: Comparison, result: BenchResult, tokenizer: Any, figures: list[dict[str, Any]]) -> str:
    """Everything at one temperature; the charts' data go to `figures`."""
    drawn = []
    for place, (title, note, figure) in enumerate(charts(one.summaries, one.groups)):
        name = f"chart-{number}-{place}"
        figures.append({"id": name, **figure})
        drawn.append(
            f'<section class="card drawn"><h3>{escape(title)}</h3><p class="muted">{escape(note)}</p>'
            f'<div class="wide"><div class="chart" id="{name}" role="img" aria-label="{escape(title)}"></div></div>'
            "</section>"
        )
    return (
        f'<h2 id="law-{number}">{escape(law(one.temperature).capitalize())}</h2>'
        + f"<p><b>{escape(closing(one.summaries))}</b></p>"
        + parts.heads(one)
        + parts.overall_table(one)
        + "".join(drawn)
        + parts.group_tables(one)
        + parts.samples(one, tokenizer)
        + parts.divergence_table(one)
    )
