"""vLLM's general plug-in (entry point group `vllm.general_plugins`): it registers the drafters that vLLM lacks.

vLLM calls `register` once or more in every process it starts, whatever it is about to serve. So it imports no drafter
network, and an untested version of vLLM is an error only where one of these drafters is loaded (`vllm_head.py`). The
guard against vLLM's defect on CPUs is in `vllm_sampling.py`.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from outdraft.methods.fspad import EAGLE_WITH_BIAS, FSPAD

TESTED = ((0, 32, 0), (0, 33, 0))
"""The tested versions of vLLM: from the first on, below the second."""


def register() -> None:
    """Register the architectures in vLLM and, on a CPU, mend its sampling; repeated calls are harmless."""
    registry: Any = import_module("vllm").ModelRegistry
    known = registry.get_supported_archs()
    for name in (FSPAD, EAGLE_WITH_BIAS):
        if name not in known:
            registry.register_model(name, "outdraft.export.vllm_head:FeatureHeadForCausalLM")
    from outdraft.export.vllm_sampling import guard

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
