"""A server on a free port with a tiny random model in float64, whose drafter is often right; the same model offline."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
import torch

from models import perturbed
from outdraft.api.draft_settings import DraftSettings
from outdraft.api.generation import SpeculativeModel
from outdraft.methods.draft_model.drafter import DraftModel
from outdraft.serving.server import Service, listen
from outdraft.serving.settings import ServeSettings
from outdraft.target.target import Target
from training.tiny import tiny_target

NAME = "tiny"

PATIENCE = 300
"""Seconds after which what a test waits for will not come, on a machine that is slow and busy."""


def until(true: Callable[[], Any], otherwise: str = "waited in vain") -> None:
    """Wait for what another thread does."""
    end = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < end, otherwise
        time.sleep(0.01)


@dataclass
class Served:
    """A running server."""

    url: str
    service: Service
    model: SpeculativeModel
    thread: threading.Thread

    @property
    def engine(self) -> Any:
        return self.service.engine

    def client(self, **settings: Any) -> Any:
        return httpx.Client(base_url=self.url, timeout=None, **settings)

    @contextmanager
    def held(self) -> Iterator[None]:
        """The model computes nothing as long as this lasts; the engine stands in the first forward that is due."""
        free, forward = threading.Event(), self.engine.target.forward

        def wait(*given: Any) -> Any:
            free.wait()
            return forward(*given)

        self.engine.target.forward = wait
        try:
            yield
        finally:
            self.engine.target.forward = forward
            free.set()

    def stop(self) -> None:
        self.service.stop()
        self.thread.join(PATIENCE)
        assert not self.thread.is_alive(), "the server ends when it is told to"

    def figure(self, name: str) -> float:
        """Of `/metrics`, added up over labels."""
        lines = self.service.metrics.text().decode().splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith((f"outdraft:{name}{{",)))


def tiny_model() -> SpeculativeModel:
    target = tiny_target(torch.float64)
    near = perturbed(target.model, lambda: tiny_target(torch.float64).model, 0.05)  # type: ignore[arg-type, return-value]
    return SpeculativeModel(target, DraftModel(Target(near), target))


def start(model: SpeculativeModel, **settings: Any) -> Served:
    settings = {"served_model_name": [NAME], "shutdown_timeout": PATIENCE / 2, **settings}
    draft = DraftSettings(**settings.pop("tree", {}), controller=settings.pop("controller", "fixed"))
    service = Service(model, ServeSettings(host="127.0.0.1", port=0, **settings), draft)
    listening = listen("127.0.0.1", 0)
    ready = threading.Event()
    thread = threading.Thread(target=service.serve, args=(listening, lambda url: ready.set()), daemon=True)
    thread.start()
    assert ready.wait(PATIENCE), "the server starts"
    return Served(f"http://127.0.0.1:{listening.getsockname()[1]}", service, model, thread)


@pytest.fixture
def starting() -> Iterator[Callable[..., Served]]:
    """Starts servers of one test's own."""
    running: list[Served] = []

    def begin(**settings: Any) -> Served:
        running.append(start(settings.pop("model", None) or tiny_model(), **settings))
        return running[-1]

    yield begin
    for served in running:
        if served.thread.is_alive():
            served.stop()


@pytest.fixture(scope="session")
def served() -> Iterator[Served]:
    """One for all tests that leave it as it is."""
    running = start(tiny_model())
    yield running
    running.stop()
