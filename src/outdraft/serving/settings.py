"""The server's settings; their docstrings are the command line's help."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass, field
from typing import Any

from outdraft.errors import UserError, flag, refuse_below


@dataclass
class ServeSettings:
    """A server's settings; names as in vLLM where it has them."""

    host: str = "127.0.0.1"
    """Address to listen on; the default is reached from this machine only."""
    port: int = 8000
    """Port to listen on; 0 takes a free one."""
    served_model_name: list[str] = field(default_factory=list)
    """Name that clients ask for; may be repeated, the first one stands in answers. By default the model's."""
    api_key: str | None = None
    """Key that clients of /v1 must send as a bearer token; better in OUTDRAFT_API_KEY, which no process list shows."""
    max_model_len: int | None = None
    """Tokens that prompt and answer may have together; by default the model's context."""
    max_num_seqs: int = 16
    """Answers decoded at once; further ones wait."""
    kv_cache_tokens: int | None = None
    """Tokens that all answers being decoded may hold in the cache, by default what 40% of the free memory holds."""
    prefill_chunk: int = 256
    """Prompt tokens run between two rounds of the answers that are being decoded."""
    max_waiting: int = 512
    """Requests that may wait; further ones get HTTP 429."""
    max_request_bytes: int = 4_194_304
    """Bytes of a request at most."""
    request_timeout: float = 30.0
    """Seconds within which a request's body must have arrived."""
    shutdown_timeout: float = 30.0
    """Seconds that running requests have to finish once the server was told to stop."""
    threads: int | None = None
    """Threads of the model on a CPU; by default OMP_NUM_THREADS or all cores (one less where not native)."""
    log_requests: bool = False
    """Log a line as every request ends: id, tokens in and out, tau, seconds, why it ended; never its text."""
    allow_origin: list[str] = field(default_factory=list)
    """Web origin whose pages may ask (CORS), such as https://example.com, or * for all; may be repeated."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """The chat template's own switches where a request does not say, as JSON: {"enable_thinking": false}."""
    defaults: dict[str, Any] = field(default_factory=dict)
    """Sampling settings of requests that do not say; temperature 1 unless given here, as in OpenAI's API."""

    def __post_init__(self) -> None:
        refuse_below(self, max_num_seqs=1, prefill_chunk=1, max_waiting=1, max_request_bytes=1, port=0)
        refuse_below(self, threads=1, max_model_len=2, kv_cache_tokens=2)
        for name in ("request_timeout", "shutdown_timeout"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise UserError(f"{flag(name)} must be seconds, 0 or more, not {getattr(self, name)}")
        if not self.request_timeout:
            raise UserError("--request-timeout 0 would refuse every request; give the seconds that a body may take")
        for origin in self.allow_origin:
            if not re.fullmatch(r"\*|[a-z][a-z0-9+.-]*://[^/]+", origin):
                raise UserError(f"--allow-origin must be * or like https://example.com, without a path, not '{origin}'")
        if not self.host.strip():
            raise UserError(
                "--host must be an address: 127.0.0.1 for this machine only, 0.0.0.0 for all that can reach it"
            )
        if not all(name.strip() for name in self.served_model_name):
            raise UserError("--served-model-name must not be empty; leave it out for the model's own name")
        if self.port > 65535:
            raise UserError(f"--port must be at most 65535, not {self.port}")
        if self.api_key is not None and not (self.api_key and self.api_key.isascii() and self.api_key.isprintable()):
            raise UserError("--api-key must be printable ASCII and not empty")

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach it."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False
