"""How far a run of answers is: a bar on a terminal, a line every half minute elsewhere. Decides nothing."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from outdraft.engine.rows import Row
from outdraft.training.plan import duration

LINE_SECONDS = 30.0
BAR_SECONDS = 0.25
SETTLED_SECONDS = 5.0
"""From when on the time left is worth telling."""


class AnswerProgress:
    """Counts of a run, and how they are shown; a context manager.

    Args:
        console: where to.
        total: answers to write.
        longest: tokens of an answer at most.
        drafting: whether there is a tau.
    """

    def __init__(self, console: Console, total: int, longest: int, drafting: bool):
        self.console, self.total, self.longest, self.drafting = console, total, longest, drafting
        self.answers = self.finished = 0
        self._ended = self._tokens = self._rounds = self._emitted = 0  # of rows that have ended
        self._began = self._shown = time.perf_counter()
        self._running: Sequence[Row] = ()
        columns = (TextColumn("answering"), BarColumn(), TextColumn("{task.description}"))
        self._bar = Progress(*columns, console=console, refresh_per_second=4, disable=not console.is_terminal)
        self._task = self._bar.add_task(self.line(), total=1.0)

    def __enter__(self) -> AnswerProgress:
        self._began = self._shown = time.perf_counter()
        self._bar.start()
        if not self.console.is_terminal:
            self.console.print(self.line(), markup=False)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._began

    @property
    def tokens(self) -> int:
        """Generated so far."""
        return self._tokens + sum(len(row.tokens) for row in self._running)

    @property
    def tau(self) -> float | None:
        """Tokens a round of a row, if there is a drafter."""
        rounds = self._rounds + sum(row.statistics.rounds for row in self._running)
        emitted = self._emitted + sum(row.statistics.emitted for row in self._running)
        return emitted / rounds if self.drafting and rounds else None

    def ended(self, row: Row) -> None:
        """A turn is over."""
        self._ended += 1
        self._tokens += len(row.tokens)
        self._rounds += row.statistics.rounds
        self._emitted += row.statistics.emitted

    def answered(self, finished: bool) -> None:
        """All turns of a conversation are."""
        self.answers += 1
        self.finished += finished

    def show(self, running: Sequence[Row]) -> None:
        """After every step, with the rows that are being decoded."""
        self._running = running
        now = time.perf_counter()
        terminal = self.console.is_terminal
        if now - self._shown < (BAR_SECONDS if terminal else LINE_SECONDS):
            return
        self._shown = now
        if terminal:
            done = self._expected_done()
            self._bar.update(self._task, description=self.line(), completed=done / max(done, self.total))
        else:
            self.console.print(self.line(), markup=False)

    def line(self) -> str:
        """Answers, speed, tau and the time left."""
        parts = [f"{self.answers}/{self.total} answers"]
        if self.tokens:
            parts.append(f"{self.tokens / self.seconds:.0f} tokens/s")
            if self.tau is not None:
                parts.append(f"tau {self.tau:.2f}")
            if self.seconds >= SETTLED_SECONDS:
                parts.append(f"about {duration(self.left)} left")
        return " | ".join(parts)

    @property
    def left(self) -> float:
        """Seconds until all are answered, judged by what was generated."""
        to_come = (self.total - self._expected_done()) * self._length()
        return max(0.0, to_come) / (self.tokens / self.seconds)

    def _length(self) -> float:
        """Tokens of an answer to be expected; rows that are not over count with what they have, as rates do.

        The first ones to end are short: their mean alone would promise too much.
        """
        turns = max(1.0, self._ended / self.answers) if self.answers else 1.0
        return turns * min(self.longest, self.tokens / self._ended if self._ended else self.longest)

    def _expected_done(self) -> float:
        """Answers, those begun counted in part."""
        length = self._length()
        return self.answers + sum(min(1.0, len(row.tokens) / length) for row in self._running)
