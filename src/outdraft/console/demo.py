"""`outdraft demo`: its flags, and what they become. Knows nothing of how the demonstration runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from outdraft.console import options as o
from outdraft.console.output import print_json, remarks, results


def demo(
    train_seconds: Annotated[float, typer.Option("--train-seconds", help="Time for training a drafter.")] = 90.0,
    prompts: Annotated[int, typer.Option("--prompts", help="Held-out prompts to decode.")] = 12,
    max_new_tokens: o.MaxNewTokens = 96,
    dtype: o.Dtype = None,
    backend: o.Backend = None,
    output_dir: Annotated[Path | None, typer.Option("--output-dir", help="Keep the trained drafter here.")] = None,
    skip_training: Annotated[bool, typer.Option("--skip-training", help="Only the drafter that ships.")] = False,
    json: o.Json = False,
) -> None:
    """Train a drafter for the shipped target, then decode held-out prompts with and without it."""
    from outdraft.reference.demo import DemoSettings, run_demo

    settings = DemoSettings(train_seconds, prompts, max_new_tokens, dtype, backend, output_dir, skip_training)
    result = run_demo(settings, remarks())
    if json:
        print_json(result.as_dict())
    else:
        result.show(results())
