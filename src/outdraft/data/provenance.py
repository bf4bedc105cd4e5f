"""The facts of a machine that belong to a measurement (processor, threads, versions, precision, backend), and the
record beside a trained drafter: settings, data, versions and cost.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Collection
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("outdraft", "torch", "transformers", "tokenizers", "safetensors", "numpy")


def environment(target: Any = None) -> dict[str, Any]:
    """Return facts for a report, with the target's device, precision and backend where one is given."""
    facts: dict[str, Any] = {
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "platform": platform.platform(),
        "cores": usable_cores(),
        "versions": versions(),
        "git_revision": git_revision(),
        "load_average": load_average(),
    }
    if target is not None:
        facts |= {
            "device": str(target.device),
            "dtype": str(target.dtype).removeprefix("torch."),
            "backend": target.backend,
        }
    return facts


def usable_cores() -> int | None:
    """Count the processor cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def load_average() -> list[float] | None:
    """Return the load averages of 1, 5 and 15 minutes; more than the cores means a disturbed timing."""
    try:
        return [round(load, 2) for load in os.getloadavg()]
    except (OSError, AttributeError):  # Windows has none
        return None


def busy(facts: dict[str, Any]) -> str | None:
    """Return a note where a load average of a report's facts, at the end or in earlier sittings, exceeds the cores."""
    names = ("load_average", "load_average_at_the_end")
    loads = [of.get(name) for of in (facts, *(facts.get("sittings") or [])) for name in names]
    busiest, cores = max((load[0] for load in loads if load), default=0.0), facts.get("cores") or facts["threads"]
    if busiest <= cores + 0.5:
        return None
    return f"The machine was busy: a load average of {busiest:g} on {cores} cores. Timings are disturbed."


def versions(*more: str) -> dict[str, str]:
    """Return the versions of Python, of the packages that figures depend on, and of `more` packages."""
    found = {"python": platform.python_version()}
    for name in (*PACKAGES, *more):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def provenance(**facts: Any) -> dict[str, Any]:
    """Make the record, a JSON-ready dictionary with `facts` added and paths as in `portable`."""
    record = {
        "argv": sys.argv,
        "versions": versions("accelerate"),
        "git_revision": git_revision(),
        "machine": {"platform": platform.platform(), "torch_threads": torch.get_num_threads()},
        **facts,
    }
    return portable(record)


def portable(record: Any, left_out: Collection[str] = ()) -> Any:
    """Make a record fit to be handed on: absolute paths, also in `key=value`, keep their last part alone.

    Args:
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
