"""An audit as one HTML page: no script, nothing loaded from elsewhere, legible in the dark and on paper.

Computes nothing.
"""

from __future__ import annotations

import json
from html import escape
from pathlib import Path
from typing import Any

from outdraft.evaluation.audit.findings import Finding
from outdraft.evaluation.audit.screen import law_of, noise_line, p_value
from outdraft.evaluation.audit.verdict import Audit
from outdraft.output import plain

STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --paper: #fff; --soft: #5b6169; --line: #d6dade; --bar: #4a78b5;
  --yes: #17693a; --no: #b3202a; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8ea; --paper: #16181b; --soft: #a3a9b1; --line: #383d43;
  --bar: #7fa8dd; --yes: #5fce8d; --no: #ff7b80; } }
@media print { :root { --ink: #000; --paper: #fff; --soft: #333; --line: #999; --bar: #555; --yes: #000; --no: #000; }
  section { break-inside: avoid; } details { display: block; } body { max-width: none; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 58rem;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.05rem; margin: 0 0 .3rem; } p { margin: .3rem 0; }
.verdict { border: 2px solid; border-radius: .5rem; padding: .8rem 1rem; font-size: 1.15rem; font-weight: 600; }
.yes { color: var(--yes); } .no { color: var(--no); } .soft { color: var(--soft); font-size: .9rem; }
section { border-top: 1px solid var(--line); padding: 1rem 0; }
table { border-collapse: collapse; font-size: .9rem; } td, th { border-bottom: 1px solid var(--line); text-align: left;
  padding: .25rem .8rem .25rem 0; vertical-align: top; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.checks { overflow-x: auto; } .checks td, .checks th { overflow-wrap: normal; white-space: nowrap; }
.bars { display: flex; align-items: flex-end; gap: 2px; height: 4rem; margin: .6rem 0 .2rem; }
.bars i { flex: 1; background: var(--bar); print-color-adjust: exact; -webkit-print-color-adjust: exact; }
ul { margin: .3rem 0; padding-left: 1.2rem; font-size: .9rem; } code { font-size: .85rem; overflow-wrap: anywhere; }
"""


def save(audit: Audit, path: Path) -> None:
    """Write the page, and the folder where there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(audit), encoding="utf-8")


def page(audit: Audit) -> str:
    """The whole document."""
    told = audit.settings
    names = " with ".join(escape(str(told[name])) for name in ("model", "draft_model") if told.get(name))
    title = f"Losslessness of {names or escape(str(told['method']))}"
    rows = "".join(_row(finding) for finding in audit.findings)
    return f"""<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{STYLE}</style></head>
<body>
<h1>{title}</h1>
<p class="verdict {"" if audit.kept is None else _class(audit.kept)}">{escape(audit.verdict)}</p>
<p class="soft">{escape(told["method"])}; {escape(law_of(audit))}; {audit.seconds:.0f} s. A decoder that keeps the law
is called wrong by the statistical checks, all together, with probability {audit.alpha:g} at most (Holm's
correction).</p>
<div class="checks"><table>
<thead><tr><th>check</th><th>passed</th><th>p</th><th>p, Holm</th><th>seconds</th></tr></thead>
<tbody>{rows}</tbody></table></div>
{"".join(_section(finding) for finding in audit.findings)}
<section><h2>Noise floor</h2><p>{escape(noise_line(audit))}.</p></section>
<section><h2>Settings and machine</h2>{_facts(told)}{_facts(audit.environment)}</section>
<section><details><summary>All figures as JSON</summary><pre><code>{_json(audit.as_dict())}</code></pre></details>
</section>
</body>
</html>
"""


def _row(finding: Finding) -> str:
    p, adjusted = ("-", "-") if finding.p_value is None else p_value(finding).rstrip(")").split(" (")
    return (
        f'<tr><td><a href="#{finding.name}">{finding.name}</a></td><td class="{_class(finding.passed)}">'
        f"{_yes(finding.passed)}</td><td>{p}</td><td>{adjusted}</td><td>{finding.seconds:.1f}</td></tr>"
    )


def _section(finding: Finding) -> str:
    lines = "".join(f"<li>{escape(line)}</li>" for line in finding.lines)
    return (
        f'<section id="{finding.name}"><h2>{escape(finding.question)} '
        f'<span class="{_class(finding.passed)}">{_yes(finding.passed)}</span></h2><p>{escape(finding.evidence)}</p>'
        + (f"<ul>{lines}</ul>" if lines else "")
        + _bars(finding.figures.get("histogram"))
        + "</section>"
    )


def _bars(histogram: list[int] | None) -> str:
    if not histogram or not max(histogram):
        return ""
    bars = "".join(f'<i style="height:{100 * count / max(histogram):.1f}%" title="{count}"></i>' for count in histogram)
    return (
        f'<div class="bars" role="img" aria-label="counts {histogram}">{bars}</div>'
        '<p class="soft">Ranks from likely (left) to unlikely (right) in their laws; level if the law is kept.</p>'
    )


def _facts(facts: dict[str, Any]) -> str:
    rows = "".join(
        f"<tr><th>{escape(str(name).replace('_', ' '))}</th><td>{escape(_said(value))}</td></tr>"
        for name, value in facts.items()
        if value is not None
    )
    return f"<table>{rows}</table>"


def _said(value: Any) -> str:
    return ", ".join(f"{name} {entry}" for name, entry in value.items()) if isinstance(value, dict) else str(value)


def _json(value: dict[str, Any]) -> str:
    return escape(json.dumps(plain(value), indent=1, ensure_ascii=False))


def _class(passed: bool) -> str:
    return "yes" if passed else "no"


def _yes(passed: bool) -> str:
    return "yes" if passed else "NO"
