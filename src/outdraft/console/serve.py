"""What `outdraft serve` does between parsing and its end: check, load, listen, say where. Knows no protocol."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from outdraft.console import options as o
from outdraft.errors import UserError
from outdraft.serving.settings import ServeSettings


def run_serve(
    model: str,
    draft_model: str | None,
    loading: dict[str, Any],
    settings: ServeSettings,
    tree: dict[str, Any],
    controller: str | None,
    remarks: Console,
) -> None:
    """Load and listen until told to stop.

    Raises:
        UserError: the web libraries are missing, or anything that cannot be loaded, set or listened on.
    """
    try:
        from outdraft.serving.server import Service, listen
    except ImportError as error:
        raise UserError(f"{error.name} is missing, which serving needs: pip install 'outdraft[serve]'") from error
    listening = listen(settings.host, settings.port)  # before minutes of loading
    try:
        from outdraft.generation import load

        loaded = load(model, draft_model, **loading)
        o.tree(loaded.drafter, **tree, controller=controller)  # refuses a tree that nothing could draft
        settings.served_model_name = settings.served_model_name or [name_of(model)]
        service = Service(loaded, settings, tree, controller)
        if not settings.loopback and settings.api_key is None:
            remarks.print("note: anyone who reaches this address may use the server; --api-key asks for a key")
        facts = f"{settings.served_model_name[0]}, drafter: {loaded.method}, cache: {service.engine.room.slots} tokens"

        def ready(url: str) -> None:
            remarks.print(
                f"{facts}\nlistening on {url} (a page to chat on; /v1 for clients; Ctrl-C ends)", markup=False
            )

        service.serve(listening, ready)
    finally:
        listening.close()


def name_of(model: str) -> str:
    """What clients call it: a hub id or `reference` as it is, a folder by its last part."""
    return Path(model).resolve().name if Path(model).exists() else model
