"""What is told to a client when its request cannot be answered, in OpenAI's format.

Knows status codes and words; nothing of requests, models or the web framework.
"""

from __future__ import annotations

from typing import Any


class Fault(Exception):
    """A request that is not answered.

    Args:
        status: of HTTP.
        message: one line that says what is wrong and what would be right.
        param: the parameter at fault, where there is one.
        code: for programs, where OpenAI has one.
        headers: that go with the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers or {}

    @property
    def body(self) -> dict[str, Any]:
        """As OpenAI's clients read it."""
        kind = _KINDS.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


_KINDS = {401: "authentication_error", 429: "rate_limit_error"}


def refused(message: str, param: str | None = None, code: str | None = None) -> Fault:
    """A request that can never be answered as it is."""
    return Fault(400, message, param, code)


def stopping() -> Fault:
    """The server is going down."""
    return Fault(503, "the server is shutting down; send the request again later", code="shutting_down")


def undecodable(why: str) -> Fault:
    """The model gives nothing to choose a token of."""
    return Fault(500, f"this request cannot be answered any further: {why}", code="not_decodable")


def broken() -> Fault:
    """Something of ours went wrong; what it was stands in the server's log only."""
    return Fault(500, "the server failed on this request; its log says where", code="internal_error")
