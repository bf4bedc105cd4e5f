"""A bar for every check on a terminal, a line for each elsewhere. Knows nothing of what is checked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Stage = Callable[[int], None]
"""Advances a check by so many steps."""


@contextmanager
def stage(console: Console, title: str, total: int) -> Iterator[Stage]:
    """Yields what advances the bar."""
    if not console.is_terminal:
        console.print(f"{title} ...", style="dim", markup=False)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=total)
        yield lambda steps: bar.advance(task, steps)
