"""`outdraft info`: its flags; `facts.py` gathers what it shows."""

from __future__ import annotations

from typing import Annotated

import typer

from outdraft.console import options as o
from outdraft.errors import UserError
from outdraft.output import print_json, results


def info(
    path: Annotated[
        str | None,
        typer.Argument(help="A model (folder, GGUF file, hub id, `smollm2`, `reference`) or a drafter's folder."),
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="The same, by the name that other verbs use.")
    ] = None,
    device: o.Device = None,
    json: o.Json = False,
) -> None:
    """Say what a model or drafter is, and what it can do on this machine."""
    from outdraft.console.facts import describe, table

    if (path is None) == (model is None):
        raise UserError("give one model or drafter, such as `outdraft info smollm2`")
    facts = describe(str(path or model), device)
    print_json(facts) if json else results().print(table(facts))
