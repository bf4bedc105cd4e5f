"""The page at `/`: one file with everything in it. Knows where it lies, nothing of what it does."""

from __future__ import annotations

from functools import cache
from importlib.resources import files

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
"""The page loads nothing, talks to its own server only and is shown in no frame."""


@cache
def page() -> str:
    """Its source."""
    return (files("outdraft.serving") / "page.html").read_text(encoding="utf-8")
