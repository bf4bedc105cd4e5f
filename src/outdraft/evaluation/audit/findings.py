"""The findings of an audit, Holm's correction of their p-values, the verdict, and their terminal output."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from outdraft.evaluation.audit.stock import Noise

SHOWN_LINES = 6
"""The number of a check's details on a terminal; the JSON and the report have all of them."""


@dataclass
class Finding:
    """The result of one check.

    Attributes:
        name: its key in reports.
        question: the check as a question, whose answer is yes for a lossless decoder.
        passed: True for yes; `judge` sets it for statistical tests.
        evidence: the result's figures in a sentence or two.
        p_value: p-value of a statistical test, before any correction.
        adjusted: p-value after Holm's correction, which is compared with alpha.
        figures: figures for JSON.
        lines: details worth a line each.
        seconds: duration of the check.
    """

    name: str
    question: str
    passed: bool
    evidence: str
    p_value: float | None = None
    adjusted: float | None = None
    figures: dict[str, Any] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        return {
            "question": self.question,
            "passed": self.passed,
            "evidence": self.evidence,
            "p_value": self.p_value,
            "p_value_holm": self.adjusted,
            "seconds": self.seconds,
            **self.figures,
            "details": self.lines,
        }


def judge(findings: Sequence[Finding], alpha: float) -> None:
    """Set `passed` of the statistical tests: True where Holm's adjusted p-value is at least alpha."""
    tests = [finding for finding in findings if finding.p_value is not None]
    for finding, adjusted in zip(tests, holm([finding.p_value or 0.0 for finding in tests]), strict=True):
        finding.adjusted = adjusted
        finding.passed = adjusted >= alpha


def holm(p_values: Sequence[float]) -> list[float]:
    """Return adjusted p-values: rejecting those below alpha errs with probability at most alpha, over all together."""
    adjusted = [math.nan] * len(p_values)
    largest = 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = largest
    return adjusted


@dataclass
class Audit:
    """All findings of an audit, and the verdict.

    Attributes:
        settings: settings of the audit and the model, for reports.
        environment: machine, versions, precision, backend.
        findings: findings in the order of the checks.
        noise: rounding noise of this model, precision and backend.
        alpha: joint level of the statistical tests.
        seconds: duration of the whole audit.
        expected_seconds: the forecast from before it began.
        stopped: the check that ran when the user ended the audit; None for a complete audit.
    """

    settings: dict[str, Any]
    environment: dict[str, Any]
    findings: list[Finding]
    noise: Noise
    alpha: float
    seconds: float
    expected_seconds: float = 0.0
    stopped: str | None = None

    @property
    def kept(self) -> bool | None:
        """True if every check passed, False if one failed; None where a stopped audit has no failure."""
        if all(finding.passed for finding in self.findings):
            return True if self.stopped is None else None
        return False

    @property
    def verdict(self) -> str:
        if self.kept:
            found = "KEPT: no check found the output to differ from what the target alone gives."
            return found + self._unseen + self._quick
        if self.kept is None:
            names = ", ".join(finding.name for finding in self.findings)
            return (
                f"STOPPED during the check '{self.stopped}': those that were finished ({names}) found no difference, "
                "which says nothing about the others."
            )
        failed = [finding.name for finding in self.findings if not finding.passed]
        end = "" if self.stopped is None else f" Stopped during the check '{self.stopped}'."
        return f"NOT KEPT: the output differs from what the target alone gives ({', '.join(failed)}).{end}"

    @property
    def _quick(self) -> str:
        """A remark on the limits of a quick audit."""
        if not self.settings.get("quick"):
            return ""
        found = self.settings
        seen = f"{found['prompts']} prompts of {found['max_new_tokens']} tokens"
        if any(finding.name == "beginnings" for finding in self.findings):
            seen += f", and a total variation of {found['total_variation']:g} in the first tokens"
        return f" A quick look ({seen}): without --quick the audit finds smaller errors."

    @property
    def _unseen(self) -> str:
        """A warning where no candidate was drafted, or none accepted."""
        runs = [finding.figures["drafting"] for finding in self.findings if "drafting" in finding.figures]
        if not any(run["drafted"] for run in runs):
            return " But nothing was drafted, so this says nothing about the drafter."
        if not any(run["accepted"] for run in runs):
            return " But no candidate was ever accepted, so this says little: try a better drafter or other prompts."
        return ""

    def __getitem__(self, name: str) -> Finding:
        return next(finding for finding in self.findings if finding.name == name)

    def as_dict(self) -> dict[str, Any]:
        return {
            "kept": self.kept,
            "verdict": self.verdict,
            "alpha": self.alpha,
            "stopped_during": self.stopped,
            "seconds": self.seconds,
            "expected_seconds": self.expected_seconds,
            "checks": {finding.name: finding.as_dict() for finding in self.findings},
            "noise": asdict(self.noise),
            "settings": self.settings,
            "environment": self.environment,
        }


def show(audit: Audit, console: Console) -> None:
    facts = audit.environment
    console.print(
        f"{audit.settings['method']}, {facts['device']}, {facts['dtype']}, {facts['backend']} backend; "
        f"{sampling_line(audit)}",
        markup=False,
    )
    table = Table(show_lines=True)
    table.add_column("check", no_wrap=True)
    table.add_column("passed", no_wrap=True)
    table.add_column("p (Holm)", justify="right", no_wrap=True)
    table.add_column("evidence", overflow="fold")
    for finding in audit.findings:
        mark = Text("yes", style="green") if finding.passed else Text("NO", style="bold red")
        adjusted = "-" if finding.p_value is None else f"{finding.p_value:.3g} ({finding.adjusted:.3g})"
        said = Group(Text(finding.question, style="bold"), Text(finding.evidence))
        table.add_row(finding.name, mark, adjusted, said)
    console.print(table)
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


def sampling_line(audit: Audit) -> str:
    generation = audit.settings["generation"]
    greedy = not generation.get("temperature")
    told = [f"{name} {value}" for name, value in generation.items() if not (greedy and name == "coupling")]
    return ", ".join([*(["greedy"] if greedy else []), *told])


def noise_line(audit: Audit) -> str:
    noise = audit.noise
    return (
        f"noise floor of {audit.environment['dtype']} on the {audit.environment['backend']} backend, one token against "
        f"many in one forward of the stock model, {noise.positions} positions: logit gaps move by {noise.gap_mean:.2g} "
        f"on average and {noise.gap:.2g} at most, output distributions by a total variation of "
        f"{noise.variation_mean:.2g} and {noise.variation:.2g}; the best token differs at {noise.flips} of them"
    )
