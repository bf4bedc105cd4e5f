"""Engines of the processes that share one target (`--tp`): all of them make the same turns on the same rows.

The first process alone listens. At every turn it tells the others which requests it took in, which it cancelled, and
whether it goes on; all else in a turn follows from that. What a request leaves open, its seed, was drawn before.
"""

from __future__ import annotations

import queue
import signal
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from weakref import WeakValueDictionary

from transformers import PreTrainedTokenizerBase

from outdraft.api.guided import Grammar, Vocabulary
from outdraft.serving.engine import Engine
from outdraft.serving.jobs import GenerationParams, Job
from outdraft.target.ranks import said_by_first

HEARTBEAT = 60.0
"""Seconds without work after which the first process speaks nevertheless: process groups do not wait for ever."""


class FirstEngine(Engine):
    """The first process's engine."""

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
