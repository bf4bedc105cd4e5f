"""The web application: routes, keys, and how a request waits for its answers.

Thin: requests are translated, decoded and put into words elsewhere. Knows the web framework; nothing of models.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import time
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from transformers import PreTrainedTokenizerBase

from outdraft import __version__
from outdraft.api.text import decode_text
from outdraft.serving.engine import Engine
from outdraft.serving.faults import Fault, broken
from outdraft.serving.jobs import Ask, Event, Failed, Job
from outdraft.serving.limits import Limits
from outdraft.serving.metrics import Metrics
from outdraft.serving.page import HEADERS, page
from outdraft.serving.protocol import ChatRequest, CompletionRequest, DetokenizeRequest, Model, TokenizeRequest
from outdraft.serving.protocol import Request as Asked
from outdraft.serving.replies import Reply
from outdraft.serving.settings import ServeSettings
from outdraft.serving.translation import Translator
from outdraft.serving.wire import Events, Json, fault_response, gone

log = logging.getLogger("outdraft.serving")
"""Where what went wrong is written; never prompts or answers."""

_FAULTS: dict[int | str, dict[str, Any]] = {
    status: {"description": what}
    for status, what in {
        400: "The request cannot be answered as it is.",
        401: "The key is missing or wrong.",
        404: "There is no such model.",
        408: "The request took too long to arrive.",
        413: "The request is too large.",
        429: "Too many requests are waiting.",
        503: "The server is shutting down.",
    }.items()
}
_bearer = HTTPBearer(auto_error=False)


def make_app(
    engine: Engine,
    translator: Translator,
    tokenizer: PreTrainedTokenizerBase,
    settings: ServeSettings,
    metrics: Metrics,
) -> FastAPI:
    """The application over a running engine."""
    app = FastAPI(title="outdraft", version=__version__, docs_url=None, redoc_url=None)
    app.add_middleware(Limits, most=settings.max_request_bytes, seconds=settings.request_timeout)
    if settings.allow_origin:
        app.add_middleware(
            CORSMiddleware, allow_origins=settings.allow_origin, allow_methods=["*"], allow_headers=["*"]
        )
    _say_faults(app)
    began = int(time.time())

    def allowed(given: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]) -> None:
        """The right key, where one is needed."""
        key = settings.api_key
        sent = given.credentials if given is not None else ""
        if key is not None and not hmac.compare_digest(sent.encode(), key.encode()):
            message = "the key is wrong" if sent else "a key is needed: Authorization: Bearer KEY"
            raise Fault(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})

    async def answer(request: Request, asked: Asked, ask: Ask, chat: bool, echo: list[str]) -> Response:
        events: asyncio.Queue[Event] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def deliver(event: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended: nobody waits
                loop.call_soon_threadsafe(events.put_nowait, event)

        job = Job(ask, engine.target, tokenizer, deliver)
        reply = Reply(job, translator.names[0], tokenizer, chat, bool(asked.return_pieces), echo)
        engine.submit(job)
        if asked.stream:
            return Events(_stream(engine, job, events, reply, asked.include_usage))
        return await _whole(engine, job, events, reply, request)

    guarded = [Depends(allowed)]

    def entry(name: str) -> dict[str, Any]:
        drafter = engine.drafting.drafter
        method = drafter.method if drafter is not None else "none"
        return Model(id=name, created=began, max_model_len=translator.context_length, method=method).model_dump()

    @app.post("/v1/chat/completions", dependencies=guarded, responses=_FAULTS)
    async def chat_completions(request: Request, asked: ChatRequest) -> Response:
        """Answer a conversation."""
        return await answer(request, asked, await asyncio.to_thread(translator.chat, asked), True, [])

    @app.post("/v1/completions", dependencies=guarded, responses=_FAULTS)
    async def completions(request: Request, asked: CompletionRequest) -> Response:
        """Continue a text."""
        ask = await asyncio.to_thread(translator.completion, asked)
        echo = [one if isinstance(one, str) else decode_text(tokenizer, one) for one in asked.prompts if asked.echo]
        return await answer(request, asked, ask, False, echo)

    @app.get("/v1/models", dependencies=guarded, responses={401: _FAULTS[401]})
    async def models() -> Response:
        """The one model of this server, by all its names."""
        return Json({"object": "list", "data": [entry(name) for name in translator.names]})

    @app.get("/v1/models/{name:path}", dependencies=guarded, responses={code: _FAULTS[code] for code in (401, 404)})
    async def model(name: str) -> Response:
        """One of its names."""
        translator.check_model(name)
        return Json(entry(name))

    @app.post("/tokenize", dependencies=guarded, responses=_FAULTS)
    async def tokenize(asked: TokenizeRequest) -> Response:
        """A text or a conversation as tokens, as in vLLM."""
        return Json(await asyncio.to_thread(translator.tokenize, asked))

    @app.post("/detokenize", dependencies=guarded, responses=_FAULTS)
    async def detokenize(asked: DetokenizeRequest) -> Response:
        """Tokens as text, as in vLLM."""
        return Json(await asyncio.to_thread(translator.detokenize, asked))

    @app.get("/version")
    async def version() -> Response:
        """Of this program."""
        return Json({"version": __version__})

    @app.get("/health", responses={503: _FAULTS[503]})
    async def health() -> Response:
        """200 while requests are taken."""
        return Json({"status": "ok"} if engine.alive else {"status": "stopping"}, 200 if engine.alive else 503)

    @app.get("/metrics")
    async def figures() -> Response:
        """For Prometheus."""
        return Response(metrics.text(), media_type=metrics.content_type)

    @app.get("/", include_in_schema=False)
    async def root() -> Response:
        """A page to chat on."""
        return Response(page(), headers=HEADERS, media_type="text/html; charset=utf-8")

    return app


async def _whole(engine: Engine, job: Job, events: asyncio.Queue[Event], reply: Reply, request: Request) -> Response:
    """All answers at once; nobody is answered who has gone."""
    leaving = asyncio.ensure_future(gone(request.receive))
    try:
        left = len(job.answers)
        while left:
            getting = asyncio.ensure_future(events.get())
            await asyncio.wait({getting, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not getting.done():
                getting.cancel()
                return Response(status_code=499)
            event = getting.result()
            if isinstance(event, Failed):
                return fault_response(event.fault)
            reply.add(event)
            left -= event.finish_reason is not None
        return Json(reply.whole())
    finally:
        leaving.cancel()
        engine.cancel(job)


async def _stream(
    engine: Engine, job: Job, events: asyncio.Queue[Event], reply: Reply, usage: bool
) -> AsyncIterator[dict[str, Any]]:
    """Chunk by chunk; closing it frees the rows."""
    try:
        left = len(job.answers)
        while left:
            event = await events.get()
            if isinstance(event, Failed):
                yield event.fault.body
                return
            for chunk in reply.chunks(event):
                yield {**chunk, "usage": None} if usage else chunk
            left -= event.finish_reason is not None
        if usage:
            yield reply.usage_chunk()
    finally:
        engine.cancel(job)


def _say_faults(app: FastAPI) -> None:
    """Whatever goes wrong is said in OpenAI's format."""

    @app.exception_handler(Fault)
    async def fault(_: Request, error: Fault) -> Response:
        return fault_response(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        return fault_response(_first_mistake(error))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path}: {error.detail}"
        headers = dict(error.headers) if error.headers else None
        return fault_response(Fault(error.status_code, message, headers=headers))

    @app.exception_handler(Exception)
    async def unexpected(_: Request, error: Exception) -> Response:
        log.error("a request failed", exc_info=error)
        return fault_response(broken())


def _first_mistake(error: RequestValidationError) -> Fault:
    """The first thing that is wrong with a body, and where; the input itself is not repeated."""
    mistake = error.errors()[0]
    place = [str(part) for part in mistake["loc"] if part != "body"]
    if mistake["type"] == "json_invalid":
        return Fault(400, "the body is not valid JSON", code="invalid_json")
    if mistake["type"] == "extra_forbidden":
        return Fault(400, f"unknown parameter '{'.'.join(place)}'", ".".join(place), "unknown_parameter")
    where = ".".join(place) or None
    return Fault(400, f"{where or 'the body'}: {mistake['msg']}", where)
