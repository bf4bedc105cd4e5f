"""Progress of long runs, and the time they have left: a bar on a terminal, lines of text elsewhere.

`ProgressReport` shows training, `ReadingReport` the target's run over the data, `AnswerProgress` its answers.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from transformers import TrainerCallback

from outdraft.engine.rows import Row
from outdraft.training.held_out import CHAIN

SHOWN = {"loss": ".4f", "acc": ".3f", "tau": ".2f", "held_out_top1_1": ".3f", CHAIN: ".3f", "learning_rate": ".1e"}

BRIEF = ("loss", "acc", "tau")
"""The figures beside the bar: with all of them a terminal of 120 columns has no room for the time left."""

EVERY_SECONDS = 15.0
"""The time between two lines about reading."""

LINE_SECONDS = 30.0
BAR_SECONDS = 0.25
"""The time between two lines, or two updates of the bar, about answers."""

SETTLED_SECONDS = 5.0
SETTLED_TOKENS = 8
"""The age of a run, and the mean tokens of its unfinished answers, from which on its time left is shown: before, most
of the time went into prompts."""


def duration(seconds: float) -> str:
    """Format seconds: `75` as `1 min 15 s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _bar(console: Console, name: str, *columns: ProgressColumn) -> Progress:
    """Make a bar that is hidden where the console is no terminal."""
    return Progress(TextColumn(name), BarColumn(), *columns, console=console, disable=not console.is_terminal)


def _figures(known: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {known[name]:{form}}" for name, form in SHOWN.items() if name in known)


class ProgressReport(TrainerCallback):
    """The progress of training: a bar with loss, agreement and tau on a terminal, a line a log entry elsewhere."""

    def __init__(self, console: Console):
        self.console = console
        self._latest: dict[str, float] = {}
        kinds = (MofNCompleteColumn, TimeElapsedColumn, TimeRemainingColumn)
        columns = [kind(table_column=Column(no_wrap=True)) for kind in kinds]
        self._bar = _bar(console, "training", *columns, TextColumn("{task.description}"))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self._task = self._bar.add_task("", total=state.max_steps, completed=state.global_step)
            self._bar.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self._bar.update(self._task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or logs is None or not {"loss", "tau", CHAIN} & set(logs):
            return
        self._latest.update({name: logs[name] for name in SHOWN if name in logs})
        if self._bar.live.is_started:
            brief = {name: known for name, known in self._latest.items() if name in BRIEF}
            self._bar.update(self._task, description=_figures(brief))
        else:  # a line has what was measured at its step, nothing from an earlier one
            self.console.print(f"step {state.global_step}/{state.max_steps}  {_figures(logs)}", highlight=False)

    def close(self) -> None:
        self._bar.stop()


class ReadingReport:
    """The progress of the target's run over the data, with speed and time left; a context manager."""

    def __init__(self, console: Console, examples: int, tokens: int):
        self.console, self.examples, self.tokens = console, examples, tokens
        self._read = [0, 0]
        self._began = self._told = time.monotonic()
        self._bar = _bar(console, "reading the target", TextColumn("{task.description}"), TimeRemainingColumn())
        self._task = self._bar.add_task("", total=tokens)

    def __enter__(self) -> ReadingReport:
        self._bar.start()
        return self

    def __exit__(self, *problem: object) -> None:
        self._bar.stop()

    def __call__(self, examples: int, tokens: int) -> None:
        """Add examples and tokens that have been read."""
        self._read = [self._read[0] + examples, self._read[1] + tokens]
        now = time.monotonic()
        speed = self._read[1] / max(now - self._began, 1e-9)
        text = f"{self._read[0]:,} of {self.examples:,} examples, {speed:,.0f} tokens/s"
        self._bar.update(self._task, completed=self._read[1], description=text)
        if self._bar.disable and (now - self._told > EVERY_SECONDS or self._read[0] == self.examples):
            self._told = now
            left = (self.tokens - self._read[1]) / speed
            self.console.print(f"reading the target: {text}, {left:.0f} s left", highlight=False)


class AnswerProgress:
    """The progress of a run's answers, with speed, tau and time left; a context manager.

    Args:
        total: answers to write.
        longest: most tokens of an answer.
        drafting: True with a drafter, which has a tau.
    """

    def __init__(self, console: Console, total: int, longest: int, drafting: bool):
        self.console, self.total, self.longest, self.drafting = console, total, longest, drafting
        self.answers = self.finished = 0
        self._ended = self._tokens = self._rounds = self._emitted = 0  # of rows that have ended
        self._began = self._shown = time.perf_counter()
        self._running: Sequence[Row] = ()
        self._bar = _bar(console, "answering", TextColumn("{task.description}"))
        self._task = self._bar.add_task(self.line(), total=1.0)

    def __enter__(self) -> AnswerProgress:
        self._began = self._shown = time.perf_counter()
        self._bar.start()
        if not self.console.is_terminal:
            self.console.print(self.line(), markup=False)
        return self

    def __exit__(self, *problem: object) -> None:
        self._bar.stop()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._began

    @property
    def tokens(self) -> int:
        """The number of tokens generated so far."""
        return self._tokens + sum(len(row.tokens) for row in self._running)

    @property
    def tau(self) -> float | None:
        """The mean tokens of a row's round; None without a drafter."""
        rounds = self._rounds + sum(row.statistics.rounds for row in self._running)
        emitted = self._emitted + sum(row.statistics.emitted for row in self._running)
        return emitted / rounds if self.drafting and rounds else None

    def ended(self, row: Row) -> None:
        """Count a turn that has ended."""
        self._ended += 1
        self._tokens += len(row.tokens)
        self._rounds += row.statistics.rounds
        self._emitted += row.statistics.emitted

    def answered(self, finished: bool) -> None:
        self.answers += 1
        self.finished += finished

    def show(self, running: Sequence[Row]) -> None:
        """Show the state after a step, with the rows that are being decoded."""
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
        """Return a line of answers, speed, tau and the time left."""
        parts = [f"{self.answers}/{self.total} answers"]
        if self.tokens:
            settled = self._ended or self.tokens >= SETTLED_TOKENS * len(self._running)
            parts.append(f"{self.tokens / self.seconds:.0f} tokens/s" if settled else "reading prompts")
            if self.tau is not None:
                parts.append(f"tau {self.tau:.2f}")
            if settled and self.seconds >= SETTLED_SECONDS:
                parts.append(f"about {duration(self.left)} left")
        return " | ".join(parts)

    @property
    def left(self) -> float:
        """Estimate the seconds until all are answered, from the tokens generated so far."""
        to_come = (self.total - self._expected_done()) * self._length()
        return max(0.0, to_come) / (self.tokens / self.seconds)

    def _length(self) -> float:
        """Estimate the tokens of an answer; unfinished rows count with the tokens they have, as in rate estimates.

        The first answers to end are short: their mean alone would underestimate.
        """
        turns = max(1.0, self._ended / self.answers) if self.answers else 1.0
        return turns * min(self.longest, self.tokens / self._ended if self._ended else self.longest)

    def _expected_done(self) -> float:
        """Estimate the finished answers, where unfinished ones count in part."""
        length = self._length()
        return self.answers + sum(min(1.0, len(row.tokens) / length) for row in self._running)
