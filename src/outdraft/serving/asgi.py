"""ASGI below the routes: a middleware for request bodies and HEAD, JSON responses, and server-sent events."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from typing import Any

from starlette.responses import Response

from outdraft.serving.errors import ApiError

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]


def encoded(value: Any) -> bytes:
    """JSON in ASCII, as halves of surrogate pairs have no other form."""
    return json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":")).encode("ascii")


class Json(Response):
    """A JSON document."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return encoded(content)


def error_response(error: ApiError) -> Json:
    """The response that reports an error."""
    return Json(error.body, error.status, error.headers)


async def until_disconnect(receive: Receive) -> None:
    """Wait until the client has closed its connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


class Events(Response):
    """Server-sent events.

    Args:
        documents: one document for each event; closed at once when the client goes.
        named: events have their documents' types for names, and no mark comes after the last one.
    """

    def __init__(self, documents: AsyncIterator[dict[str, Any]], named: bool = False):
        self.documents, self.named = documents, named
        self.status_code, self.background = 200, None
        self.init_headers({"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.ensure_future(self._send(send))
        leaving = asyncio.ensure_future(until_disconnect(receive))
        try:
            await asyncio.wait({sending, leaving}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (sending, leaving):
                task.cancel()
            for task in (sending, leaving):
                with contextlib.suppress(asyncio.CancelledError, OSError):
                    await task
            await self.documents.aclose()  # type: ignore[attr-defined]

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for document in self.documents:
            name = b"event: " + document["type"].encode() + b"\n" if self.named else b""
            await self._body(send, name + b"data: " + encoded(document) + b"\n\n")
        await self._body(send, b"" if self.named else b"data: [DONE]\n\n", False)

    @staticmethod
    async def _body(send: Send, body: bytes, more: bool = True) -> None:
        await send({"type": "http.response.body", "body": body, "more_body": more})


class BodyLimits:
    """ASGI middleware that reads a request's body before the application sees the request.

    Args:
        max_bytes: bytes that a body may have.
        timeout: seconds within which the whole body must arrive.
    """

    def __init__(self, app: Any, max_bytes: int, timeout: float):
        self.app, self.max_bytes, self.timeout = app, max_bytes, timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if scope["method"] == "HEAD":  # as GET; the server below sends no body
            scope = {**scope, "method": "GET"}
        try:
            body = await asyncio.wait_for(self._body(receive), self.timeout)
        except ApiError as error:
            await _refuse(scope, receive, send, error)
            return
        except asyncio.TimeoutError:
            message = f"the request did not arrive within {self.timeout:g} seconds"
            await _refuse(scope, receive, send, ApiError(408, message, code="request_timeout"))
            return
        if body is None:
            return
        given = False

        async def whole() -> dict[str, Any]:
            nonlocal given
            if given:
                return await receive()  # that the client has gone
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self.app(scope, whole, send)

    async def _body(self, receive: Receive) -> bytes | None:
        """The whole body; None if the client has gone."""
        parts, size = [], 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            part = message.get("body", b"")
            size += len(part)
            if size > self.max_bytes:
                raise ApiError(413, f"the request is larger than {self.max_bytes} bytes", code="request_too_large")
            parts.append(part)
            if not message.get("more_body", False):
                return b"".join(parts)


async def _refuse(scope: Scope, receive: Receive, send: Send, error: ApiError) -> None:
    """Report the error and close the connection, as a body may still be under way on it."""
    response = error_response(error)
    response.headers["connection"] = "close"
    await response(scope, receive, send)
