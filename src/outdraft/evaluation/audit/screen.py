"""An audit on a terminal. Computes nothing."""

from __future__ import annotations

from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from outdraft.evaluation.audit.findings import Finding
from outdraft.evaluation.audit.verdict import Audit

SHOWN_LINES = 6
"""Details of one check; all of them are in the JSON and in the report."""


def show(audit: Audit, console: Console) -> None:
    """Print the checks and the verdict."""
    facts = audit.environment
    console.print(
        f"{audit.settings['method']}, {facts['device']}, {facts['dtype']}, {facts['backend']} backend; {law_of(audit)}",
        markup=False,
    )
    console.print(table(audit))
    for finding in audit.findings:
        more = len(finding.lines) - SHOWN_LINES
        shown = finding.lines[:SHOWN_LINES] + ([f"... and {more} more (--json, --report)"] if more > 0 else [])
        for line in shown:
            console.print(Text(f"{finding.name}: {line}", style="dim"))
    if audit.noise.positions:
        console.print(Text(noise_line(audit), style="dim"))
    colour = "yellow" if audit.kept is None else "green" if audit.kept else "red"
    panel = Panel(Text(audit.verdict, style=f"bold {colour}"), border_style=colour, expand=False)
    console.print(panel, soft_wrap=False)


def table(audit: Audit) -> Table:
    """One row a check."""
    built = Table(show_lines=True)
    built.add_column("check", no_wrap=True)
    built.add_column("passed", no_wrap=True)
    built.add_column("p (Holm)", justify="right", no_wrap=True)
    built.add_column("evidence", overflow="fold")
    for finding in audit.findings:
        mark = Text("yes", style="green") if finding.passed else Text("NO", style="bold red")
        said = Group(Text(finding.question, style="bold"), Text(finding.evidence))
        built.add_row(finding.name, mark, p_value(finding), said)
    return built


def p_value(finding: Finding) -> str:
    """Before and after correction; a dash for an exact check."""
    if finding.p_value is None or finding.adjusted is None:
        return "-"
    return f"{finding.p_value:.3g} ({finding.adjusted:.3g})"


def law_of(audit: Audit) -> str:
    """The settings in a line."""
    generation = audit.settings["generation"]
    return ", ".join(f"{name} {value}" for name, value in generation.items()) or "greedy"


def noise_line(audit: Audit) -> str:
    """The noise floor in a sentence."""
    noise = audit.noise
    return (
        f"noise floor of {audit.environment['dtype']} on the {audit.environment['backend']} backend, one token against "
        f"many in one forward of the stock model, {noise.positions} positions: logit gaps move by {noise.gap_mean:.2g} "
        f"on average and {noise.gap:.2g} at most, laws by a total variation of {noise.variation_mean:.2g} and "
        f"{noise.variation:.2g}; the best token differs at {noise.flips}"
    )
