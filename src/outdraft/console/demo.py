"""`outdraft demo`: its flags, and how the result is shown; `demo_run.py` runs it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from outdraft.console import options as o
from outdraft.output import print_json, remarks, results


def demo(
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="smollm2, or the tiny `reference`; by default the first that is here."),
    ] = None,
    prompts: Annotated[int, typer.Option("--prompts", help="Held-out prompts to decode, at most.")] = 28,
    max_new_tokens: o.MaxNewTokens = 64,
    dtype: o.Dtype = None,
    backend: o.Backend = None,
    train: Annotated[bool, typer.Option("--train", help="First train a drafter for the tiny target.")] = False,
    train_seconds: Annotated[
        float | None, typer.Option("--train-seconds", help="Time for training a drafter; with --train.  [90]")
    ] = None,
    output_dir: Annotated[
        Path | None, typer.Option("--output-dir", help="Keep the trained drafter here; with --train.")
    ] = None,
    json: o.Json = False,
) -> None:
    """Answer a question without and with a drafter, then compare all ways of decoding on held-out prompts."""
    from outdraft.console.demo_run import DemoSettings, run_demo

    settings = DemoSettings(model, train, train_seconds, output_dir, prompts, max_new_tokens, dtype, backend)
    result = run_demo(settings, Console(quiet=True) if json else results(), remarks())
    if json:
        print_json(result.as_dict())
    else:
        result.show(results())
