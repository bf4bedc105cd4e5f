"""The limits of a model: the context of its positions and its layers' windows, by its configuration, and of its cache,
by the measured size of a token and the free memory.

`trial.py` tests what a family makes of its configuration.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch

from outdraft.errors import UserError
from outdraft.target.runner import ModelRunner

if TYPE_CHECKING:
    from outdraft.target.target import Target


def context_of(config: Any) -> int:
    """Return the largest number of tokens of a text, by the shortest of the layers' kinds."""
    names = ("max_position_embeddings", "n_positions", "max_seq_len")
    written = next((int(found) for name in names if (found := getattr(config, name, None))), 1 << 30)
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = rope.values() if all(isinstance(one, dict) for one in rope.values()) else [rope]
    return min((_reach(one, config, written) for one in kinds), default=written)


def windows_of(config: Any) -> dict[str, int | None]:
    """Return the sliding window of each kind of layer; models with several kinds take a dictionary of masks."""
    window = getattr(config, "sliding_window", None)
    if not getattr(config, "use_sliding_window", True):
        window = None
    kinds = getattr(config, "layer_types", None)
    if kinds:
        return {kind: window if kind == "sliding_attention" else None for kind in dict.fromkeys(kinds)}
    return {"full_attention": window}


def _reach(rope: dict[str, Any], config: Any, written: int) -> int:
    """Return the tokens that rotations reach over, for one kind of layers; `written` is the configuration's own limit.

    Extended rotations reach `factor` times as far as the original ones. Some configurations contain the product, others
    the original length alone, which the larger of the two tells apart.
    """
    kind, factor = rope.get("rope_type", "default"), float(rope.get("factor") or 1.0)
    original = rope.get("original_max_position_embeddings")
    if kind == "longrope":
        # Past this a forward rotates all of its positions by other frequencies, so a tree that crosses it would
        # change what its root sees.
        return int(original or config.original_max_position_embeddings)
    if kind == "llama3" and original and written > original:
        # Its factor stretches frequencies, however far positions reach: 32 x 8,192 for the 131,072 of Llama 3.2.
        return written
    if kind in ("yarn", "llama3", "linear"):
        return max(written, int(factor * (original or written)))
    # `dynamic`, too: past it stock decoding rotates every token by frequencies of the length at that moment, and keeps
    # those of earlier, longer texts. So its texts depend on where the prompt ended, on the batch and on earlier calls,
    # and a forward over a tree, whose nodes have one length, gives none of them.
    return written


SHARE = 0.4
"""Share of the free memory for the cache; growing buffers are copied, and forwards need memory, too."""


@torch.inference_mode()
def slot_bytes(target: Target) -> int:
    """Measure the bytes of the target's cache that a token takes, whatever the family's layers look like."""
    cache = target.new_cache(1, 8)
    ModelRunner(target, cache).prefill([torch.zeros(1, dtype=torch.long)])
    return max(1, cache.nbytes // (cache.room * cache.capacity))


def free_bytes(device: torch.device) -> int:
    """Return the unused memory of the device or of this machine, in bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            available = next(line for line in file if line.startswith("MemAvailable"))
        free = int(available.split()[1]) * 1024
    except (OSError, StopIteration, ValueError):
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    return min(free, _group_bytes() or free)


def _group_bytes() -> int | None:
    """Return the bytes that this process's control group may still take, None if it is unbounded."""
    try:
        with open("/sys/fs/cgroup/memory.max", encoding="ascii") as most:
            limit = most.read().strip()
        with open("/sys/fs/cgroup/memory.current", encoding="ascii") as now:
            return None if limit == "max" else max(0, int(limit) - int(now.read()))
    except (OSError, ValueError):
        return None


def cache_slots(target: Target, rows: int, context_length: int, extra: int, asked: int | None = None) -> int:
    """Return the number of cache slots for all rows together.

    Args:
        rows: largest number of rows decoded at once.
        context_length: largest number of tokens per row.
        extra: slots per row that a round needs beside its tokens.
        asked: a given number of slots, whatever memory is free.

    Raises:
        UserError: not even one row fits.
    """
    row = context_length + extra
    if asked is not None:
        return asked
    share = SHARE if target.pool is None else SHARE / 2  # pooled buffers are rounded up in rows and in slots
    slots = int(share * free_bytes(target.device)) // slot_bytes(target)
    if slots < min(row, 256):
        raise UserError(
            f"the free memory holds a cache of {slots} tokens only; free some, or set --kv-cache-tokens yourself"
        )
    return min(slots, rows * row)
