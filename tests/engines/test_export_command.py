"""`outdraft export`: what it prints, and one line for a mistake."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from cli_fixtures import Folders, make_folders
from outdraft.cli import app


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return make_folders(tmp_path_factory.mktemp("export"))


def run(*args: object) -> Result:
    return CliRunner().invoke(app, ["export", *map(str, args)])


def test_the_engines_command_alone_is_on_stdout(folders: Folders, tmp_path: Path) -> None:
    done = run("--model", folders.target, "-d", folders.drafter, "-o", tmp_path / "out", "--num-speculative-tokens", 3)
    assert done.exit_code == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert line.startswith("vllm serve") and folders.target in line and '"num_speculative_tokens": 3' in line
    assert "plug-in" in done.stderr and (tmp_path / "out" / "model.safetensors").is_file()


def test_json_says_what_was_written(folders: Folders, tmp_path: Path) -> None:
    done = run("--model", folders.target, "-d", folders.eagle, "-o", tmp_path / "out", "--json")
    said = json.loads(done.stdout)
    assert (said["method"], said["architecture"]) == ("eagle", "EagleFcBiasLlamaForCausalLM")
    assert said["folder"] == str(tmp_path / "out") and said["plugin"] and said["difference"] < 1e-4


def test_a_mistake_is_one_line_and_exit_code_2(folders: Folders, tmp_path: Path) -> None:
    done = run("--model", folders.target, "-d", folders.wider, "-o", tmp_path / "out")
    assert done.exit_code == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()
