"""Seconds between marks, kept by the device where work is asynchronous, so that no mark waits for it."""

from __future__ import annotations

import time
from itertools import pairwise
from typing import Any

import torch


class Clock:
    """Marks in the course of a round, and the laps between them.

    Args:
        device: that the work is on.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.marks: list[Any] = []

    def now(self) -> float:
        """A time of the host's, once all work is done."""
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
        """Seconds from each mark to the next, of those set since the start or of earlier ones; waits for the last."""
        marks = self.marks if marks is None else marks
        pairs = list(pairwise(marks))
        if self.device.type == "cuda":
            marks[-1].synchronize()
            return [before.elapsed_time(after) / 1000 for before, after in pairs]
        return [after - before for before, after in pairs]
