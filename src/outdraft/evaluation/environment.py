"""The facts of a machine that belong to a measurement: processor, threads, versions, precision, backend."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from outdraft.data.provenance import git_revision

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


def disturbed(loads: Iterable[Sequence[float] | None], cores: int) -> str | None:
    """Return a note where any of several load averages exceeds the cores."""
    busiest = max((load[0] for load in loads if load), default=0.0)
    if busiest <= cores + 0.5:
        return None
    return f"The machine was busy: a load average of {busiest:g} on {cores} cores. Timings are disturbed."


def busy(facts: dict[str, Any]) -> str | None:
    """Return the note of `disturbed` for a report's facts, with the final load and those of earlier sittings."""
    names = ("load_average", "load_average_at_the_end")
    loads = [of.get(name) for of in (facts, *(facts.get("sittings") or [])) for name in names]
    return disturbed(loads, facts.get("cores") or facts["threads"])


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that figures depend on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found


def cpu_name() -> str:
    """Return the processor's own name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
