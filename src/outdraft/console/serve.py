"""`outdraft serve`: its flags, and the start of the server: listen, load, print the address."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated, Any

import typer

from outdraft.console import options as o
from outdraft.errors import UserError
from outdraft.output import is_main_process, remarks

SETTINGS = ("serving/settings.py", "ServeSettings")
SERVED = o.flags_of(
    *SETTINGS,
    *("host", "port", "served_model_name", "max_model_len", "max_num_seqs", "kv_cache_tokens", "prefill_chunk"),
    *("max_waiting", "max_request_bytes", "request_timeout", "shutdown_timeout", "threads", "log_requests"),
    "allow_origin",
)
SERVE = o.field_help(*SETTINGS)


@o.with_flags(SERVED, o.SAMPLED, o.DRAFTED, o.LOADED)
def serve(
    model: o.Model = "reference",
    draft_model: o.DraftModel = None,
    method: o.Method = None,
    api_key: Annotated[str | None, typer.Option("--api-key", envvar="OUTDRAFT_API_KEY", help=SERVE["api_key"])] = None,
    tp: o.TensorParallel = False,
    chat_template_kwargs: Annotated[
        str | None,
        typer.Option("--chat-template-kwargs", callback=o.mapping, metavar="JSON", help=SERVE["chat_template_kwargs"]),
    ] = None,
    **flags: Any,
) -> None:
    """Serve a model with drafts over OpenAI's API, with a chat page at /.

    Sampling options are the defaults of requests that do not set them.
    """
    own = o.given(api_key=api_key, chat_template_kwargs=chat_template_kwargs, **{name: flags[name] for name in SERVED})
    from outdraft.serving.settings import ServeSettings

    settings = ServeSettings(**own, defaults=o.given(**{name: flags[name] for name in o.SAMPLED}))
    loading, draft, said = o.loading(method=method, tp=tp, **flags), o.drafting(**flags), remarks()
    try:
        from outdraft.serving.server import Service, listen
    except ImportError as error:
        raise UserError(f"{error.name} is missing, which serving needs: pip install 'outdraft[serve]'") from error
    # Before minutes of loading; of processes that share the target the first one listens.
    follows = loading.get("tp_plan") is not None and not is_main_process()
    listening = None if follows else listen(settings.host, settings.port)
    try:
        from outdraft.api.draft_settings import DraftSettings
        from outdraft.api.generation import load
        from outdraft.api.settings import model_settings

        loaded = load(model, draft_model, **loading)
        asked = DraftSettings(**o.tree(loaded.drafter, **draft))  # refuses a tree that nothing could draft
        name = Path(model).resolve().name if Path(model).exists() else model  # hub ids and `reference` as they are
        settings.served_model_name = settings.served_model_name or [name]
        service = Service(loaded, settings, asked)
        if own := model_settings(loaded.target):
            said.print(f"note: the model's generation config sets {own} where requests do not", markup=False)
        if not settings.loopback and settings.api_key is None:
            said.print("note: anyone who reaches this address may use the server; --api-key asks for a key")
        slots = service.engine.capacity.slots
        facts = f"{settings.served_model_name[0]}, drafter: {loaded.method}, cache: {slots} tokens, "
        facts += f"temperature {service.temperature:g} where a request names none"

        def ready(url: str) -> None:
            line = f"{facts}\nlistening on {url} (a page to chat on; /v1 for clients; Ctrl-C ends)"
            said.print(line, markup=False, soft_wrap=True)

        if settings.log_requests:
            handler = logging.StreamHandler()
            handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
            logger = logging.getLogger("outdraft.serving")
            logger.addHandler(handler)
            logger.setLevel(logging.INFO)
        service.serve(listening, ready)
    finally:
        if listening is not None:
            listening.close()
