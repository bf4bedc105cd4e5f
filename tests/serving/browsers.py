"""Where a headless browser is, for tests of pages."""

from __future__ import annotations

import os
import shutil

import pytest


def browser() -> str:
    """Chromium, or a skip that says what is missing."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    found = next((path for name in (os.environ.get("CHROME_PATH", ""), *names) if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip("needs Chromium on PATH or in CHROME_PATH")
    return found
