"""Who is decoded next: requests in turn, a row of each at a time, as far as there is room in the cache.

A row's room is set aside for its whole length when it is admitted, so that no row ever has to be put out again. A
request of many rows lets others in between; a row that does not fit yet is waited for, so that small requests cannot
starve a large one. Knows numbers of slots; nothing of models, text or threads.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from outdraft.serving.jobs import Answer, Job


class Room:
    """Slots of the cache, in which rows stand side by side as wide as the longest of them.

    Args:
        slots: that all rows may take together.
        rows: at most.
    """

    def __init__(self, slots: int, rows: int):
        self.slots, self.rows = slots, rows

    def fits(self, taken: Sequence[int], new: int) -> bool:
        """Whether a row of `new` slots can join rows of these."""
        return len(taken) < self.rows and self.used([*taken, new]) <= self.slots

    @staticmethod
    def used(taken: Sequence[int]) -> int:
        """Slots that such rows take."""
        return len(taken) * max(taken, default=0)


class Waiting:
    """Jobs with rows that are not decoded yet."""

    def __init__(self) -> None:
        self._jobs: deque[tuple[Job, deque[Answer]]] = deque()

    def __len__(self) -> int:
        """Requests of which no row was admitted yet count, and those of which some still wait."""
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
        """That row was admitted: the next one is another request's, if one waits."""
        job, answers = self._jobs.popleft()
        answers.popleft()
        if answers:
            self._jobs.append((job, answers))

    def remove(self, job: Job) -> None:
        """Forget a job's rows that were not admitted."""
        self._jobs = deque(entry for entry in self._jobs if entry[0] is not job)

    def clear(self) -> list[Job]:
        """Forget all; the jobs that waited."""
        jobs = [job for job, _ in self._jobs]
        self._jobs.clear()
        return jobs
