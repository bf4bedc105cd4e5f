"""A drafter outside the package is had by name once it is installed: lookahead decoding, in `benchmarks/`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import outdraft

SOURCE = Path(__file__).resolve().parents[2] / "benchmarks" / "lookahead"
PACKAGE = Path(outdraft.__file__).parents[1]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package as pip installs it, and nothing else."""
    root = tmp_path_factory.mktemp("lookahead")
    copy = shutil.copytree(SOURCE, root / "source", ignore=shutil.ignore_patterns("build", "*.egg-info", "__pycache__"))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*pip, "--target", root / "site", copy], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return root / "site"


def outdraft_with(place: Path | None, *args: object) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(map(str, filter(None, [PACKAGE, place])))
    command = [sys.executable, "-m", "outdraft.cli", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, "PYTHONPATH": path})


def said(place: Path, *args: object) -> Any:
    done = outdraft_with(place, *args, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_help_names_it_only_where_it_is_installed(place: Path) -> None:
    with_it, without = (outdraft_with(where, "generate", "--help").stdout for where in (place, None))
    assert "lookahead" in with_it and "lookahead" not in without


def test_generate_drafts_with_it(place: Path) -> None:
    common = ("generate", "Count: 1, 2, 1, 2, 1, 2,", "--max-new-tokens", 24, "--dtype", "float32")
    found, plain = (said(place, *common, "--method", name) for name in ("lookahead", "none"))
    assert found["method"] == "lookahead" and found["tokens"] == plain["tokens"]
    assert found["drafted"] > 0


def test_bench_measures_it(place: Path) -> None:
    small = ("--limit", 1, "--max-new-tokens", 16, "--repetitions", 1, "--temperatures", 0)
    found = said(place, "bench", "--model", "reference", "--methods", "none,lookahead", *small)
    (result,) = found["results"]
    assert list(result["methods"]) == ["plain", "lookahead"] and result["methods"]["lookahead"]["identical"] is True


def test_verify_vouches_for_it(place: Path) -> None:
    small = ("--limit", 2, "--max-new-tokens", 6, "--total-variation", 0.3, "--dtype", "float32")
    found = said(place, "verify", "--model", "reference", "--method", "lookahead", *small)
    assert found["kept"] is True
