"""`outdraft verify`: its flags; it loads, audits, and saves the report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from outdraft.console import options as o
from outdraft.console.app import INTERRUPTED
from outdraft.errors import UserError
from outdraft.output import print_json, remarks, results

AUDIT = o.field_help("evaluation/audit/findings.py", "AuditSettings")


@o.with_flags(o.SAMPLED, o.DRAFTED, o.LOADED)
def verify(
    model: o.Model = "reference",
    draft_model: o.DraftModel = None,
    method: o.Method = None,
    data: Annotated[
        Path | None, typer.Option("--data", help="Prompts: JSON lines or text; the shipped held-out ones if left out.")
    ] = None,
    limit: Annotated[int, typer.Option("--limit", help=AUDIT["limit"])] = 24,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", help=AUDIT["max_new_tokens"])] = 48,
    greedy: Annotated[bool, typer.Option("--greedy/--no-greedy", help=AUDIT["greedy"])] = True,
    total_variation: Annotated[float, typer.Option("--total-variation", help=AUDIT["total_variation"])] = 0.02,
    power: Annotated[float, typer.Option("--power", help=AUDIT["power"])] = 0.95,
    alpha: Annotated[float, typer.Option("--alpha", help=AUDIT["alpha"])] = 0.001,
    batch_size: Annotated[int, typer.Option("--batch-size", help=AUDIT["batch_size"])] = 256,
    seed: Annotated[int, typer.Option("--seed", help=AUDIT["seed"])] = 0,
    quick: Annotated[bool, typer.Option("--quick", help=AUDIT["quick"])] = False,
    report: Annotated[Path | None, typer.Option("--report", help="Save what was found as an HTML page.")] = None,
    json: o.Json = False,
    **flags: Any,
) -> None:
    """Test that drafting keeps the model's output distribution: exit code 0 if so, 1 if not.

    States the time that it expects to take before it begins. Ctrl-C ends it with what was found so far (exit code 130).
    """
    own = {name: value for name, value in locals().items() if name in AUDIT and name != "quick"}
    from outdraft.api.generation import load
    from outdraft.evaluation.audit import AuditSettings, run_audit
    from outdraft.evaluation.audit.findings import show
    from outdraft.evaluation.report.pages import save_audit

    settings = AuditSettings(generation=o.sampling(**flags) | o.drafting(**flags), **own)
    if quick:
        settings = settings.made_quick()
    loaded = load(model, draft_model, **o.loading(method=method, **flags))
    if report is not None:
        _check_writable(report)  # before minutes of work
    audit = run_audit(loaded, settings, remarks(), about={"model": model, "draft_model": draft_model})
    if report is not None:
        save_audit(audit, report)
        remarks().print(f"report: {report}", style="dim", markup=False)
    if json:
        print_json(audit.as_dict())
    else:
        show(audit, results())
    if audit.kept is not True:
        raise typer.Exit(INTERRUPTED if audit.kept is None else 1)


def _check_writable(report: Path) -> None:
    if report.is_dir():
        raise UserError(f"--report {report} is a folder; give the name of a file")
    report.parent.mkdir(parents=True, exist_ok=True)
    with report.open("ab"):
        pass
