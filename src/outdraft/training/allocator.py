"""glibc's memory allocator, told to keep what is freed for the next tensors of the same size.

By itself it gives large blocks back to the system, so that every layer of every step has its pages mapped and cleared
anew; training and prefill on a CPU spend a tenth of their time or more on that.
"""

from __future__ import annotations

import ctypes
import sys

# Parameters of mallopt(3).
TRIM_THRESHOLD, TOP_PAD, MMAP_MAX = -1, -2, -4

KEPT_BYTES = 2**31 - 1
PAD_BYTES = 2**28


def keep_freed_memory() -> bool:
    """Keep freed blocks in this process from now on; whether the allocator could be told (Linux with glibc)."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    settings = ((MMAP_MAX, 0), (TRIM_THRESHOLD, KEPT_BYTES), (TOP_PAD, PAD_BYTES))
    told = [mallopt(parameter, value) == 1 for parameter, value in settings]
    return all(told)
