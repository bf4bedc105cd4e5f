"""The verdict of an audit: all findings, and what they come to in a sentence. Checks nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from outdraft.evaluation.audit.findings import Finding
from outdraft.evaluation.audit.noise import Noise


@dataclass
class Audit:
    """What was found, and the verdict.

    Attributes:
        settings: of the audit and the model, for reports.
        environment: machine, versions, precision, backend.
        findings: in the order of the checks.
        noise: of this model, precision and backend.
        alpha: level of the statistical tests together.
        seconds: of the whole audit.
        expected_seconds: as they were stated before it began.
        stopped: the check that ran when the user ended the audit; None where it came to its end.
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
        """Whether every check passed; None where none has failed yet, but the audit was stopped."""
        if all(finding.passed for finding in self.findings):
            return True if self.stopped is None else None
        return False

    @property
    def verdict(self) -> str:
        """In one sentence."""
        if self.kept:
            found = "KEPT: no check found the output to differ from what the target alone gives."
            return found + self._unseen + self._quick
        if self.kept is None:
            names = ", ".join(finding.name for finding in self.findings)
            return (
                f"STOPPED during the check '{self.stopped}': those that were finished ({names}) found no difference, "
                "which says nothing of the others."
            )
        failed = [finding.name for finding in self.findings if not finding.passed]
        end = "" if self.stopped is None else f" Stopped during the check '{self.stopped}'."
        return f"NOT KEPT: the output differs from what the target alone gives ({', '.join(failed)}).{end}"

    @property
    def _quick(self) -> str:
        """What a quick look leaves open."""
        if not self.settings.get("quick"):
            return ""
        found = self.settings
        seen = f"{found['prompts']} prompts of {found['max_new_tokens']} tokens"
        if any(finding.name == "beginnings" for finding in self.findings):
            seen += f", and a total variation of {found['total_variation']:g} in the first tokens"
        return f" A quick look: smaller errors than it can see ({seen}) are left to the audit without --quick."

    @property
    def _unseen(self) -> str:
        """A warning where too little happened to be seen."""
        runs = [finding.figures["drafting"] for finding in self.findings if "drafting" in finding.figures]
        if not any(run["drafted"] for run in runs):
            return " But nothing was drafted, so this says nothing of the drafter."
        if not any(run["accepted"] for run in runs):
            return " But no candidate was ever accepted, so this says little: try a better drafter or other prompts."
        return ""

    def __getitem__(self, name: str) -> Finding:
        return next(finding for finding in self.findings if finding.name == name)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "kept": self.kept,
            "verdict": self.verdict,
            "alpha": self.alpha,
            "stopped_during": self.stopped,
            "seconds": self.seconds,
            "expected_seconds": self.expected_seconds,
            "checks": {finding.name: finding.as_dict() for finding in self.findings},
            "noise": self.noise.as_dict(),
            "settings": self.settings,
            "environment": self.environment,
        }
