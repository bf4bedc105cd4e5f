"""What all tests share: one thread, no verdict by how fast the machine is, and data beside the repository."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from outdraft.api import draft_settings
from outdraft.target.backends.native import why_not_native

try:
    from hypothesis import HealthCheck, settings
except ImportError:  # the tests that need it say so
    pass
else:  # an example takes as long as the machine is busy, and that is no finding
    slow = [HealthCheck.too_slow]
    settings.register_profile("any machine", settings.default, deadline=None, suppress_health_check=slow)
    settings.load_profile("any machine")

torch.set_num_threads(1)
DEFAULT = draft_settings.ADAPTIVE


def pytest_configure(config: pytest.Config) -> None:
    """Compile the kernels before any test counts the lines that a command prints."""
    if not hasattr(config, "workerinput"):
        why_not_native()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of large data and models beside the repository."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip("needs the folder `shared` beside the repository (data and models too large for it)")
    return folder


@pytest.fixture(scope="session", autouse=True)
def unclocked() -> Iterator[None]:
    """Drafts of the full length, also in what modules prepare: by default a clock decides on CPUs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(draft_settings, "ADAPTIVE", "fixed")
        yield


@pytest.fixture(autouse=True)
def clocked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the clock decide where a test asks for it."""
    if "clocked" in request.keywords:
        monkeypatch.setattr(draft_settings, "ADAPTIVE", DEFAULT)
