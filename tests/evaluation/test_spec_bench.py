"""Spec-Bench's answer files: its own arithmetic over them gives the figures of the summary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bench_data import QUESTIONS, benchmark, lines_of, question_file
from transformers import AutoTokenizer

from cli_fixtures import Folders
from outdraft.errors import UserError
from outdraft.evaluation import spec_bench
from outdraft.evaluation.measure import PLAIN, Answer
from outdraft.evaluation.questions import SPEC_BENCH
from outdraft.statistics import Statistics

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
    names = [PLAIN, "transformers prompt-lookup", "prompt-lookup", "fspad"]
    assert [summary.name for summary in comparison.summaries] == names
    assert list(comparison.groups) == list(SPEC_BENCH)
    for group in (None, *SPEC_BENCH):
        task = {None: "overall", "multi-turn": "mt_bench"}.get(group, str(group))
        for summary in comparison.summaries if group is None else comparison.groups[group]:
            files = [out / "model_answer" / spec_bench.file_name(name) for name in (summary.name, PLAIN)]
            theirs = their_speed(files[0], files[1], tokenizer, task)
            again = spec_bench.reread(out, summary.name, PLAIN, tokenizer, group)
            assert summary.statistics.tau == pytest.approx(theirs[0], rel=1e-12)
            assert summary.spec_bench_speedup == pytest.approx(theirs[1], rel=1e-12)
            assert again == {
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
