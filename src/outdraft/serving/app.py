"""The web application: its routes, the key they need, and how a request waits for the engine's events."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from transformers import PreTrainedTokenizerBase

from outdraft import __version__
from outdraft.data.text import prompt_text
from outdraft.serving.asgi import BodyLimits, Events, Json, error_response, until_disconnect
from outdraft.serving.engine import Engine
from outdraft.serving.errors import ApiError, internal_error
from outdraft.serving.jobs import Event, Failed, GenerationParams, Job
from outdraft.serving.metrics import Metrics
from outdraft.serving.page import page, page_headers
from outdraft.serving.parse import RequestParser
from outdraft.serving.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    GenerationRequest,
    SamplingRequest,
    StreamOptions,
    TokenizeRequest,
)
from outdraft.serving.render import Renderer
from outdraft.serving.render_response import ResponseRenderer
from outdraft.serving.responses import ResponsesRequest
from outdraft.serving.settings import ServeSettings

log = logging.getLogger("outdraft.serving")
"""Takes what went wrong; never prompts or answers."""

_ERRORS: dict[int | str, dict[str, Any]] = {
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
    parser: RequestParser,
    tokenizer: PreTrainedTokenizerBase,
    settings: ServeSettings,
    metrics: Metrics,
) -> FastAPI:
    """The application over a running engine."""
    app = FastAPI(title="outdraft", version=__version__, docs_url=None, redoc_url=None)
    app.add_middleware(BodyLimits, max_bytes=settings.max_request_bytes, timeout=settings.request_timeout)
    if settings.allow_origin:
        app.add_middleware(
            CORSMiddleware, allow_origins=settings.allow_origin, allow_methods=["*"], allow_headers=["*"]
        )
    _report_errors(app)
    began = int(time.time())

    def check_key(given: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]) -> None:
        """Refuse a wrong key, where one is needed."""
        key = settings.api_key
        sent = given.credentials if given is not None else ""
        if key is not None and not hmac.compare_digest(sent.encode(), key.encode()):
            message = "the key is wrong" if sent else "a key is needed: Authorization: Bearer KEY"
            raise ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})

    async def answer(
        request: Request,
        body: SamplingRequest,
        params: GenerationParams,
        prefix: str,
        rendered: Callable[[Job], Renderer],
    ) -> Response:
        events: asyncio.Queue[Event] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def deliver(event: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended: nobody waits
                loop.call_soon_threadsafe(events.put_nowait, event)

        job = Job(params, engine.target, tokenizer, deliver, f"{prefix}{uuid.uuid4().hex}")
        renderer = rendered(job)
        engine.submit(job)
        if body.stream:
            usage = body.stream_options if isinstance(body, GenerationRequest) and body.include_usage else None
            return Events(_stream(engine, job, events, renderer, usage), named=isinstance(body, ResponsesRequest))
        return await _whole(engine, job, events, renderer, request)

    guarded = [Depends(check_key)]

    def entry(name: str) -> dict[str, Any]:
        method = engine.drafting.drafter.method if engine.drafting.drafter is not None else "none"
        about = {"id": name, "object": "model", "created": began, "owned_by": "outdraft"}
        return {**about, "max_model_len": parser.context_length, "method": method}

    @app.post("/v1/chat/completions", dependencies=guarded, responses=_ERRORS)
    async def chat_completions(request: Request, body: ChatRequest) -> Response:
        """Answer a conversation."""
        params = await asyncio.to_thread(parser.chat, body)
        pieces = bool(body.return_pieces)
        return await answer(
            request, body, params, "chatcmpl-", lambda job: Renderer(job, parser.names[0], tokenizer, True, pieces)
        )

    @app.post("/v1/responses", dependencies=guarded, responses=_ERRORS)
    async def responses(request: Request, body: ResponsesRequest) -> Response:
        """Answer a text or a conversation, in the Responses API's format."""
        params = await asyncio.to_thread(parser.response, body)
        return await answer(
            request, body, params, "resp_", lambda job: ResponseRenderer(body, job, parser.names[0], tokenizer)
        )

    @app.post("/v1/completions", dependencies=guarded, responses=_ERRORS)
    async def completions(request: Request, body: CompletionRequest) -> Response:
        """Continue a text."""
        params = await asyncio.to_thread(parser.completion, body)
        echo = [one if isinstance(one, str) else prompt_text(tokenizer, one) for one in body.prompts if body.echo]
        pieces = bool(body.return_pieces)
        return await answer(
            request, body, params, "cmpl-", lambda job: Renderer(job, parser.names[0], tokenizer, False, pieces, echo)
        )

    @app.get("/v1/models", dependencies=guarded, responses={401: _ERRORS[401]})
    async def models() -> Response:
        """The one model of this server, by all its names."""
        return Json({"object": "list", "data": [entry(name) for name in parser.names]})

    @app.get("/v1/models/{name:path}", dependencies=guarded, responses={code: _ERRORS[code] for code in (401, 404)})
    async def model(name: str) -> Response:
        """One of its names."""
        parser.check_model(name)
        return Json(entry(name))

    @app.post("/tokenize", dependencies=guarded, responses=_ERRORS)
    async def tokenize(body: TokenizeRequest) -> Response:
        """A text or a conversation as tokens, as in vLLM."""
        return Json(await asyncio.to_thread(parser.tokenize, body))

    @app.post("/detokenize", dependencies=guarded, responses=_ERRORS)
    async def detokenize(body: DetokenizeRequest) -> Response:
        """Tokens as text, as in vLLM."""
        return Json(await asyncio.to_thread(parser.detokenize, body))

    @app.get("/version")
    async def version() -> Response:
        """The program's version."""
        return Json({"version": __version__})

    @app.get("/health", responses={503: _ERRORS[503]})
    async def health() -> Response:
        """200 while requests are taken."""
        return Json({"status": "ok"} if engine.alive else {"status": "stopping"}, 200 if engine.alive else 503)

    @app.get("/metrics")
    async def figures() -> Response:
        """Metrics for Prometheus."""
        return Response(metrics.text(), media_type=metrics.content_type)

    @app.get("/", include_in_schema=False)
    async def root() -> Response:
        """A page to chat on."""
        return Response(page(), headers=page_headers(), media_type="text/html; charset=utf-8")

    return app


async def _whole(
    engine: Engine, job: Job, events: asyncio.Queue[Event], renderer: Renderer, request: Request
) -> Response:
    """All answers at once; the job is cancelled if the client goes."""
    leaving = asyncio.ensure_future(until_disconnect(request.receive))
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
                return error_response(event.error)
            renderer.add(event)
            left -= event.finish_reason is not None
        return Json(renderer.whole())
    finally:
        leaving.cancel()
        engine.cancel(job)


async def _stream(
    engine: Engine, job: Job, events: asyncio.Queue[Event], renderer: Renderer, usage: StreamOptions | None
) -> AsyncIterator[dict[str, Any]]:
    """The answers chunk by chunk; the job is cancelled if the iterator is closed.

    Args:
        usage: what the client asks of token counts, if it asks for any.
    """
    try:
        left = len(job.answers)
        while left:
            event = await events.get()
            if isinstance(event, Failed):
                for chunk in renderer.failed(event.error):
                    yield chunk
                return
            for chunk in renderer.chunks(event):
                told = {} if usage is None else {"usage": renderer.usage() if usage.continuous_usage_stats else None}
                yield {**chunk, **told}
            left -= event.finish_reason is not None
        if usage:
            yield renderer.usage_chunk()
    finally:
        engine.cancel(job)


def _report_errors(app: FastAPI) -> None:
    """Report every error in OpenAI's format."""

    @app.exception_handler(ApiError)
    async def api_error(_: Request, error: ApiError) -> Response:
        return error_response(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        return error_response(_first_mistake(error))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path}: {error.detail}"
        headers = dict(error.headers) if error.headers else None
        return error_response(ApiError(error.status_code, message, headers=headers))

    @app.exception_handler(Exception)
    async def unexpected(_: Request, error: Exception) -> Response:
        log.error("a request failed", exc_info=error)
        return error_response(internal_error())


def _first_mistake(error: RequestValidationError) -> ApiError:
    """The first thing that is wrong with a body, and where; the input itself is not repeated."""
    # Of several forms that a field may have, the one that was read furthest is meant.
    where, mistake = max(((_place(one, error.body), one) for one in error.errors()), key=lambda found: len(found[0]))
    if mistake["type"] == "json_invalid":
        return ApiError(400, "the body is not valid JSON", code="invalid_json")
    if mistake["type"] == "extra_forbidden":
        name = ".".join(where)
        return ApiError(400, f"unknown parameter '{name}'", name, "unknown_parameter")
    return ApiError(400, f"{'.'.join(where) or 'the body'}: {mistake['msg']}", ".".join(where) or None)


def _place(mistake: dict[str, Any], body: Any) -> list[str]:
    """Where in the body a mistake is, without the names of the forms that a field may have."""
    place, path = list[str](), mistake["loc"][1:]
    for part in path:
        if part in body if isinstance(body, dict) else isinstance(body, list) and isinstance(part, int):
            body = body[part]
            place.append(str(part))
    return [*place, *map(str, path[-1:])] if mistake["type"] == "missing" else place
