"""`outdraft info`: its flags. The facts themselves are gathered in `facts.py`."""

from __future__ import annotations

from typing import Annotated

import typer

from outdraft.console import options as o
from outdraft.console.output import print_json, results


def info(
    path: Annotated[
        str, typer.Argument(help="A model (folder, GGUF file, hub id, `smollm2`, `reference`) or a drafter's folder.")
    ],
    device: o.Device = None,
    json: o.Json = False,
) -> None:
    """Say what a model or drafter is, and what it can do on this machine."""
    from outdraft.console.facts import describe, table

    facts = describe(path, device)
    print_json(facts) if json else results().print(table(facts))
