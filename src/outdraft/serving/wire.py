"""Bytes on the wire: JSON that any text survives, faults, and events as they come, until the client has gone.

Knows ASGI; nothing of requests or answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from typing import Any

from starlette.responses import Response

from outdraft.serving.faults import Fault

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


def fault_response(fault: Fault) -> Json:
    """A fault as an answer."""
    return Json(fault.body, fault.status, fault.headers)


async def send_fault(send: Send, fault: Fault) -> None:
    """The same where nothing but ASGI is at hand; the connection ends, as a body may still be under way on it."""
    body = encoded(fault.body)
    headers = {"content-type": "application/json", "content-length": str(len(body)), "connection": "close"}
    raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in {**headers, **fault.headers}.items()]
    await send({"type": "http.response.start", "status": fault.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})


async def gone(receive: Receive) -> None:
    """Until the client has closed its connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


class Events(Response):
    """Server-sent events.

    Args:
        documents: to send, one an event; closed at once when the client goes.
    """

    def __init__(self, documents: AsyncIterator[dict[str, Any]]):
        self.documents = documents
        self.status_code, self.background = 200, None
        self.init_headers({"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.ensure_future(self._send(send))
        leaving = asyncio.ensure_future(gone(receive))
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
            await self._event(send, encoded(document))
        await self._event(send, b"[DONE]", False)

    @staticmethod
    async def _event(send: Send, data: bytes, more: bool = True) -> None:
        await send({"type": "http.response.body", "body": b"data: " + data + b"\n\n", "more_body": more})
