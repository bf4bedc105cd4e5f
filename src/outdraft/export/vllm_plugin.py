"""vLLM's general plug-in (entry point group `vllm.general_plugins`): tells vLLM of the drafters it does not know.

vLLM calls `register` once or more in every process it starts, whatever it is about to serve. So no network is read
then, and an untested version of vLLM is complained of only where one of our drafters is loaded (`vllm_head.py`). The
guard against vLLM's defect on CPUs is in `vllm_sampling.py`.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from outdraft.methods.fspad import EAGLE_WITH_BIAS, FSPAD

TESTED = ((0, 32, 0), (0, 33, 0))
"""Versions of vLLM from the first on, below the second."""


def register() -> None:
    """Tell vLLM of our architectures and, on a CPU, mend its sampling; any number of times."""
    registry: Any = import_module("vllm").ModelRegistry
    known = registry.get_supported_archs()
    for name in (FSPAD, EAGLE_WITH_BIAS):
        if name not in known:
            registry.register_model(name, "outdraft.export.vllm_head:FeatureHeadForCausalLM")
    from outdraft.export.vllm_sampling import guard

    guard(vllm_version())


def vllm_version() -> tuple[int, int, int]:
    """Of the vLLM that is installed; (0, 0, 0) where it does not say."""
    text = str(import_module("vllm").__version__)
    parts = text.split("+")[0].split(".")[:3]
    numbers = [int(digits) for part in parts if (digits := "".join(c for c in part if c.isdigit()))]
    return tuple(numbers) if len(numbers) == 3 else (0, 0, 0)  # type: ignore[return-value]


def require_tested(version: tuple[int, int, int]) -> None:
    """Raise ImportError with what to do where vLLM is of a version that our classes were not tested with."""
    first, end = TESTED
    if not first <= version < end:
        have, low, high = (".".join(map(str, numbers)) for numbers in (version, first, end))
        raise ImportError(
            f"outdraft's drafters for vLLM are tested with vLLM {low} up to, not including, {high}; this is {have}. "
            f"Install vllm=={low}, or an outdraft that knows this version"
        )
