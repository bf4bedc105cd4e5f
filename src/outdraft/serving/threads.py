"""How many of the processor's threads the model gets. Knows the machine, nothing of models or the web."""

from __future__ import annotations

import os

import torch

SAID_BY = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
"""Variables by which a user has said it for the whole process."""


def threads_of(asked: int | None) -> int:
    """Those asked for, else what torch would take, less one core.

    Sockets, text and streams are another thread's work. On a core that the model computes on, too, every product waits
    for that: on two cores one client got 49 tokens a second with two threads, 110 with one.
    """
    if asked is not None:
        return asked
    usual = torch.get_num_threads()
    if any(name in os.environ for name in SAID_BY):
        return usual
    return max(1, min(usual, cores() - 1))


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
