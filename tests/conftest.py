"""What all tests share: one thread, and data that lies beside the repository where it is there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of large data and models beside the repository."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip("needs the folder `shared` beside the repository (data and models too large for it)")
    return folder


@pytest.fixture(autouse=True)
def unclocked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafts of the full length unless a test asks for a controller: by default a clock decides on CPUs."""
    if "clocked" not in request.keywords:
        monkeypatch.setattr("outdraft.api.draft_settings.ADAPTIVE", "fixed")
