"""A stopped audit goes on from its folder, and finds what it would have found at once; other audits are refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from cli_fixtures import Folders, make_folders, write_lines
from outdraft.api.generation import SpeculativeModel
from outdraft.cli import app

SAMPLED = ("--temperature", 1, "--controller", "fixed", "--prompt-lookup-min", 0)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return make_folders(tmp_path_factory.mktemp("resumed"))


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    records = [{"prompt": text} for text in ("one two", "three", "a cat and a dog", "red")]
    return write_lines(tmp_path_factory.mktemp("prompts") / "prompts.jsonl", *records)


def verify(folders: Folders, prompts: Path, *args: object) -> Result:
    small = ("--max-new-tokens", 8, "--dtype", "float32", "--total-variation", 0.25, "--json")
    both = ("--model", folders.target, "-d", folders.small_model, "--data", prompts)
    return CliRunner().invoke(app, [str(arg) for arg in ("verify", *both, *small, *args)])


def found(result: Result) -> dict[str, Any]:
    """What an audit found, without its seconds."""
    checks = json.loads(result.stdout)["checks"]
    for check in checks.values():
        check.pop("seconds")
        check.pop("drafting", None)
    return dict(checks)


def stopped_after(count: int, monkeypatch: pytest.MonkeyPatch, batch: int = 0) -> None:
    """Stop at the decoding past so many of at least `batch` prompts."""
    whole, left = SpeculativeModel.generate, [count]

    def generate(model: SpeculativeModel, prompts: Any, **settings: Any) -> Any:
        if len(prompts) >= batch and settings.get("max_new_tokens") in (3, 8) and settings["seed"] != 0:
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
        return whole(model, prompts, **settings)

    monkeypatch.setattr(SpeculativeModel, "generate", generate)


@pytest.fixture(scope="module")
def at_once(folders: Folders, prompts: Path) -> dict[str, Any]:
    result = verify(folders, prompts, *SAMPLED)
    assert result.exit_code == 0, result.output
    return found(result)


@pytest.fixture(scope="module")
def finished(folders: Folders, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "audit"
    assert verify(folders, prompts, *SAMPLED, "--output-dir", folder).exit_code == 0
    return folder


@pytest.mark.parametrize("count", [0, 1, 3, 7, 9, 12, 15])
def test_an_interrupted_audit_goes_on(
    folders: Folders,
    prompts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    at_once: dict[str, Any],
    count: int,
) -> None:
    there = (*SAMPLED, "--output-dir", tmp_path / "audit")
    with monkeypatch.context() as patch:
        stopped_after(count, patch)
        stopped = verify(folders, prompts, *there)
    assert stopped.exit_code == 130, stopped.output
    assert ("the same command goes on from there" in stopped.stderr) == (count > 0)
    with monkeypatch.context() as patch:
        stopped_after(1, patch)  # and stopped once more
        assert verify(folders, prompts, *there).exit_code == 130
    again = verify(folders, prompts, *there)
    assert again.exit_code == 0, again.output
    assert "is there already" in again.stderr and found(again) == at_once


def test_a_finished_audit_is_only_read_back(
    folders: Folders, prompts: Path, monkeypatch: pytest.MonkeyPatch, at_once: dict[str, Any], finished: Path
) -> None:
    stopped_after(0, monkeypatch)
    again = verify(folders, prompts, *SAMPLED, "--output-dir", finished)
    assert again.exit_code == 0, again.output
    assert "100% is there already" in again.stderr and "expected to take about 0 s" in again.stderr
    assert found(again) == at_once


def test_seconds_of_earlier_runs_count(folders: Folders, prompts: Path, finished: Path) -> None:
    again = json.loads(verify(folders, prompts, *SAMPLED, "--output-dir", finished).stdout)
    assert all(check["seconds"] > 0 for check in again["checks"].values())
    assert again["seconds"] > again["checks"]["beginnings"]["seconds"] + again["checks"]["seeded"]["seconds"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (("--temperature", 0.5), "generation"),
        (("--max-new-tokens", 9), "max_new_tokens 8 there, 9 here"),
        (("--seed", 1), "seed 0 there, 1 here"),
        (("--limit", 2), "prompts"),
        (("--dtype", "float64"), "dtype"),
        (("--quick",), "text_prompts 8 there, 3 here"),
        (("--backend", "eager"), "backend"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else None,
)
def test_other_settings_are_refused(
    folders: Folders, prompts: Path, finished: Path, change: tuple[object, ...], named: str
) -> None:
    refused(verify(folders, prompts, *SAMPLED, "--output-dir", finished, *change), named)


def refused(result: Result, named: str) -> None:
    assert result.exit_code == 2 and result.stdout == "", result.output
    (said,) = result.stderr.splitlines()
    assert named in said and "--output-dir" in said


def test_other_models_drafters_and_versions_are_refused(
    folders: Folders, prompts: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = (*SAMPLED, "--output-dir", finished)
    refused(verify(folders, prompts, *there, "-d", folders.target), "draft_model")
    refused(verify(folders, prompts, *there, "--model", folders.small_model), "model")
    weights = next(Path(folders.small_model).glob("*.safetensors"))
    before = weights.stat()
    try:
        os.utime(weights, (before.st_atime, before.st_mtime + 60))  # as after training again
        refused(verify(folders, prompts, *there), "draft_model_files")
    finally:
        os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    record = json.loads((finished / "settings.json").read_text())
    record["audit"]["versions"]["outdraft"] = "0.0.1"
    (tmp_path / "settings.json").write_text(json.dumps(record))
    refused(verify(folders, prompts, *SAMPLED, "--output-dir", tmp_path), '"outdraft": "0.0.1"')


def test_folders_that_cannot_be_used(folders: Folders, prompts: Path, finished: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    refused(verify(folders, prompts, *SAMPLED, "--output-dir", file), "cannot be used")
    bench = tmp_path / "bench"
    bench.mkdir()
    (bench / "settings.json").write_text('{"settings": {}, "sittings": []}')
    refused(verify(folders, prompts, *SAMPLED, "--output-dir", bench), "something else")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "settings.json").write_bytes((finished / "settings.json").read_bytes())
    (broken / "parts.pt").write_bytes((finished / "parts.pt").read_bytes()[:100])
    result = verify(folders, prompts, *SAMPLED, "--output-dir", broken)
    assert result.exit_code == 2 and len(result.stderr.splitlines()) == 1 and "remove it" in result.stderr
