"""Servers for the tests of this folder, which are left out where `outdraft[serve]` or httpx is missing."""

from __future__ import annotations

from importlib.util import find_spec

if all(find_spec(needed) for needed in ("fastapi", "uvicorn", "prometheus_client", "httpx")):
    from running import served, starting

    __all__ = ["served", "starting"]
else:
    collect_ignore_glob = ["test_*.py"]
