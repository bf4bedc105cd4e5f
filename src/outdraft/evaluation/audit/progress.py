"""How far the whole audit has come: one bar on a terminal, a line for each check elsewhere.

Checks weigh as much as the seconds expected of them; what is left is told from the time that was really taken. Knows
nothing of what is checked.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from outdraft.training.progress import duration

Stage = Callable[[int], None]
"""Advances a check by so many steps."""

KNOWN = 0.05
"""Share of the work from which on the time that is left is told by the time it took."""


class Course:
    """The checks of an audit, one after the other.

    Args:
        console: where it is shown.
        expected: seconds of each check.
    """

    def __init__(self, console: Console, expected: Mapping[str, float]):
        self.console, self.expected = console, expected
        self.total = sum(expected.values()) or 1.0
        self.done, self.began = 0.0, time.perf_counter()
        self.title: str | None = None
        """The check that runs; stays that of an interrupted one."""

    @contextmanager
    def stage(self, title: str, steps: int) -> Iterator[Stage]:
        """Yields what advances the check."""
        self.title = title
        weight, advanced = self.expected.get(title, 0.0), 0
        if not self.console.is_terminal:
            self.console.print(f"{title} ... ({self.done / self.total:.0%} done)", style="dim", markup=False)
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.percentage:.0f}% of all, {task.fields[left]} left"),
        )
        with Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal) as bar:
            task = bar.add_task(title, total=self.total, left=self.left(self.done))
            bar.update(task, completed=self.done)

            def advance(count: int) -> None:
                nonlocal advanced
                advanced += count
                now = self.done + weight * min(1.0, advanced / max(1, steps))
                shown = f"{title} {advanced}/{steps}"
                bar.update(task, description=shown, completed=now, left=self.left(now))

            yield advance
        self.done += weight
        self.title = None

    def left(self, done: float) -> str:
        """How long the rest will take, after work that was expected to take so many seconds."""
        rest = max(0.0, self.total - done)
        if done > KNOWN * self.total:
            rest *= (time.perf_counter() - self.began) / done
        return f"about {duration(rest)}"
