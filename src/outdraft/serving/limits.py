"""A bound on what a client may send: bytes of a body, and the time until it has arrived.

Reads the body before anything else sees the request. Knows nothing of what is in it.
"""

from __future__ import annotations

import asyncio
from typing import Any

from outdraft.serving.faults import Fault
from outdraft.serving.wire import Receive, Scope, Send, send_fault


class Limits:
    """ASGI middleware that hands on whole bodies only.

    Args:
        app: behind it.
        most: bytes.
        seconds: for all of them to arrive.
    """

    def __init__(self, app: Any, most: int, seconds: float):
        self.app, self.most, self.seconds = app, most, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            body = await asyncio.wait_for(self._body(receive), self.seconds)
        except Fault as fault:
            await send_fault(send, fault)
            return
        except asyncio.TimeoutError:
            message = f"the request did not arrive within {self.seconds:g} seconds"
            await send_fault(send, Fault(408, message, code="request_timeout"))
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
        parts, size = [], 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            part = message.get("body", b"")
            size += len(part)
            if size > self.most:
                raise Fault(413, f"the request is larger than {self.most} bytes", code="request_too_large")
            parts.append(part)
            if not message.get("more_body", False):
                return b"".join(parts)
