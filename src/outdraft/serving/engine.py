"""The engine: one thread that decodes for all requests.

Each turn of its loop takes in what was submitted or cancelled, admits waiting rows as far as the cache has room, runs
one chunk of an admitted row's prompt, and one round of the running rows. So a long prompt delays a round by one chunk
only, and a row whose client has gone is out before the next round. Rows with and without the drafter run in lanes of
their own, turn by turn.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from outdraft.core.coupling import chance_of
from outdraft.engine.rows import Row
from outdraft.serving.errors import ApiError, bad_request, internal_error, not_decodable, shutting_down
from outdraft.serving.jobs import CANCELLED, Answer, Failed, Job
from outdraft.serving.lane import Drafting, Lane
from outdraft.serving.metrics import Metrics
from outdraft.serving.queue import Capacity, RequestQueue
from outdraft.serving.settings import ServeSettings
from outdraft.target.limits import cache_slots
from outdraft.target.ranks import said_by_first
from outdraft.target.target import Target

log = logging.getLogger("outdraft.serving")


@dataclass
class _Running:
    """A row being decoded."""

    job: Job
    answer: Answer
    lane: Lane
    slots: int


class Engine:
    """Decodes jobs until it is stopped.

    Args:
        drafting: how to draft for jobs that do not decline the drafter.
        context_length: tokens that prompt and answer may have.
        threads: CPU threads that the model computes with.
    """

    def __init__(
        self,
        target: Target,
        drafting: Drafting,
        settings: ServeSettings,
        context_length: int,
        metrics: Metrics,
        threads: int,
    ):
        self.target, self.settings, self.metrics, self.context_length = target, settings, metrics, context_length
        self.drafting = drafting
        slots = cache_slots(target, settings.max_num_seqs, context_length, drafting.slots, settings.kv_cache_tokens)
        self.capacity = Capacity(said_by_first(slots) if target.shared else slots, settings.max_num_seqs)
        self._lanes = {True: Lane(target, drafting), False: Lane(target, Drafting.none())}
        self._queue = RequestQueue()
        self._running: dict[int, _Running] = {}  # by their rows' ids
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._deadline: float | None = None  # set once the server is going down
        self._gate = threading.Lock()  # nothing is submitted once the thread has looked for the last time
        self._threads = threads
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
            ApiError: the cache or the queue has no room for it, or the server is going down.
        """
        longest = max(self._slots(answer, job) for answer in job.answers)
        if not self.capacity.fits([], longest):
            raise bad_request(
                f"the longest answer would take {longest} places in the cache, which has {self.capacity.slots}; "
                "shorten the prompt or max_tokens",
                "max_tokens",
                "context_length_exceeded",
            )
        if len(self._queue) + self._commands.qsize() >= self.settings.max_waiting:
            message = "too many requests are waiting; try again later"
            raise ApiError(429, message, None, "queue_full", {"Retry-After": "1"})
        with self._gate:
            if not self.alive:
                raise shutting_down()
            self._commands.put(lambda: self._take_in(job))

    def cancel(self, job: Job) -> None:
        """Free its rows before the next round, as its client has gone; nothing is done to a job that has ended."""
        self._commands.put(lambda: self._cancel(job))

    def drain(self, seconds: float) -> None:
        """Take no further jobs, give the present ones so long to finish, then end."""
        with self._gate:
            if self._deadline is None:
                self._deadline = time.perf_counter() + seconds
                self._commands.put(lambda: None)

    def join(self, seconds: float | None = None) -> None:
        self._thread.join(seconds)

    # --- in the engine's thread --------------------------------------------------------------------------------

    def _run(self) -> None:
        torch.set_num_threads(self._threads)
        try:
            while self._take_commands():
                self._admit()
                for lane in self._lanes.values():
                    self._step(lane)
                self._gauge()
        except BaseException:
            log.exception("the engine has ended")
            raise
        finally:
            with self._gate:
                self._deadline = self._deadline or time.perf_counter()
            self._take_ready_commands()
            jobs = [*self._queue.clear(), *(one.job for one in self._running.values())]
            self._fail(jobs, shutting_down(), "shutdown")
            self._gauge()

    def _take_commands(self) -> bool:
        """Do what was asked for since the last turn, waiting while there is nothing to decode; False at the end."""
        while True:
            self._take_ready_commands()
            idle = not self._running and not len(self._queue)
            if self._deadline is not None and (idle or time.perf_counter() >= self._deadline):
                return False
            if not idle:
                return True
            self._gauge()
            self._next_command()()

    def _next_command(self) -> Callable[[], None]:
        return self._commands.get()

    def _take_in(self, job: Job) -> None:
        self._queue.add(job)

    def _cancel(self, job: Job) -> None:
        if job.left:
            self._end(job, CANCELLED)

    def _take_ready_commands(self) -> None:
        while not self._commands.empty():  # no other thread takes any
            self._commands.get()()

    def _admit(self) -> None:
        """Admit rows in turn while there is room; short prompts are run together."""
        groups: dict[bool, list[Row]] = {True: [], False: []}
        while (first := self._queue.first()) is not None:
            job, answer = first
            slots = self._slots(answer, job)
            if not self.capacity.fits([one.slots for one in self._running.values()], slots):
                break
            self._queue.pop()
            lane = self._lanes[job.params.speculative]
            answer.row.ngrams = lane.drafting.ngrams
            pacer, seed = lane.drafting.pacer, None if job.params.seed is None else job.params.seed + answer.index
            if lane.drafting.sampling is None:
                device, row = self.target.device, answer.row
                row.chance = chance_of(row.warper, self.target.vocab_size, device, seed, row.tokens)
            if pacer is not None:
                answer.row.controller = pacer.controller(lane.drafting.levels, seed)
            self._running[id(answer.row)] = _Running(job, answer, lane, slots)
            self.metrics.admitted(job, len(answer.row.prompt), answer.index == 0)
            group = groups[job.params.speculative]
            longest = max(len(row.prompt) for row in (*group, answer.row))
            if group and (len(group) + 1) * longest > self.settings.prefill_chunk:
                self._add(lane, group)
                groups[job.params.speculative] = group = []
            group.append(answer.row)
        for speculative, group in groups.items():
            self._add(self._lanes[speculative], group)

    def _add(self, lane: Lane, group: Sequence[Row]) -> None:
        """Give the rows to their lane; if that fails, their jobs fail."""
        try:
            if group:
                lane.decoder.add(group)
        except Exception:
            log.exception("rows cannot be taken in")
            self._fail([one.job for row in group if (one := self._running.get(id(row)))], internal_error())

    def _step(self, lane: Lane) -> None:
        """A chunk of a prompt and a round.

        An error in new rows' prompts concerns these alone. If a round of the running rows fails, all jobs of the lane
        fail and the other lane goes on: half of a round cannot be taken back, as dice were thrown in it.
        """
        rows = [one.answer.row for one in self._running.values() if one.lane is lane]
        if not rows:
            return
        greedy = all(row.warper.greedy for row in rows)
        drawn = None if greedy else lane.drafting.sampling
        lane.decoder.shape = drawn or lane.drafting.greedy(len(rows))
        newcomers = lane.decoder.newcomers
        try:
            self._publish(lane.decoder.prefill(self.settings.prefill_chunk))
        except Exception:
            if not newcomers or [*map(id, newcomers)] != [*map(id, lane.decoder.newcomers)]:  # joining failed
                self._fail_lane(lane)
                return
            log.exception("prompts cannot be run")
            lane.decoder.withdraw()
            self._try_alone(lane, newcomers)
        try:
            self._publish(lane.decoder.round())
        except Exception:
            self._fail_lane(lane)

    def _fail_lane(self, lane: Lane) -> None:
        """End all jobs of a lane with the error that is being handled."""
        log.exception("decoding failed")
        jobs = [one.job for one in self._running.values() if one.lane is lane]
        lane.reset()
        self._fail(jobs, internal_error())

    def _try_alone(self, lane: Lane, rows: Sequence[Row]) -> None:
        """Run the prompts of rows one by one, after an error in all together; those of one row have failed alone."""
        running = [one for row in rows if (one := self._running.get(id(row)))]
        if len(running) == 1 or any(one.answer.row.tokens for one in running):
            self._fail([one.job for one in running], internal_error())
            return
        for one in running:
            one.answer.prompt_logprobs.clear()
            self._add(lane, [one.answer.row])

    def _publish(self, rows: Sequence[Row]) -> None:
        """Deliver what the rows gained, and take out those that ended."""
        for row in rows:
            running = self._running.get(id(row))
            if running is None:
                continue
            job, answer = running.job, running.answer
            first = not any(other.sent_tokens for other in job.answers)
            try:
                delta = answer.delta()
            except Exception:  # its tokenizer fails on it: the others go on
                log.exception("an answer has no text")
                self._fail([job], internal_error())
                continue
            if row.error is not None:
                log.error("a request ends early: %s", row.error)
                self._fail([job], not_decodable(row.error))
                continue
            if delta is None:
                continue
            self.metrics.grown(job, delta, first)
            if delta.finish_reason is not None:
                self._leave(running)
                job.left -= 1
                if not job.left:
                    self._ended(job)
            job.deliver(delta)

    def _leave(self, running: _Running) -> None:
        del self._running[id(running.answer.row)]
        self.metrics.decoded(running.answer.row.statistics)

    def _end(self, job: Job, reason: str) -> None:
        """Take all rows of a job out before they have ended."""
        job.left = 0
        self._queue.remove(job)
        for running in [one for one in self._running.values() if one.job is job]:
            running.lane.decoder.remove(running.answer.row, CANCELLED)
            self._leave(running)
        self._ended(job, reason)

    def _ended(self, job: Job, reason: str | None = None) -> None:
        """Count and log the end of a job: with all its answers, or for the reason given."""
        self.metrics.ended(job, reason)
        if self.settings.log_requests:
            log.info(job.summary(reason))

    def _fail(self, jobs: Sequence[Job], error: ApiError, reason: str = "error") -> None:
        """End these jobs, each once, and tell their clients why."""
        for job in {id(job): job for job in jobs}.values():
            self._end(job, reason)
            job.deliver(Failed(error))

    def _slots(self, answer: Answer, job: Job) -> int:
        """Slots of the cache that a row takes at most."""
        tokens = min(len(answer.row.prompt) + answer.row.max_new_tokens, self.context_length)
        return tokens + self._lanes[job.params.speculative].drafting.slots

    def _gauge(self) -> None:
        slots = [one.slots for one in self._running.values()]
        self.metrics.running.set(len(slots))
        self.metrics.waiting.set(len(self._queue))
        self.metrics.cache_usage.set(self.capacity.used(slots) / self.capacity.slots)
