"""A clock that reads the device's own marks where work is asynchronous, so that no mark waits for the device."""

from __future__ import annotations

import time
from itertools import pairwise
from typing import Any

import torch


class Clock:
    """The marks set during one round, and the seconds between them.

    Args:
        device: the device that does the work.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.marks: list[Any] = []

    def now(self) -> float:
        """Return the host's time in seconds, once all of the device's work is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def start(self) -> None:
        """Forget all marks and set the first."""
        self.marks = []
        self.mark()

    def mark(self) -> None:
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self.device))
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def laps(self, marks: list[Any] | None = None) -> list[float]:
        """Return the seconds between consecutive marks (default: since the start), once the last one is reached."""
        marks = self.marks if marks is None else marks
        pairs = list(pairwise(marks))
        if self.device.type == "cuda":
            marks[-1].synchronize()
            return [before.elapsed_time(after) / 1000 for before, after in pairs]
        return [after - before for before, after in pairs]
