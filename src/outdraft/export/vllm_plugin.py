"""vLLM's general plug-in (entry point group `vllm.general_plugins`): it registers the drafters that vLLM lacks, and
guards vLLM's sampling on CPUs.

vLLM calls `register` once or more in every process it starts, whatever it is about to serve. So it imports no drafter
network, and an untested version of vLLM is an error only where one of these drafters is loaded (`vllm_head.py`).

The guard is for sampling on CPUs at temperature above 0 with any drafter. In vLLM 0.32.0
`rejection_sampler.expand_batch_to_tokens` writes into a converted copy of its result and returns the uninitialised
original wherever that is not int64, as temperatures and top-p are not (vllm-project/vllm#55005). Samples then follow a
wrong distribution without any error. The guard replaces it by a function that does what the docstring of vLLM's says.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from outdraft.methods.fspad import EAGLE_WITH_BIAS, FSPAD

if TYPE_CHECKING:
    from torch import Tensor

TESTED = ((0, 32, 0), (0, 33, 0))
"""The tested versions of vLLM: from the first on, below the second."""


def register() -> None:
    """Register the architectures in vLLM and, on a CPU, mend its sampling; repeated calls are harmless."""
    registry: Any = import_module("vllm").ModelRegistry
    known = registry.get_supported_archs()
    for name in (FSPAD, EAGLE_WITH_BIAS):
        if name not in known:
            registry.register_model(name, "outdraft.export.vllm_head:FeatureHeadForCausalLM")
    guard(vllm_version())


def vllm_version() -> tuple[int, int, int]:
    """Return the version of the installed vLLM; (0, 0, 0) where it has none."""
    text = str(import_module("vllm").__version__)
    parts = text.split("+")[0].split(".")[:3]
    numbers = [int(digits) for part in parts if (digits := "".join(c for c in part if c.isdigit()))]
    return tuple(numbers) if len(numbers) == 3 else (0, 0, 0)  # type: ignore[return-value]


def require_tested(version: tuple[int, int, int]) -> None:
    """Raise ImportError with the fix where vLLM has an untested version."""
    first, end = TESTED
    if not first <= version < end:
        have, low, high = (".".join(map(str, numbers)) for numbers in (version, first, end))
        raise ImportError(
            f"outdraft's drafters for vLLM are tested with vLLM {low} up to, not including, {high}; this is {have}. "
            f"Install vllm=={low}, or an outdraft that knows this version"
        )


UP_TO = (0, 33, 0)
"""The first version that is not guarded. The defect was seen in 0.32.0; in a 0.32 that has mended it the guard changes
nothing, and what comes after has to be tested anew."""


def guard(version: tuple[int, int, int]) -> bool:
    """Replace vLLM's function by ours, on a CPU and in affected versions only.

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
    import torch

    counts = torch.diff(cu_num_tokens, prepend=cu_num_tokens.new_zeros(1))
    values = torch.where(x == replace_from, torch.full_like(x, replace_to), x)
    return values.repeat_interleave(counts.long(), output_size=num_tokens)
