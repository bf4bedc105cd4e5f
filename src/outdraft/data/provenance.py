"""The provenance record beside a trained drafter: settings, data, versions and cost."""

from __future__ import annotations

import platform
import subprocess
import sys
from collections.abc import Collection
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("outdraft", "torch", "transformers", "accelerate", "safetensors", "tokenizers")


def provenance(**facts: Any) -> dict[str, Any]:
    """Make the record, a JSON-ready dictionary with `facts` added and paths as in `portable`."""
    record = {
        "argv": sys.argv,
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "git_revision": git_revision(),
        "machine": {"platform": platform.platform(), "torch_threads": torch.get_num_threads()},
        **facts,
    }
    return portable(record)


def portable(record: Any, left_out: Collection[str] = ()) -> Any:
    """Make a record fit to be handed on: absolute paths, also in `key=value`, keep their last part alone.

    Args:
        record: any value of JSON.
        left_out: keys that are dropped with their values.
    """
    if isinstance(record, dict):
        return {key: portable(value, left_out) for key, value in record.items() if key not in left_out}
    if isinstance(record, list | tuple):
        return [portable(value, left_out) for value in record]
    if not isinstance(record, str):
        return record
    key, given, value = record.partition("=")  # an override or a flag with its value, or a plain word
    path = value if given and key.lstrip("-").replace("-", "_").isidentifier() else record
    local = Path(path).is_absolute() or path.startswith(("~", ".venv/"))
    return record.removesuffix(path) + Path(path).name if local else record


def git_revision() -> str | None:
    """Return the commit of the source tree this package runs from; None for an installed package."""
    folder = Path(__file__).resolve().parent
    command = ["git", "-C", str(folder), "rev-parse", "HEAD"]
    try:
        tracked = subprocess.run(
            ["git", "-C", str(folder), "ls-files", "--error-unmatch", __file__], capture_output=True, timeout=10
        )
        if tracked.returncode:  # an environment inside somebody else's repository
            return None
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def peak_memory_bytes(device: torch.device) -> int:
    """Return the peak bytes of the GPU's allocator, or resident on a CPU; 0 where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
