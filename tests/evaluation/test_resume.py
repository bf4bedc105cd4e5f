"""An interrupted benchmark goes on where it stopped; only complete pairs count; other settings are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from bench_data import benchmark, lines_of, question_file

from cli_fixtures import Folders
from outdraft.core.statistics import Statistics
from outdraft.errors import UserError
from outdraft.evaluation.bench import bench
from outdraft.evaluation.bench.bench import Store
from outdraft.evaluation.bench.measure import Answer, Contender, compare
from outdraft.evaluation.bench.result import BenchResult


def texts(result: BenchResult) -> dict[str, list[list[list[int]]]]:
    (comparison,) = result.comparisons
    return {name: [[answer.tokens for answer in run.answers] for run in runs] for name, runs in comparison.runs.items()}


def interrupted_after(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every decoding past so many of them is stopped by the user; the warm-up counts."""
    whole = bench.contenders
    left = [count]

    def patched(*args: Any, **settings: Any) -> list[Contender]:
        def stopping(contender: Contender) -> Contender:
            def decode(prompt: list[int], settings: dict[str, Any]) -> Answer:
                left[0] -= 1
                if left[0] < 0:
                    raise KeyboardInterrupt
                return contender.decode(prompt, settings)

            return Contender(contender.name, decode, contender.method, contender.parameters)

        return [stopping(contender) for contender in whole(*args, **settings)]

    monkeypatch.setattr(bench, "contenders", patched)


def test_an_interrupted_benchmark_goes_on(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = question_file(tmp_path), tmp_path / "out"
    expected = texts(benchmark(folders, data))
    with monkeypatch.context() as patch:
        interrupted_after(4 + 4 * 2 + 4 * 2 + 5, patch)  # warm-up, two conversations of two turns, one question, a bit
        with pytest.raises(KeyboardInterrupt):
            benchmark(folders, data, output_dir=out)
    assert "3 of 8 pairs kept" in capsys.readouterr().err
    kept = (out / "runs.jsonl").read_text()
    assert [line["question"] for line in lines_of(out / "runs.jsonl")] == [0, 1, 2]
    named = {"plain", "prompt-lookup", "fspad", "fspad+lookup"}
    assert all(set(line["answers"]) == named for line in lines_of(out / "runs.jsonl"))

    with (out / "runs.jsonl").open("a") as file:
        file.write('{"temperature": 0.0, "quest')  # as a loss of power leaves it
    again = benchmark(folders, data, output_dir=out)
    assert "3 of 8 pairs are there already" in capsys.readouterr().err
    assert texts(again) == expected
    assert (out / "runs.jsonl").read_text().startswith(kept) and len(lines_of(out / "runs.jsonl")) == 8
    assert len(again.environment["sittings"]) == 2

    with monkeypatch.context() as patch:
        interrupted_after(0, patch)
        third = benchmark(folders, data, output_dir=out)
    figures = [repr(result.as_dict()["results"]) for result in (again, third)]
    assert figures[0] == figures[1], "nothing is measured anew, and the figures are the same to the last digit"
    assert len(third.environment["sittings"]) == 2


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"max_new_tokens": 9}, "max_new_tokens 8 there, 9 here"),
        ({"seed": 1}, "seed"),
        ({"limit": 1}, "questions"),
        ({"temperatures": [1.0]}, "temperatures"),
        ({"dtype": "float64"}, "dtype"),
        ({"peers": ["generate"]}, "contenders"),
        ({"tree": {"tree_depth": 2}}, "tree_depth"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_other_settings_are_refused(
    folders: Folders, tmp_path: Path, measured_once: Path, change: dict[str, Any], named: str
) -> None:
    with pytest.raises(UserError, match="other settings") as refusal:
        benchmark(folders, question_file(tmp_path), output_dir=measured_once, **change)
    assert named in str(refusal.value) and "another --output-dir" in str(refusal.value)


@pytest.fixture(scope="module")
def measured_once(folders: Folders, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("once")
    benchmark(folders, question_file(folder), output_dir=folder / "out")
    return folder / "out"


def test_other_data_and_models_are_refused(folders: Folders, tmp_path: Path, measured_once: Path) -> None:
    with pytest.raises(UserError, match="data"):
        more = {"question_id": 9, "category": "qa", "turns": ["and?"]}
        benchmark(folders, question_file(tmp_path, more), output_dir=measured_once)
    with pytest.raises(UserError, match=r"model_files|contenders"):
        benchmark(folders, question_file(tmp_path), output_dir=measured_once, draft_models=[folders.eagle])


def test_folders_that_are_no_benchmark(tmp_path: Path) -> None:
    (tmp_path / "settings.json").write_text("[]")
    with pytest.raises(UserError, match="not of a benchmark"):
        Store(tmp_path, {}, {})
    (tmp_path / "settings.json").unlink()
    (tmp_path / "runs.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match=r"no settings\.json"):
        Store(tmp_path, {}, {})
    (tmp_path / "settings.json").write_text(json.dumps({"settings": {}, "sittings": []}))
    with pytest.raises(UserError, match=r"runs\.jsonl:1"):
        Store(tmp_path, {}, {})


def test_pairs_that_are_known_are_not_measured_and_the_order_of_turns_stays() -> None:
    order: list[tuple[str, int]] = []

    def contender(name: str) -> Contender:
        def decode(prompt: list[int], settings: dict[str, Any]) -> Answer:
            order.append((name, prompt[0]))
            return Answer([1], 1.0, Statistics())

        return Contender(name, decode, "none")

    rivals, prompts = [contender(name) for name in "ab"], [[0], [1], [2]]
    whole = compare(rivals, prompts)
    expected = order[2:]
    known = {(0, 0): {name: runs[0] for name, runs in whole.items()}}
    order.clear()
    done: list[tuple[int, int]] = []
    again = compare(
        rivals, prompts, known=known, completed=lambda place, repetition, pair: done.append((place, repetition))
    )
    assert order[2:] == expected[2:] and done == [(1, 0), (2, 0)]
    assert again["a"][0] is whole["a"][0] and [run.prompt for run in again["b"]] == [0, 1, 2]
    order.clear()
    everything = {(place, 0): {name: runs[place] for name, runs in whole.items()} for place in range(3)}
    compare(rivals, prompts, known=everything)
    assert not order, "not even a warm-up"


def test_the_backend_is_the_one_that_forwards_ran_on(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = bench.environment
    with monkeypatch.context() as patch:  # as before a graph that cannot be made is given up
        patch.setattr(bench, "environment", lambda target: {**facts(target), "backend": "compiled"})
        result = benchmark(folders, question_file(tmp_path), output_dir=tmp_path / "out")
    assert result.environment["backend"] in ("packed", "eager")
    assert result.environment["sittings"][-1]["backend"] == result.environment["backend"]
