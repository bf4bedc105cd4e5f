"""What `outdraft verify` does between parsing and printing: load, audit, save the report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from outdraft.errors import UserError
from outdraft.evaluation.audit import Audit, AuditSettings, run_audit
from outdraft.evaluation.audit.page import save
from outdraft.generation import SpeculativeModel


def run_verify(
    model: SpeculativeModel, settings: AuditSettings, remarks: Console, report: Path | None, about: dict[str, Any]
) -> Audit:
    """The audit, its page written where one is asked for.

    Raises:
        UserError: nothing to verify, unusable prompts or settings, or a report that cannot be written (found out
            before the audit runs).
    """
    if report is not None:
        _writable(report)
    audit = run_audit(model, settings, remarks, about=about)
    if report is not None:
        save(audit, report)
        remarks.print(f"report: {report}", style="dim", markup=False)
    return audit


def _writable(report: Path) -> None:
    if report.is_dir():
        raise UserError(f"--report {report} is a folder; give the name of a file")
    report.parent.mkdir(parents=True, exist_ok=True)
    with report.open("ab"):
        pass
