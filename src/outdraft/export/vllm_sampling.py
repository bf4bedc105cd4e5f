"""The guard for vLLM's sampling on CPUs at temperature above 0 with any drafter.

In vLLM 0.32.0 `rejection_sampler.expand_batch_to_tokens` writes into a converted copy of its result and returns the
uninitialised original wherever that is not int64, as temperatures and top-p are not (vllm-project/vllm#55005). Samples
then follow a wrong distribution without any error. The guard replaces it by a function that does what the docstring of
vLLM's says.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

UP_TO = (0, 33, 0)
"""The first version that is not guarded. The defect was seen in 0.32.0; in a 0.32 that has mended it the guard changes
nothing, and what comes after has to be tested anew."""


def guard(version: tuple[int, int, int]) -> bool:
    """Replace vLLM's function by ours, on a CPU and in affected versions only.

    Args:
        version: version of vLLM.

    Returns:
        True if outdraft's function is in place now.
    """
    if version >= UP_TO or not import_module("vllm.platforms").current_platform.is_cpu():
        return False
    try:
        sampler: Any = import_module("vllm.v1.sample.rejection_sampler")
    except ImportError:  # a vLLM from before there was this module; it is not ours to end it
        return False
    sampler.expand_batch_to_tokens = expand_batch_to_tokens
    return True


def expand_batch_to_tokens(
    x: Tensor, cu_num_tokens: Tensor, num_tokens: int, replace_from: int = 0, replace_to: int = 0
) -> Tensor:
    """Repeat every row's value once for each of its tokens; arguments are named as vLLM's.

    Args:
        x: `(rows,)` values.
        cu_num_tokens: `(rows,)` how many tokens the rows up to and including this one have.
        num_tokens: total tokens of all rows.
        replace_from: a value that gives way
        replace_to: to this one.

    Returns:
        `(num_tokens,)`.
    """
    counts = torch.diff(cu_num_tokens, prepend=cu_num_tokens.new_zeros(1))
    values = torch.where(x == replace_from, torch.full_like(x, replace_to), x)
    return values.repeat_interleave(counts.long(), output_size=num_tokens)
