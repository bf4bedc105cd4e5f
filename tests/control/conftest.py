"""The simulator is the benchmarks'; tests of controllers decode with it."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

spec = importlib.util.spec_from_file_location(
    "simulation", Path(__file__).resolve().parents[2] / "benchmarks" / "simulation.py"
)
assert spec is not None and spec.loader is not None
sys.modules["simulation"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["simulation"])
