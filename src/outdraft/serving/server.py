"""The server: its parts put together around a loaded model, from listening to an orderly end."""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import queue
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
import uvicorn
from fastapi import FastAPI
from transformers import PreTrainedTokenizerBase

from outdraft.api.draft_settings import DraftSettings, Pacers, ResolvedDraft, resolve
from outdraft.api.generation import SpeculativeModel
from outdraft.api.guided import Grammar, Vocabulary
from outdraft.api.settings import model_settings, sampling_settings
from outdraft.data.provenance import usable_cores
from outdraft.errors import UserError, first_line
from outdraft.output import is_main_process
from outdraft.serving.app import make_app
from outdraft.serving.engine import Engine
from outdraft.serving.jobs import GenerationParams, Job
from outdraft.serving.lane import Drafting
from outdraft.serving.metrics import Metrics
from outdraft.serving.parse import RequestParser
from outdraft.serving.settings import ServeSettings
from outdraft.target.backends import is_native
from outdraft.target.ranks import said_by_first

log = logging.getLogger("outdraft.serving")

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
"""Environment variables by which a user sets the threads of the whole process."""

BACKSTOP = 5
"""Seconds beyond the engine's own deadline after which connections are cut."""

KEEP_ALIVE = 75
"""Seconds after which idle connections are closed: later than clients give theirs up (httpx and OpenAI's client after
5, as uvicorn would, load balancers after 60), or a request is sent on one that is just being closed, and is lost."""


def drafting(model: SpeculativeModel, settings: DraftSettings) -> Drafting:
    """How the server drafts.

    Raises:
        UserError: impossible settings, or `exact`, which a server cannot keep.
    """
    if settings.exact:
        raise UserError("exact=True is not for servers, where rows come and go; leave it out")
    if model.drafter is None:
        return Drafting.none()
    pacers: Pacers = {}

    @cache
    def resolved(rows: int, sampling: bool = False) -> ResolvedDraft:
        return resolve(
            settings, model.drafter, model.target.device, sampling=sampling, rows=rows, served=True, pacers=pacers
        )

    first = resolved(1)  # impossible settings are told now
    drawn = resolved(1, sampling=True).shape if first.dice else None
    return Drafting(model.drafter, lambda rows: resolved(rows).shape, drawn, first.pacer, first.ngrams)


def threads_of(asked: int | None, backend: str = "packed") -> int:
    """CPU threads for the model: those asked for, else what torch would take, on most backends less one core.

    Sockets, text and streams are another thread's work. On a core that the model computes on, too, every product of
    torch waits for that: on two cores one client got 49 tokens a second with two threads, 110 with one. Our own kernels
    take fewer threads for a while where others compute: there all cores gave 14% more to one client, 50% to sixteen.
    """
    if asked is not None:
        return asked
    usual = torch.get_num_threads()
    if any(name in os.environ for name in THREAD_VARIABLES):
        return usual
    cores = usable_cores() or 1
    return min(usual, cores) if is_native(backend) else max(1, min(usual, cores - 1))


# --- engines of processes that share one target (`--tp`): all make the same turns on the same rows --------------------

HEARTBEAT = 60.0
"""Seconds without work after which the first process speaks nevertheless: process groups do not wait for ever."""


class FirstEngine(Engine):
    """The engine of the process that listens.

    At every turn it tells the others which requests it took in, which it cancelled, and whether it goes on; all else in
    a turn follows from that. What a request leaves open, its seed, was drawn before.
    """

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self._told: list[tuple[str, GenerationParams | None, tuple[str, frozenset[int]] | None]] = []

    def _take_in(self, job: Job) -> None:
        grammar = job.params.grammar
        guide = None if grammar is None else (grammar.source, grammar.vocabulary.ends)
        self._told.append((job.id, replace(job.params, grammar=None, tools=None), guide))
        super()._take_in(job)

    def _cancel(self, job: Job) -> None:
        if job.left:
            self._told.append((job.id, None, None))
        super()._cancel(job)

    def _take_commands(self) -> bool:
        going = super()._take_commands()
        said_by_first((self._told, going))
        self._told = []
        return going

    def _next_command(self) -> Callable[[], None]:
        while True:
            try:
                return self._commands.get(timeout=HEARTBEAT)
            except queue.Empty:
                said_by_first(([], True))


class FollowingEngine(Engine):
    """The engine of another process, whose answers nobody reads."""

    def follow(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Make the first process's turns until its last one; signals are that process's to obey."""
        for sign in (signal.SIGINT, signal.SIGTERM):
            signal.signal(sign, signal.SIG_IGN)
        self._tokenizer = tokenizer
        self._jobs: WeakValueDictionary[str, Job] = WeakValueDictionary()
        self._run()

    def _take_commands(self) -> bool:
        said: Any = said_by_first(([], False))
        told, going = said
        for name, params, guide in told:
            if params is None:
                self._cancel(self._jobs[name])
                continue
            if guide is not None:
                source, ends = guide
                params = replace(params, grammar=Grammar(source, Vocabulary(self._tokenizer, ends, ends)))
            job = Job(params, self.target, self._tokenizer, lambda event: None, name)
            self._jobs[name] = job
            self._take_in(job)
        return bool(going)


class Service:
    """A model, its engine and the application over it."""

    def __init__(
        self,
        model: SpeculativeModel,
        settings: ServeSettings,
        draft: DraftSettings | None = None,
    ):
        if model.tokenizer is None:
            raise UserError("the model folder has no tokenizer, and a server answers with text; add one")
        given = {"temperature": 1.0, **model_settings(model.target), **settings.defaults}
        sampling_settings({**given, "do_sample": given["temperature"] != 0})
        self.temperature = given["temperature"]
        self.settings = settings
        self.names = settings.served_model_name or [
            Path(str(getattr(model.target.model.config, "_name_or_path", ""))).name or "model"
        ]
        self.metrics = Metrics(self.names[0])
        # Encoding may change a tokenizer's state, and the engine's thread decodes with the model's.
        parser = RequestParser(model.target, copy.deepcopy(model.tokenizer), self.names, settings)
        self._tokenizer = model.tokenizer
        kind: type[Engine] = Engine
        if model.target.shared:
            kind = FirstEngine if is_main_process() else FollowingEngine
        self.engine = kind(
            model.target,
            drafting(model, draft or DraftSettings()),
            settings,
            parser.context_length,
            self.metrics,
            threads_of(settings.threads, model.target.backend),
        )
        self.app: FastAPI = make_app(self.engine, parser, model.tokenizer, settings, self.metrics)

    def serve(self, listening: socket.socket | None, ready: Callable[[str], None] = lambda url: None) -> None:
        """Answer until told to stop (SIGINT, SIGTERM, or `stop`).

        Args:
            listening: from `listen`; not read in a process that follows the first one of those that share the target.
            ready: told the address once requests are taken.
        """
        if isinstance(self.engine, FollowingEngine):
            self.engine.follow(self._tokenizer)
            return
        assert listening is not None
        host = f"[{self.settings.host}]" if ":" in self.settings.host else self.settings.host
        url = f"http://{host}:{listening.getsockname()[1]}"
        config = uvicorn.Config(
            self.app,
            log_level=logging.WARNING,
            access_log=False,
            lifespan="off",
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE,
            timeout_graceful_shutdown=int(self.settings.shutdown_timeout) + BACKSTOP,
        )
        self.server = _Server(config, self.engine, self.settings.shutdown_timeout, lambda: ready(url))
        self.engine.start()
        try:
            self.server.run(sockets=[listening])
        finally:
            self.engine.drain(0)
            self.engine.join(BACKSTOP)

    def stop(self) -> None:
        """Finish what runs, then end; may be called from any thread."""
        self.server.should_exit = True


class _Server(uvicorn.Server):
    """Uvicorn, which on its way down lets the engine finish."""

    def __init__(self, config: uvicorn.Config, engine: Engine, seconds: float, ready: Callable[[], None]):
        super().__init__(config)
        self._engine, self._seconds, self._ready = engine, seconds, ready

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Do not raise the signal again at the end, as uvicorn does: a server that was told to stop has succeeded."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {sign: signal.signal(sign, self.handle_exit) for sign in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for sign, handler in before.items():
                signal.signal(sign, handler)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        log.warning("shutting down: running requests have %g seconds to finish", self._seconds)
        self._engine.drain(self._seconds)
        await super().shutdown(sockets)


def listen(host: str, port: int) -> socket.socket:
    """A socket bound to the address, so that a mistake in it is found before anything is loaded onto it."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        bound = socket.create_server((host, port), family=family, backlog=256)
    except OSError as error:
        reason = error.strerror or first_line(error)
        raise UserError(f"cannot listen on {host}:{port} ({reason}); choose another --port or --host") from error
    return bound
