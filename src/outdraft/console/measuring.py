"""The verbs that measure: `outdraft bench` compares, `outdraft verify` audits, and `outdraft doctor` diagnoses."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from outdraft.console import options as o
from outdraft.console.app import INTERRUPTED
from outdraft.errors import UserError, flag
from outdraft.methods.registry import names
from outdraft.output import print_json, remarks, results

if TYPE_CHECKING:
    from rich.console import Console

    from outdraft.evaluation.doctor import Diagnosis

SETTINGS = ("evaluation/bench/methods.py", "BenchSettings")
BENCH = o.field_help(*SETTINGS)
MEASURED = o.flags_of(
    *SETTINGS,
    *("data", "suite", "limit", "on_bad_line", "repetitions", "peers_backend", "include_transformers"),
    *("output_dir", "report"),
)


@o.with_flags(MEASURED, o.SHAPED, o.PLACED)
def bench(
    context: typer.Context,
    model: o.Model = "reference",
    draft_model: Annotated[list[str] | None, typer.Option("--draft-model", "-d", help=BENCH["draft_models"])] = None,
    methods: Annotated[
        str | None,
        typer.Option(
            "--methods",
            help=f"Methods to compare, with commas: {', '.join(names())}; METHOD+lookup adds n-gram drafts. By default "
            "prompt-lookup, and every given drafter with and without n-gram drafts.",
        ),
    ] = None,
    controllers: Annotated[
        str,
        typer.Option(
            "--controllers",
            help="Controllers to compare, with commas: default, fixed, confidence, beta, calibrated. Every drafter "
            "runs with each.",
        ),
    ] = "default",
    peers: Annotated[str, typer.Option("--peers", help=BENCH["peers"])] = "",
    temperatures: Annotated[str, typer.Option("--temperatures", help="Separated by commas; 0 is greedy.")] = "0",
    max_new_tokens: o.MaxNewTokens = 128,
    seed: Annotated[int, typer.Option("--seed", help="Makes sampling repeatable.")] = 0,
    all_figures: Annotated[
        bool,
        typer.Option(
            "--all-figures",
            help="Also print the speed-up over stock `generate`, the ratio of mean rates and Spec-Bench's own figure.",
        ),
    ] = False,
    reread: Annotated[
        Path | None,
        typer.Option(
            "--reread", help="Measure nothing; print Spec-Bench's figures for the answer files of this --output-dir."
        ),
    ] = None,
    tp: o.TensorParallel = False,
    json: o.Json = False,
    **more: Any,
) -> None:
    """Compare ways of decoding on the same prompts: tau (tokens from a pass), tokens a second, speed-up, same text."""
    if reread is not None:
        from outdraft.evaluation.bench.spec_bench import reread as reread_answers

        sources = {name: context.get_parameter_source(name) for name in context.params}
        given = [name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"]
        if others := sorted(set(given) - {"reread", "model", "json"}):
            named = ", ".join(map(flag, others))
            raise UserError(f"--reread measures nothing, so it takes --model and --json only; leave out {named}")
        answers = reread_answers(reread, model)
        print_json(answers.as_dict()) if json else results().print(answers.table())
        return
    flags = {**locals(), **more}
    from outdraft.api.loading import quantised_backend
    from outdraft.evaluation.bench.bench import run_bench
    from outdraft.evaluation.bench.methods import BenchSettings

    parsed: dict[str, Any] = {
        "draft_models": draft_model or [],
        "methods": None if methods is None else o.listed(methods),
        "controllers": o.listed(controllers) or ["default"],
        "temperatures": o.numbers("--temperatures", temperatures),
        "peers": o.listed(peers),
        "tree": o.drafting(**more),
        "backend": quantised_backend(more["backend"], more["quantize"]),
        "tp_plan": "auto" if tp else None,
    }
    as_they_are = {field.name: flags[field.name] for field in fields(BenchSettings) if field.name not in parsed}
    result = run_bench(BenchSettings(**as_they_are, **parsed), remarks())
    print_json(result.as_dict()) if json else result.show(results(), all_figures)


AUDITED = o.flags_of(
    *("evaluation/audit/findings.py", "AuditSettings"),
    *("data", "limit", "max_new_tokens", "greedy", "total_variation", "power", "alpha", "batch_size", "seed", "quick"),
    "output_dir",
)


@o.with_flags(AUDITED, o.SAMPLED, o.DRAFTED, o.LOADED)
def verify(
    model: o.Model = "reference",
    draft_model: o.DraftModel = None,
    method: o.Method = None,
    report: Annotated[Path | None, typer.Option("--report", help="Save what was found as an HTML page.")] = None,
    json: o.Json = False,
    **flags: Any,
) -> None:
    """Test that drafting keeps the model's output distribution: exit code 0 if so, 1 if not.

    States the time that it expects to take before it begins. Ctrl-C ends it with what was found so far (exit code 130).
    """
    own = {name: flags[name] for name in AUDITED if name != "quick"}
    from outdraft.api.generation import load
    from outdraft.evaluation.audit import AuditSettings, run_audit
    from outdraft.evaluation.audit.findings import show
    from outdraft.evaluation.report.pages import check_page, save_audit

    settings = AuditSettings(generation=o.sampling(**flags) | o.drafting(**flags), **own)
    if flags["quick"]:
        settings = settings.made_quick()
    loaded = load(model, draft_model, **o.loading(method=method, **flags))
    if report is not None:
        check_page(report)  # before minutes of work
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


@o.with_flags({"data": AUDITED["data"], "dtype": o.Dtype, "device": o.Device})
def doctor(model: o.Model = "reference", draft_model: o.DraftModel = None, json: o.Json = False, **flags: Any) -> None:
    """Check that a drafter fits its model and is read as it was trained: exit code 0 if so, 1 with the fix if not."""
    from outdraft.api.loading import load_target
    from outdraft.api.prompts import encode, note_texts, read_prompts
    from outdraft.data.provenance import environment
    from outdraft.evaluation.doctor import PROMPTS, diagnose
    from outdraft.reference import load_prompts
    from outdraft.target.named import named, shipped_drafter

    if draft_model is None:
        raise UserError("there is no drafter to examine; give its folder with --draft-model")
    source = shipped_drafter(draft_model, None) if named(draft_model) is not None else draft_model
    data = flags.pop("data")
    target = load_target(model, **flags)
    given = read_prompts(data, PROMPTS) if data else load_prompts("heldout")[:PROMPTS]
    note_texts(given, target.tokenizer)
    prompts = encode(given, target)
    remarks().print(f"decoding {len(prompts)} prompts", style="dim", markup=False)
    found = diagnose(target, source, prompts)
    if json:
        shown = {"model": model, "draft_model": draft_model, "environment": environment(target)}
        print_json({**found.as_dict(), **shown})
    else:
        show(found, results())
    if not found.right:
        raise typer.Exit(1)


def show(found: Diagnosis, console: Console) -> None:
    """Print what the folder is, the acceptance by position, what was tried, and the verdict."""
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    from outdraft.console.facts import table

    console.print(table(found.as_dict()["drafter"]))
    noted = {"acceptance_at": "at training", "held_out_top1": "top-1 at training"}
    noted = {name: title for name, title in noted.items() if f"{name}_1" in found.noted}
    by_position = Table("position", "accepted here", *noted.values())
    for place, share in enumerate(found.drafts.by_position, start=1):
        notes = [found.noted.get(f"{name}_{place}") for name in noted]
        by_position.add_row(str(place), f"{share:.0%}", *("-" if note is None else f"{note:.0%}" for note in notes))
    console.print(by_position)
    for one in found.tried:
        setting = ", ".join(f"{key} {value}" for key, value in one.setting.items())
        line = f"tried {setting}: {one.by_position[0]:.0%} at position 1"
        console.print(Text(line, style="bold" if one.setting == found.setting else "dim"))
    said = f"{found.verdict.upper()}: {found.reason}." + (f"\nFix: {found.fix}." if found.fix else "")
    colour = "green" if found.right else "red"
    console.print(Panel(Text(said, style=f"bold {colour}"), border_style=colour, expand=False), soft_wrap=False)
