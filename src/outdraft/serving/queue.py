"""The queue of requests: they take turns, a row of each at a time, as far as the cache has slots.

A row reserves the slots of its whole length when it is admitted, so that no row is ever preempted. A request of many
rows lets others in between; a row that does not fit yet blocks the queue, so that small requests cannot starve a large
one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from outdraft.serving.jobs import Answer, Job


class Capacity:
    """The cache's slots; every running row takes as many as the longest of them.

    Args:
        slots: slots that all rows may take together.
        rows: rows that may run at once.
    """

    def __init__(self, slots: int, rows: int):
        self.slots, self.rows = slots, rows

    def fits(self, taken: Sequence[int], new: int) -> bool:
        """Whether a row of `new` slots can join rows of these."""
        return len(taken) < self.rows and self.used([*taken, new]) <= self.slots

    @staticmethod
    def used(taken: Sequence[int]) -> int:
        """Slots that rows of these lengths take."""
        return len(taken) * max(taken, default=0)


class RequestQueue:
    """Jobs of which some rows are not admitted yet."""

    def __init__(self) -> None:
        self._jobs: deque[tuple[Job, deque[Answer]]] = deque()

    def __len__(self) -> int:
        return len(self._jobs)

    def add(self, job: Job) -> None:
        self._jobs.append((job, deque(job.answers)))

    def first(self) -> tuple[Job, Answer] | None:
        """The row whose turn it is."""
        if not self._jobs:
            return None
        job, answers = self._jobs[0]
        return job, answers[0]

    def pop(self) -> None:
        """Take that row out; the next one is another request's, if one waits."""
        job, answers = self._jobs.popleft()
        answers.popleft()
        if answers:
            self._jobs.append((job, answers))

    def remove(self, job: Job) -> None:
        """Take out a job's rows that were not admitted."""
        self._jobs = deque(entry for entry in self._jobs if entry[0] is not job)

    def clear(self) -> list[Job]:
        """Take out all rows; returns the jobs that waited."""
        jobs = [job for job, _ in self._jobs]
        self._jobs.clear()
        return jobs
