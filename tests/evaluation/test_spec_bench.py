"""Spec-Bench's answer files: its own arithmetic over them gives the figures of the summary."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bench_data import QUESTIONS, benchmark, lines_of, question_file
from transformers import AutoTokenizer
from typer.testing import CliRunner

from cli_fixtures import Folders
from outdraft.cli import app
from outdraft.core.statistics import Statistics
from outdraft.errors import UserError
from outdraft.evaluation.bench import spec_bench
from outdraft.evaluation.bench.measure import PLAIN, Answer
from outdraft.evaluation.bench.questions import SPEC_BENCH
from outdraft.evaluation.bench.spec_bench import ALL, baseline_of, reread

MT = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")


def their_speed(file: Path, base: Path, tokenizer: Any, task: str) -> tuple[float, float]:
    """Mean accept length and speed-up by the rules of Spec-Bench's `speed.py`, written anew for this test."""

    def chosen(path: Path) -> list[dict[str, Any]]:
        everything = lines_of(path)
        if task == "overall":
            return everything
        return [line for line in everything if line["category"] in (MT if task == "mt_bench" else (task,))]

    rates, accepted, base_rates = [], [], []
    for line in chosen(file):
        first = line["choices"][0]
        rates.append(sum(first["new_tokens"]) / sum(first["wall_time"]))
        accepted += first["accept_lengths"]
    for line in chosen(base):
        first = line["choices"][0]
        counted = 0
        for text in first["turns"]:
            counted += len(tokenizer(text).input_ids) - 1
        base_rates.append(counted / sum(first["wall_time"]))
    return float(np.mean(accepted)), float(np.array(rates).mean() / np.array(base_rates).mean())


def test_files_summary_and_their_script_agree(folders: Folders, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = benchmark(folders, question_file(tmp_path), output_dir=out, peers=["prompt-lookup"])
    (comparison,) = result.comparisons
    tokenizer = AutoTokenizer.from_pretrained(folders.target)
    names = [PLAIN, "transformers prompt-lookup", "prompt-lookup", "fspad", "fspad+lookup"]
    assert [summary.name for summary in comparison.summaries] == names
    assert list(comparison.groups) == list(SPEC_BENCH)
    again = reread(out, folders.target).methods
    for group in (None, *SPEC_BENCH):
        task = {None: "overall", "multi-turn": "mt_bench"}.get(group, str(group))
        for summary in comparison.summaries if group is None else comparison.groups[group]:
            files = [out / "model_answer" / spec_bench.file_name(name) for name in (summary.name, PLAIN)]
            theirs = their_speed(files[0], files[1], tokenizer, task)
            assert summary.statistics.tau == pytest.approx(theirs[0], rel=1e-12)
            assert summary.spec_bench_speedup == pytest.approx(theirs[1], rel=1e-12)
            assert again[files[0].stem][group or ALL] == {
                "tau": pytest.approx(theirs[0], rel=1e-12),
                "speedup": pytest.approx(theirs[1], rel=1e-12),
            }
    drafted = comparison["fspad"]
    assert drafted.statistics.drafted > 0 and drafted.mean_rate_speedup != drafted.spec_bench_speedup


def test_the_format_is_theirs(folders: Folders, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = benchmark(folders, question_file(tmp_path), output_dir=out, repetitions=2, methods=["none", "fspad"])
    lines = lines_of(out / "model_answer" / "fspad.jsonl")
    assert [line["question_id"] for line in lines] == [record["question_id"] for record in QUESTIONS]
    runs = result.comparisons[0].runs["fspad"]
    for line, record in zip(lines, QUESTIONS, strict=True):
        assert list(line) == ["question_id", "category", "answer_id", "model_id", "choices", "tstamp"]
        assert line["category"] == record["category"] and line["model_id"] == "fspad"
        for index, choice in enumerate(line["choices"]):
            assert list(choice) == ["index", "turns", "decoding_steps", "new_tokens", "wall_time", "accept_lengths"]
            assert choice["index"] == index
            for name in ("turns", "decoding_steps", "new_tokens", "wall_time"):
                assert len(choice[name]) == len(record["turns"])
            assert len(choice["accept_lengths"]) == sum(choice["decoding_steps"])
            assert sum(choice["accept_lengths"]) == sum(choice["new_tokens"]) - len(record["turns"])
    assert len({line["answer_id"] for line in lines}) == len(lines)
    assert [run.tokens for run in runs[:2]] == [sum(choice["new_tokens"]) for choice in lines[0]["choices"]]


def test_several_temperatures_have_a_file_each(folders: Folders, tmp_path: Path) -> None:
    out = tmp_path / "out"
    settings: dict[str, Any] = {"temperatures": [0.0, 1.0], "methods": ["none"], "draft_models": [], "limit": 1}
    benchmark(folders, question_file(tmp_path), output_dir=out, **settings)
    found = sorted(file.name for file in (out / "model_answer").iterdir())
    assert found == ["plain-temp-0.jsonl", "plain-temp-1.jsonl"]


def test_answers_are_reread_on_the_command_line(folders: Folders, tmp_path: Path) -> None:
    out = tmp_path / "out"
    data = question_file(tmp_path)
    (first, second) = benchmark(
        folders, data, output_dir=out, temperatures=[0.0, 1.0], methods=["none", "fspad"]
    ).comparisons

    def again(*flags: object) -> Any:
        return CliRunner().invoke(app, ["bench", "--reread", str(out), "--model", folders.target, *map(str, flags)])

    found = json.loads(again("--json").stdout)["methods"]
    assert list(found) == ["plain-temp-0", "plain-temp-1", "fspad-temp-0", "fspad-temp-1"]
    for name, comparison in (("fspad-temp-0", first), ("fspad-temp-1", second)):
        assert list(found[name]) == [ALL, *SPEC_BENCH]
        assert found[name][ALL]["tau"] == pytest.approx(comparison["fspad"].statistics.tau, rel=1e-12)
        assert found[name][ALL]["speedup"] == pytest.approx(comparison["fspad"].spec_bench_speedup, rel=1e-12)
    assert "fspad-temp-1" in again().stdout

    assert again("--limit", 1).exit_code == 2, "settings of a measurement would be ignored"
    answers = out / "model_answer" / "fspad-temp-1.jsonl"
    answers.write_text("".join(answers.read_text().splitlines(keepends=True)[:-1]))
    refused = again()
    assert refused.exit_code == 2 and "different questions" in refused.stderr
    (out / "model_answer" / "plain-temp-1.jsonl").unlink()
    assert "no file of plain decoding for fspad-temp-1" in again().stderr
    assert CliRunner().invoke(app, ["bench", "--reread", str(tmp_path / "absent")]).exit_code == 2


def test_plain_decoding_is_found_by_its_name() -> None:
    theirs = ["vicuna-7b-v1.3-eagle-float16-temp-0.0", "vicuna-7b-v1.3-vanilla-float16-temp-0.0", "x-vanilla-temp-1"]
    assert baseline_of(theirs[0], theirs, Path()) == theirs[1]
    with pytest.raises(UserError, match="2 files"):
        baseline_of("fspad", ["fspad", "plain", "vanilla"], Path())


def test_accept_lengths_leave_out_what_lies_past_the_end() -> None:
    statistics = Statistics(rounds=3, emitted=6, lengths=[2, 0, 4])
    assert spec_bench.accept_lengths(Answer([1] * 7, 1.0, statistics)) == [3, 1, 2]
    assert spec_bench.accept_lengths(Answer([1], 1.0, Statistics())) == []


def test_files_that_are_no_answers(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        spec_bench.read(tmp_path / "absent.jsonl")
    (tmp_path / "x.jsonl").write_text('{"category": "qa", "choices": [{}]}\n')
    with pytest.raises(UserError, match=r"x\.jsonl:1"):
        spec_bench.read(tmp_path / "x.jsonl")
