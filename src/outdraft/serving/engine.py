"""The loop that decodes for all requests, in a thread of its own.

Each turn: take in what was submitted or cancelled, admit waiting rows as far as there is room, run one piece of a
newcomer's prompt, and one round of the rows that are running. So a long prompt delays a round by one piece only, and a
row whose client has gone is out before the next round. Rows with and without the drafter run in lanes of their own,
turn by turn. Knows jobs and rows; nothing of the web.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from outdraft.control.pacer import Pacer
from outdraft.core.coupling import chance_of
from outdraft.core.shape import TreeShape
from outdraft.drafting.base import Drafter
from outdraft.drafting.repeats import Repeats
from outdraft.engine.continuous import Decoder
from outdraft.engine.round import Row
from outdraft.serving.faults import Fault, broken, refused, stopping, undecodable
from outdraft.serving.jobs import CANCELLED, Answer, Failed, Job
from outdraft.serving.metrics import Metrics
from outdraft.serving.queueing import Room, Waiting
from outdraft.serving.settings import ServeSettings
from outdraft.serving.threads import threads_of
from outdraft.target.memory import cache_slots
from outdraft.target.target import Target

log = logging.getLogger("outdraft.serving")


@dataclass(frozen=True)
class Drafting:
    """How to draft: with what, and how far.

    Attributes:
        drafter: None decodes plainly.
        greedy: the tree while every running row is greedy, for `rows` of them.
        sampling: the tree as soon as one row draws, where rows throw dice for what is drafted; None where they share
            noise with the target (`coupling.py`), so that no text depends on what is drafted.
        pacer: makes a controller for every row; None drafts as far as the trees go.
        repeats: when what a row's text repeats is drafted in the drafter's place; None never.
    """

    drafter: Drafter | None
    greedy: Callable[[int], TreeShape]
    sampling: TreeShape | None
    pacer: Pacer | None = None
    repeats: Repeats | None = None

    @classmethod
    def none(cls) -> Drafting:
        """Plain decoding."""
        return cls(None, lambda rows: TreeShape(0, 1, 1), None)

    @property
    def largest(self) -> TreeShape:
        """The tree that takes more slots of the cache."""
        return max(self.greedy(1), self.sampling or self.greedy(1), key=self._slots)

    @property
    def slots(self) -> int:
        """Slots of the cache that a round takes at most, beside what was decided."""
        return self._slots(self.largest) + (0 if self.repeats is None else self.repeats.most)

    def _slots(self, shape: TreeShape) -> int:
        return shape.size if self.drafter is None else self.drafter.slots(shape)

    @property
    def levels(self) -> int:
        """That a draft can have."""
        return max(self.greedy(1).depth, (self.sampling or self.greedy(1)).depth) + 1


@dataclass
class _Active:
    """A row being decoded."""

    job: Job
    answer: Answer
    lane: _Lane
    slots: int


@dataclass
class _Lane:
    """Rows that share their rounds."""

    drafting: Drafting
    make: Callable[[], Decoder]
    decoder: Decoder = field(init=False)

    def __post_init__(self) -> None:
        self.decoder = self.make()


class Engine:
    """Decodes jobs until it is stopped.

    Args:
        target: the model.
        drafting: with the drafter, for jobs that do not decline it.
        settings: of the server.
        context_length: tokens that prompt and answer may have.
        metrics: told everything.

    Raises:
        UserError: the cache would hold nothing.
    """

    def __init__(
        self, target: Target, drafting: Drafting, settings: ServeSettings, context_length: int, metrics: Metrics
    ):
        self.target, self.settings, self.metrics, self.context_length = target, settings, metrics, context_length
        self.drafting = drafting
        slots = cache_slots(target, settings.max_num_seqs, context_length, drafting.slots, settings.kv_cache_tokens)
        self.room = Room(slots, settings.max_num_seqs)
        self._lanes = {True: self._lane(drafting), False: self._lane(Drafting.none())}
        self._waiting = Waiting()
        self._active: dict[int, _Active] = {}
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._deadline: float | None = None  # set once the server is going down
        self._gate = threading.Lock()  # nothing is submitted once the thread has looked for the last time
        self._threads = threads_of(settings.threads)
        self._thread = threading.Thread(target=self._run, name="outdraft-engine", daemon=True)

    # --- from any thread ---------------------------------------------------------------------------------------

    def start(self) -> None:
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether jobs that are submitted will be decoded."""
        return self._thread.is_alive() and self._deadline is None

    def submit(self, job: Job) -> None:
        """Decode it when its turn comes.

        Raises:
            Fault: there is no room for it, now or ever, or the server is going down.
        """
        longest = max(self._slots(answer, job) for answer in job.answers)
        if not self.room.fits([], longest):
            raise refused(
                f"the longest answer would take {longest} places in the cache, which has {self.room.slots}; "
                "shorten the prompt or max_tokens",
                "max_tokens",
                "context_length_exceeded",
            )
        if len(self._waiting) + self._commands.qsize() >= self.settings.max_waiting:
            raise Fault(429, "too many requests are waiting; try again later", None, "queue_full", {"Retry-After": "1"})
        with self._gate:
            if not self.alive:
                raise stopping()
            self._commands.put(lambda: self._waiting.add(job))

    def cancel(self, job: Job) -> None:
        """Its client has gone; its rows are free before the next round."""
        self._commands.put(lambda: self._drop(job))

    def drain(self, seconds: float) -> None:
        """Take no further jobs, give the present ones so long to finish, then end."""
        with self._gate:
            if self._deadline is None:
                self._deadline = time.perf_counter() + seconds
                self._commands.put(lambda: None)

    def join(self, seconds: float | None = None) -> None:
        """Wait for the end."""
        self._thread.join(seconds)

    # --- in the engine's thread --------------------------------------------------------------------------------

    def _lane(self, drafting: Drafting) -> _Lane:
        costs = drafting.pacer.costs if drafting.pacer is not None else None
        return _Lane(drafting, lambda: Decoder(self.target, drafting.drafter, drafting.largest, costs))

    def _run(self) -> None:
        torch.set_num_threads(self._threads)
        try:
            while self._obey():
                self._admit()
                for lane in self._lanes.values():
                    self._advance(lane)
                self._gauge()
        except BaseException:
            log.exception("the engine has ended")
            raise
        finally:
            with self._gate:
                self._deadline = self._deadline or time.perf_counter()
            self._obey_all()
            self._fail_all(stopping())

    def _obey(self) -> bool:
        """Take in what was asked for since the last turn, waiting for it if there is nothing else; False at the end."""
        self._obey_all()
        idle = not self._active and not len(self._waiting)
        if self._deadline is not None and (idle or time.perf_counter() >= self._deadline):
            return False
        if idle:
            self._gauge()
            self._commands.get()()
            self._obey_all()
        return True

    def _obey_all(self) -> None:
        while True:
            try:
                command = self._commands.get_nowait()
            except queue.Empty:
                return
            command()

    def _admit(self) -> None:
        """Rows whose turn it is, while there is room; those of short prompts come in together."""
        groups: dict[bool, list[Row]] = {True: [], False: []}
        while (first := self._waiting.first()) is not None:
            job, answer = first
            slots = self._slots(answer, job)
            if not self.room.fits([active.slots for active in self._active.values()], slots):
                break
            self._waiting.pop()
            lane = self._lanes[job.ask.speculative]
            answer.row.repeats = lane.drafting.repeats
            pacer, seed = lane.drafting.pacer, None if job.ask.seed is None else job.ask.seed + answer.index
            if lane.drafting.sampling is None:
                device, row = self.target.device, answer.row
                row.chance = chance_of(row.warper, self.target.vocab_size, device, seed, row.tokens)
            if pacer is not None:
                answer.row.controller = pacer.controller(lane.drafting.levels, seed)
            self._active[id(answer.row)] = _Active(job, answer, lane, slots)
            self.metrics.admitted(job, len(answer.row.prompt), answer.index == 0)
            group = groups[job.ask.speculative]
            longest = max(len(row.prompt) for row in (*group, answer.row))
            if group and (len(group) + 1) * longest > self.settings.prefill_chunk:
                self._add(lane, group)
                groups[job.ask.speculative] = group = []
            group.append(answer.row)
        for speculative, group in groups.items():
            self._add(self._lanes[speculative], group)

    def _add(self, lane: _Lane, group: Sequence[Row]) -> None:
        """These come in; if that fails, it is told to those whom it concerns."""
        try:
            if group:
                lane.decoder.add(group)
        except Exception:
            log.exception("rows cannot be taken in")
            for job in {id(active.job): active.job for row in group if (active := self._active.get(id(row)))}.values():
                self._fail(job, broken(), "error")

    def _advance(self, lane: _Lane) -> None:
        """A piece of a prompt and a round; what fails is told to those whom it concerns, and the others go on."""
        rows = [active.answer.row for active in self._active.values() if active.lane is lane]
        if not rows:
            return
        greedy = all(row.warper.greedy for row in rows)
        drawn = None if greedy else lane.drafting.sampling
        lane.decoder.shape = drawn or lane.drafting.greedy(len(rows))
        try:
            self._tell(lane.decoder.prefill(self.settings.prefill_chunk))
            self._tell(lane.decoder.round())
        except Exception:
            log.exception("decoding failed")
            jobs = {id(active.job): active.job for active in self._active.values() if active.lane is lane}
            lane.decoder = lane.make()
            for job in jobs.values():
                self._fail(job, broken(), "error")

    def _tell(self, rows: Sequence[Row]) -> None:
        """Events for the rows that gained something; those that ended leave."""
        for row in rows:
            active = self._active.get(id(row))
            if active is None:
                continue
            job, answer = active.job, active.answer
            first = not any(other.told for other in job.answers)
            try:
                news = answer.news()
            except Exception:  # its tokenizer fails on it: the others go on
                log.exception("an answer has no text")
                self._fail(job, broken(), "error")
                continue
            if row.error is not None:
                log.error("a request ends early: %s", row.error)
                self._fail(job, undecodable(row.error), "error")
                continue
            if news is None:
                continue
            self.metrics.gained(job, news, first)
            if news.finish_reason is not None:
                self._leave(active)
                job.left -= 1
                if not job.left:
                    self.metrics.ended(job)
            job.deliver(news)

    def _leave(self, active: _Active) -> None:
        del self._active[id(active.answer.row)]
        self.metrics.decoded(active.answer.row.statistics)

    def _drop(self, job: Job) -> None:
        """Take all rows of a job out."""
        if not job.left:
            return
        job.left = 0
        self._waiting.remove(job)
        for active in [active for active in self._active.values() if active.job is job]:
            active.lane.decoder.remove(active.answer.row, CANCELLED)
            self._leave(active)
        self.metrics.ended(job, CANCELLED)

    def _fail(self, job: Job, fault: Fault, reason: str) -> None:
        self._waiting.remove(job)
        for active in [active for active in self._active.values() if active.job is job]:
            active.lane.decoder.remove(active.answer.row, CANCELLED)
            self._leave(active)
        job.left = 0
        self.metrics.ended(job, reason)
        job.deliver(Failed(fault))

    def _fail_all(self, fault: Fault) -> None:
        jobs = {id(job): job for job in (*self._waiting.clear(), *(active.job for active in self._active.values()))}
        for job in jobs.values():
            self._fail(job, fault, "shutdown")
        self._gauge()

    def _slots(self, answer: Answer, job: Job) -> int:
        """Of the cache that a row takes at most."""
        tokens = min(len(answer.row.prompt) + answer.row.max_new_tokens, self.context_length)
        return tokens + self._lanes[job.ask.speculative].drafting.slots

    def _gauge(self) -> None:
        slots = [active.slots for active in self._active.values()]
        self.metrics.running.set(len(slots))
        self.metrics.waiting.set(len(self._waiting))
        self.metrics.cache_usage.set(self.room.used(slots) / self.room.slots)
