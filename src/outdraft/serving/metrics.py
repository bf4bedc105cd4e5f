"""Metrics for Prometheus; those of speculation have vLLM's names under our own prefix."""

from __future__ import annotations

import time
from collections import deque

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from outdraft.core.statistics import Statistics
from outdraft.serving.jobs import Delta, Job

WINDOW = 10.0
"""Seconds over which tokens per second are averaged."""

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


class Metrics:
    """All metrics of one server.

    Args:
        model: the model's name, which is every metric's label.
    """

    content_type = "text/plain; version=0.0.4; charset=utf-8"

    def __init__(self, model: str):
        self.registry = CollectorRegistry()
        self._model = model

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"outdraft:{name}", text, ("model_name", *labels), registry=self.registry)

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"outdraft:{name}", text, ("model_name",), registry=self.registry).labels(model)

        def histogram(name: str, text: str) -> Histogram:
            name, labels = f"outdraft:{name}", ("model_name",)
            return Histogram(name, text, labels, buckets=_SECONDS, registry=self.registry).labels(model)

        self._drafts = counter("spec_decode_num_drafts", "Rounds of a row that drafted something.").labels(model)
        self._drafted = counter("spec_decode_num_draft_tokens", "Candidates verified.").labels(model)
        self._accepted = counter("spec_decode_num_accepted_tokens", "Candidates accepted.").labels(model)
        self._accepted_at = counter(
            "spec_decode_num_accepted_tokens_per_pos", "Rounds that accepted a candidate at this depth.", "position"
        )
        self._rounds = counter("row_rounds", "Rounds, counted once for every row in them.").labels(model)
        self._prompt_tokens = counter("prompt_tokens", "Prompt tokens run.").labels(model)
        self._tokens = counter("generation_tokens", "Tokens decided.").labels(model)
        self._finished = counter("request_success", "Answers that ended, by why.", "finished_reason")
        self._failed = counter("request_failure", "Requests that ended without (all of) their answers.", "reason")
        self.running = gauge("num_requests_running", "Answers being decoded.")
        self.waiting = gauge("num_requests_waiting", "Requests of which something waits to be decoded.")
        self.cache_usage = gauge("kv_cache_usage_perc", "Share of the cache's slots that is set aside, 1 is all.")
        rate = gauge("generation_tokens_per_second", f"Tokens decided a second, over the last {WINDOW:.0f} seconds.")
        rate.set_function(self.tokens_per_second)
        self._first_token = histogram("time_to_first_token_seconds", "From a request's arrival to its first token.")
        self._whole = histogram("e2e_request_latency_seconds", "From a request's arrival to the end of its answers.")
        self._queue = histogram("request_queue_time_seconds", "From a request's arrival to its first row's admission.")
        self._recent: deque[tuple[float, int]] = deque()

    def text(self) -> bytes:
        """All metrics in the format that Prometheus reads."""
        return generate_latest(self.registry)

    def tokens_per_second(self) -> float:
        """Tokens decided a second, over the last `WINDOW` seconds."""
        now = time.perf_counter()
        recent = [count for when, count in list(self._recent) if now - when <= WINDOW]
        return sum(recent) / WINDOW

    def admitted(self, job: Job, prompt_tokens: int, first: bool) -> None:
        """A row of the job has left the queue."""
        self._prompt_tokens.inc(prompt_tokens)
        if first:
            self._queue.observe(time.perf_counter() - job.arrived)

    def grown(self, job: Job, delta: Delta, first: bool) -> None:
        now = time.perf_counter()
        self._tokens.inc(delta.tokens)
        self._recent.append((now, delta.tokens))
        while now - self._recent[0][0] > WINDOW:
            self._recent.popleft()
        if first:
            self._first_token.observe(now - job.arrived)
        if delta.finish_reason is not None:
            self._finished.labels(self._model, delta.finish_reason).inc()

    def ended(self, job: Job, reason: str | None = None) -> None:
        """A job has ended: with all its answers, or for the reason given."""
        if reason is None:
            self._whole.observe(time.perf_counter() - job.arrived)
        else:
            self._failed.labels(self._model, reason).inc()

    def decoded(self, statistics: Statistics) -> None:
        """A row has left, with these statistics of its rounds."""
        self._rounds.inc(statistics.rounds)
        self._drafts.inc(sum(depth > 0 for depth in statistics.depths))
        self._drafted.inc(statistics.drafted)
        self._accepted.inc(statistics.accepted)
        for position, accepted in enumerate(statistics.accepted_at):
            self._accepted_at.labels(self._model, str(position)).inc(accepted)
