"""What runs beside the training loop: the progress bar, the measurement of tau, an orderly end on Ctrl-C.

Knows the Trainer's callback interface and nothing of the loss or of files.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from transformers import TrainerCallback

from outdraft.methods.checkpoint import Network
from outdraft.training.held_out_loss import CHAIN, BestWeights

MeasureTau = Callable[[Network], dict[str, float]]
"""Decodes with the drafter as it is and returns what it measured, under `tau` the mean acceptance length."""

SAME_WISH_SECONDS = 1.0

EVERY_SECONDS = 15.0
"""Between lines where no bar can be shown."""

SHOWN = {"loss": ".4f", "acc": ".3f", "tau": ".2f", "held_out_top1_1": ".3f", CHAIN: ".3f", "learning_rate": ".1e"}


class ProgressReport(TrainerCallback):
    """A bar with loss, agreement and tau on a terminal; a line for every log entry elsewhere."""

    def __init__(self, console: Console):
        self.console = console
        self._latest: dict[str, float] = {}
        self._bar: Progress | None = None
        self._task = TaskID(0)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero and self.console.is_terminal:
            columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            self._bar = Progress(
                *columns, TimeRemainingColumn(), TextColumn("{task.description}"), console=self.console
            )
            self._task = self._bar.add_task("", total=state.max_steps, completed=state.global_step)
            self._bar.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or logs is None or not {"loss", "tau", CHAIN} & set(logs):
            return
        self._latest.update({name: logs[name] for name in SHOWN if name in logs})
        text = "  ".join(f"{name} {self._latest[name]:{form}}" for name, form in SHOWN.items() if name in self._latest)
        if self._bar is not None:
            self._bar.update(self._task, description=text)
        else:
            self.console.print(f"step {state.global_step}/{state.max_steps}  {text}", highlight=False)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


class ReadingReport:
    """How far the target has run over the data, with its speed and the time left: a bar on a terminal, a line every
    `EVERY_SECONDS` elsewhere.

    Args:
        console: where it goes.
        examples: to be read.
        tokens: of all of them.
    """

    def __init__(self, console: Console, examples: int, tokens: int):
        self.console, self.examples, self.tokens = console, examples, tokens
        self._read = [0, 0]
        self._began = self._told = time.monotonic()
        columns = (TextColumn("reading the target"), BarColumn(), TextColumn("{task.description}"))
        self._bar = Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal)
        self._task = self._bar.add_task("", total=tokens)

    def __enter__(self) -> ReadingReport:
        self._bar.start()
        return self

    def __exit__(self, *problem: object) -> None:
        self._bar.stop()

    def __call__(self, examples: int, tokens: int) -> None:
        """So many more are read."""
        self._read = [self._read[0] + examples, self._read[1] + tokens]
        now = time.monotonic()
        speed = self._read[1] / max(now - self._began, 1e-9)
        text = f"{self._read[0]:,} of {self.examples:,} examples, {speed:,.0f} tokens/s"
        self._bar.update(self._task, completed=self._read[1], description=text)
        if self._bar.disable and (now - self._told > EVERY_SECONDS or self._read[0] == self.examples):
            self._told = now
            left = (self.tokens - self._read[1]) / speed
            self.console.print(f"reading the target: {text}, {left:.0f} s left", highlight=False)


class TauMeter(TrainerCallback):
    """Measures what is held out every `every` steps, in the first process; the others wait.

    Args:
        measure: gives tau and what else is measured.
        drafter: in training.
        every: steps between measurements.
        best: keeps the weights that did best.
    """

    def __init__(self, measure: MeasureTau, drafter: Network, every: int, best: BestWeights):
        self.measure, self.drafter, self.every, self.best = measure, drafter, every, best
        self.log: Callable[[dict[str, float]], None] = lambda logs: None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.every == 0 and state.global_step < state.max_steps and args.should_save:
            found = measured(self.measure, self.drafter)
            due = control.should_log
            self.log(dict(found))
            control.should_log = due  # an entry of our own does not stand in for the step's
            if CHAIN in found and self.best.note(found[CHAIN], state.global_step) and args.world_size == 1:
                control.should_log = control.should_save = control.should_training_stop = True


def measured(measure: MeasureTau, drafter: Network) -> dict[str, float]:
    """What `measure` says of the drafter in evaluation mode, without gradients."""
    training = drafter.training
    drafter.eval()
    with torch.no_grad():
        found = measure(drafter)
    drafter.train(training)
    return found


class OrderlyStop(TrainerCallback):
    """Turns Ctrl-C or SIGTERM into: finish this step, save a checkpoint, stop. A second Ctrl-C stops at once.

    A context manager; outside the main thread, where signals cannot be caught, it does nothing.
    """

    def __init__(self) -> None:
        self.asked = False
        self._asked_at = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> OrderlyStop:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *problem: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        # A launcher forwards the Ctrl-C that the terminal has sent already: that is one wish, not two.
        if self.asked and number == signal.SIGINT and now - self._asked_at > SAME_WISH_SECONDS:
            raise KeyboardInterrupt
        if not self.asked:
            self.asked, self._asked_at = True, now

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.world_size > 1:  # all processes must stop at the same step
            flag = torch.tensor(int(self.asked), device=args.device)
            torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
            self.asked = bool(flag)
        if self.asked:
            control.should_save = control.should_training_stop = True
        if state.global_step >= state.max_steps:  # a short run's figures are those of its end
            control.should_log = True
