"""The benchmark scripts, loaded as modules in the way that running them does. Their tests train and measure tiny models
through them, and use the tools of the package's own tests (`pythonpath` in pyproject.toml)."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[1]
torch.set_num_threads(1)


def script(name: str) -> ModuleType:
    """The script `benchmarks/NAME.py` as a module."""
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    sys.path.insert(0, str(BENCHMARKS))  # as when it is run
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(BENCHMARKS))
    return module


@pytest.fixture(scope="session")
def ablation() -> ModuleType:
    return script("ablation")


@pytest.fixture(scope="session")
def recipes() -> ModuleType:
    return script("recipes")


@pytest.fixture(scope="session")
def scale() -> ModuleType:
    return script("scale")


@pytest.fixture(autouse=True, scope="session")
def unclocked() -> Iterator[None]:
    """Drafts of the full length, in studies that whole files share, too: by default a clock decides on CPUs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("outdraft.api.draft_settings.ADAPTIVE", "fixed")
        yield
