"""Old names work for one release, with a warning that says the new one."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator

import pytest

from outdraft.drafting.base import Drafter
from outdraft.moved import MOVED
from outdraft.target.runner import ModelRunner


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """A module warns when it is first imported."""
    yield
    for name in [name for name in sys.modules if name.removeprefix("outdraft.") in MOVED]:
        del sys.modules[name]


@pytest.mark.parametrize("old", MOVED)
def test_an_old_module_gives_the_new_one_s_names(old: str) -> None:
    if old.startswith("engines"):
        pytest.skip("read by vLLM's processes")
    held = dict(vars(importlib.import_module(f"outdraft.{MOVED[old]}")))
    with pytest.warns(FutureWarning, match=f"outdraft.{old} is outdraft.{MOVED[old]} now"):
        module = importlib.import_module(f"outdraft.{old}")
    assert all(getattr(module, name) is value for name, value in held.items() if not name.startswith("__"))


def test_renamed_classes_have_their_old_names_in_old_modules() -> None:
    with pytest.warns(FutureWarning):
        assert importlib.import_module("outdraft.run").TargetRun is ModelRunner


def test_a_drafter_s_old_flags_become_its_limits() -> None:
    with pytest.warns(FutureWarning, match=r"Rule: say probs, looks_back in `limits = Limits\(...\)`"):

        class Rule(Drafter):
            has_law = False
            looks_back = True

    assert not Rule.limits.probs and Rule.limits.looks_back and Rule.limits.stepwise and Drafter.limits.probs
