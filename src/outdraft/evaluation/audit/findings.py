"""What one check found, and how several tests are judged together (Holm, 1979). Measures nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Finding:
    """One check's answer.

    Attributes:
        name: its key in reports.
        question: what was checked, as a question that yes answers for a lossless decoder.
        passed: yes or no. Of a statistical test: settled by `judge`.
        evidence: the answer's figures in a sentence or two.
        p_value: of a statistical test, before any correction.
        adjusted: the same after Holm's correction; compared with alpha.
        figures: for JSON.
        lines: details worth a line each.
        seconds: it took.
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
        """For JSON."""
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
    """Settle the statistical tests among them: passed where Holm's adjusted p-value is at least alpha."""
    tests = [finding for finding in findings if finding.p_value is not None]
    for finding, adjusted in zip(tests, holm([finding.p_value or 0.0 for finding in tests]), strict=True):
        finding.adjusted = adjusted
        finding.passed = adjusted >= alpha


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values: rejecting those below alpha errs with probability alpha at most, over all of them together."""
    adjusted = [math.nan] * len(p_values)
    largest = 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = largest
    return adjusted
