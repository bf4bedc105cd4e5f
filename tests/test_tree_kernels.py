"""The GPU's kernels run under Triton's interpreter, which needs no GPU.

Whether a kernel is interpreted is settled when it is made, so this takes a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from outdraft.target.backends.tree_attention import has_triton


def test_kernels_compute_what_plain_operations_compute() -> None:
    if not has_triton():
        pytest.skip("triton is not installed")
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-rs",
            "-p",
            "no:cacheprovider",
            "-o",
            "addopts=",
            "interpreted_kernels.py",
        ],
        cwd=Path(__file__).parent,
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    if " passed" not in done.stdout:
        pytest.skip(next(line for line in done.stdout.splitlines() if line.startswith("SKIPPED")))
