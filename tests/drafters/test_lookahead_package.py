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
GENERATE = ("generate", "Count: 1, 2, 1, 2, 1, 2,", "--max-new-tokens", 24)
RUN = """
import json, sys
from typer.testing import CliRunner
from outdraft.cli import app
print(json.dumps([CliRunner().invoke(app, args, catch_exceptions=False).stdout for args in json.loads(sys.argv[1])]))
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package as pip installs it, and nothing else."""
    root = tmp_path_factory.mktemp("lookahead")
    copy = shutil.copytree(SOURCE, root / "source", ignore=shutil.ignore_patterns("build", "*.egg-info", "__pycache__"))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*pip, "--target", root / "site", copy], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return root / "site"


def python(place: Path | None, *args: str) -> str:
    """What a new process says that has outdraft on its path, and the package where one is given."""
    path = os.pathsep.join(map(str, filter(None, [PACKAGE, place])))
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run([sys.executable, *args], capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def said(place: Path) -> dict[str, Any]:
    """What the verbs say of it, from one process, for the time that it takes to import torch."""
    verbs = {
        "generate": (*GENERATE, "--method", "lookahead"),
        "plain": (*GENERATE, "--method", "none"),
        "bench": ("bench", "--model", "reference", "--methods", "none,lookahead", "--limit", 1, "--max-new-tokens", 16),
        "verify": ("verify", "--method", "lookahead", "--limit", 2, "--max-new-tokens", 6, "--total-variation", 0.3),
    }
    asked = [[*map(str, args), "--dtype", "float32", "--json"] for args in verbs.values()]
    answers = [json.loads(answer) for answer in json.loads(python(place, "-c", RUN, json.dumps(asked)))]
    return dict(zip(verbs, answers, strict=True))


def test_help_names_it_only_where_it_is_installed(place: Path) -> None:
    with_it, without = (python(where, "-m", "outdraft.cli", "generate", "--help") for where in (place, None))
    assert "lookahead" in with_it and "lookahead" not in without


def test_generate_drafts_with_it(said: dict[str, Any]) -> None:
    found = said["generate"]
    assert found["method"] == "lookahead" and found["tokens"] == said["plain"]["tokens"] and found["drafted"] > 0


def test_bench_measures_it(said: dict[str, Any]) -> None:
    (result,) = said["bench"]["results"]
    assert list(result["methods"]) == ["plain", "lookahead"] and result["methods"]["lookahead"]["identical"] is True


def test_verify_vouches_for_it(said: dict[str, Any]) -> None:
    assert said["verify"]["kept"] is True
