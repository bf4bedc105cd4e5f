"""The progress of an audit: its checks one after the other, their finished parts, and the time that is left.

The time left follows from the forecast, but a check that runs is told of by its own speed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar, cast

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from outdraft.evaluation.audit.store import Store
from outdraft.training.progress import duration

T = TypeVar("T")

KNOWN = 0.05
"""The share of the work from which on the time left is estimated from the elapsed time."""

TENTHS = 10
LINE_SECONDS = 2.0
"""In a file a line appears for every tenth of a check, with so many seconds between two lines."""


class Course:
    """The progress of an audit's checks, one after the other, and the parts of them that are finished.

    Args:
        expected: every check's forecast in seconds, as if nothing were finished.
        store: finished parts of an earlier run, which count as done.
    """

    def __init__(self, console: Console, expected: Mapping[str, float], store: Store | None = None):
        self.console, self.store = console, Store() if store is None else store
        self.expected = dict(expected)
        self.seconds: dict[str, float] = {}
        """Every check's seconds so far, those of earlier runs included."""
        self.shares: dict[str, float] = {}
        """How much of every check is done."""
        self.store.collect("course", self)
        self.earlier = sum(self.seconds.values())
        self.began = time.perf_counter()
        self.title: str | None = None
        """The running check; after an interruption, the interrupted one."""

    def state(self) -> Any:
        return {"seconds": dict(self.seconds), "shares": dict(self.shares)}

    def restore(self, state: Any) -> None:
        self.seconds, self.shares = dict(state["seconds"]), dict(state["shares"])

    @contextmanager
    def stage(self, title: str, steps: int) -> Iterator[Stage]:
        """Show a bar, or lines, while a check runs."""
        self.title = title
        if not self.console.is_terminal:
            self.console.print(f"{title} ... ({self.done():.0%} done)", style="dim", markup=False)
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.percentage:.0f}% of all, {task.fields[left]} left"),
        )
        with Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal) as bar:
            stage = Stage(self, bar, title, max(1, steps))
            yield stage
        stage.finish()
        self.title = None

    def rest(self) -> float:
        """Estimate the seconds left: of the running check by its own speed, of later ones by the forecast, corrected by
        how it was met so far."""
        finished = sum(self.expected[title] for title in self.expected if self.shares.get(title) == 1)
        slower = 1.0
        if finished > KNOWN * sum(self.expected.values()):
            taken = sum(self.seconds.get(title, 0.0) for title in self.expected if self.shares.get(title) == 1)
            slower = taken / finished
        left = 0.0
        for title, forecast in self.expected.items():
            share, taken = self.shares.get(title, 0.0), self.seconds.get(title, 0.0)
            left += (1 - share) * (taken / share if share > 0 else forecast * slower)
        return left

    def done(self) -> float:
        """Estimate the share of the whole audit's seconds that has passed."""
        taken = sum(self.seconds.values())
        return taken / (taken + self.rest() or 1.0)


class Stage:
    """A check that runs: a function that advances it by a number of steps.

    Its parts are read back where an earlier run has finished them.
    """

    def __init__(self, course: Course, bar: Progress, title: str, steps: int):
        self.course, self.bar, self.title, self.steps = course, bar, title, steps
        self.advanced = round(course.shares.get(title, 0.0) * steps)
        self._before, self._began = course.seconds.get(title, 0.0), time.perf_counter()
        self._tenth, self._line = TENTHS * self.advanced // steps, self._began
        self._task = bar.add_task(title, total=1.0, left=self._left)
        self._show()

    def __call__(self, count: int) -> None:
        self.advanced = min(self.steps, self.advanced + count)
        self._note(self.advanced / self.steps)
        tenth, now = TENTHS * self.advanced // self.steps, time.perf_counter()
        console = self.course.console
        if console.is_terminal:
            self._show()
        elif self._tenth < tenth < TENTHS and now - self._line >= LINE_SECONDS:
            said = f"{self.title}: {self.advanced}/{self.steps} ({self.course.done():.0%} done, {self._left} left)"
            console.print(said, style="dim", markup=False)
            self._tenth, self._line = tenth, now

    def part(self, name: object, make: Callable[[], T], steps: int = 0) -> T:
        """Return what `make` returns, from the store if it was finished before.

        Args:
            name: tells the check's parts apart.
            steps: what it counts for.
        """
        key = f"{self.title}: {name}"
        store = self.course.store
        if key in store:
            return cast(T, store[key])
        made = make()
        self(steps)
        store.keep(key, made)
        return made

    def finish(self) -> None:
        self._note(1.0)

    def _note(self, share: float) -> None:
        self.course.shares[self.title] = share
        self.course.seconds[self.title] = self._before + time.perf_counter() - self._began

    @property
    def _left(self) -> str:
        return f"about {duration(self.course.rest())}"

    def _show(self) -> None:
        shown = f"{self.title} {self.advanced}/{self.steps}"
        self.bar.update(self._task, description=shown, completed=self.course.done(), left=self._left)
