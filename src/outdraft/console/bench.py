"""`outdraft bench`: its flags, and how the comparison is shown."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

from outdraft.console import options as o
from outdraft.errors import UserError
from outdraft.methods.registry import names
from outdraft.output import print_json, remarks, results

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
            named = ", ".join("--" + name.replace("_", "-") for name in others)
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
