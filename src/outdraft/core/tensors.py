"""Small tensors that many forwards share (lengths on the device, ranges, plain attention masks), and the time there.

The tensors are made once and must only be read: a change would reach every user of them.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

LEAST = 64
"""Entries of the smallest table; larger tables double, so that few are ever made."""

READ_FREELY = ("cpu",)
"""Devices whose numbers the host reads without waiting for queued work."""


def read_freely(device: torch.device) -> bool:
    """Return True if the host reads this device's numbers without waiting for queued work."""
    return device.type in READ_FREELY


def current(device: torch.device) -> AbstractContextManager[Any]:
    """Make a GPU the current one, on which kernels of Triton run and graphs are captured; nothing for other devices."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def sent(numbers: Any, device: torch.device, dtype: torch.dtype = torch.long) -> Tensor:
    """Copy host numbers to a tensor on the device, without waiting for the device's queued work."""
    made = torch.tensor(numbers, dtype=dtype)
    return made if device.type == "cpu" else made.pin_memory().to(device, non_blocking=True)


def listed(parts: Sequence[Tensor]) -> list[list[list[int]]]:
    """Return the `(rows, n)` integers of every part as lists, in one transfer to the host."""
    rows, ends = torch.cat(list(parts), dim=1).tolist(), accumulate(part.shape[1] for part in parts)
    return [[row[end - part.shape[1] : end] for row in rows] for part, end in zip(parts, ends, strict=True)]


def integers(values: Sequence[int], device: torch.device) -> Tensor:
    """Return the `(count,)` integers on the device; cached, because rows' lengths are asked for many times a round."""
    return _integers(tuple(values), device)


def counting(first: int, count: int, device: torch.device) -> Tensor:
    """Return the `(count,)` range first, first + 1, ..."""
    return _counting(_size(first + count), device)[first : first + count]


def causal(rows: int, count: int, device: torch.device) -> Tensor:
    """Return the `(rows, count, count)` mask in which each token sees itself and those before it."""
    return _causal(_size(count), device)[:count, :count].expand(rows, -1, -1)


def itself(rows: int, count: int, device: torch.device) -> Tensor:
    """Return the `(rows, count, count)` mask in which each token sees only itself."""
    return _itself(_size(count), device)[:count, :count].expand(rows, -1, -1)


def chosen(x: Tensor, nodes: Tensor) -> Tensor:
    """Gather the entries of `(rows, n, width)` at `(rows, m)` node indices."""
    return x.gather(1, nodes[..., None].expand(-1, -1, x.shape[-1]))


def now(device: torch.device) -> float:
    """Return the host's time in seconds, once all of the device's work is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _size(count: int) -> int:
    return max(LEAST, 1 << (count - 1).bit_length())


# Made outside of inference mode, so that training may use what decoding made.


@lru_cache(maxsize=128)
@torch.inference_mode(False)
def _integers(values: tuple[int, ...], device: torch.device) -> Tensor:
    return sent(values, device)


@lru_cache
@torch.inference_mode(False)
def _counting(size: int, device: torch.device) -> Tensor:
    return torch.arange(size, device=device)


@lru_cache
@torch.inference_mode(False)
def _causal(size: int, device: torch.device) -> Tensor:
    return torch.ones(size, size, dtype=torch.bool, device=device).tril()


@lru_cache
@torch.inference_mode(False)
def _itself(size: int, device: torch.device) -> Tensor:
    return torch.eye(size, dtype=torch.bool, device=device)
