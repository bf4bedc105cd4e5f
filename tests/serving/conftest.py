"""Servers for the tests of this folder."""

from __future__ import annotations

import pytest

for needed in ("fastapi", "uvicorn", "prometheus_client", "httpx"):
    pytest.importorskip(needed, reason="needs outdraft[serve] and httpx")

from running import served, starting

__all__ = ["served", "starting"]
