"""Errors that a client is told of, in OpenAI's format."""

from __future__ import annotations

from typing import Any

_TYPES = {401: "authentication_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """A request that is not answered.

    Args:
        param: the parameter that is wrong, if it is one.
        code: OpenAI's error code, for programs.
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
        """The JSON document that OpenAI's clients read."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """The request can never be answered as it is."""
    return ApiError(400, message, param, code)


def shutting_down() -> ApiError:
    """The server takes no further requests."""
    return ApiError(503, "the server is shutting down; send the request again later", code="shutting_down")


def not_decodable(why: str) -> ApiError:
    """The model's logits leave no token to choose."""
    return ApiError(500, f"this request cannot be answered any further: {why}", code="not_decodable")


def internal_error() -> ApiError:
    """A defect of the server; only its log says which."""
    return ApiError(500, "the server failed on this request; its log says where", code="internal_error")
