"""A small question file in Spec-Bench's form, and a benchmark over it with the tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cli_fixtures import Folders, write_lines
from outdraft.evaluation.bench.bench import run_bench
from outdraft.evaluation.bench.methods import BenchSettings
from outdraft.evaluation.bench.result import BenchResult
from outdraft.output import remarks

QUESTIONS: list[dict[str, Any]] = [
    {"question_id": 81, "category": "writing", "turns": ["one two", "again"]},
    {"question_id": 91, "category": "roleplay", "turns": ["be a cat", "be a dog"], "reference": ["x", "y"]},
    {"question_id": 161, "category": "translation", "turns": ["red green red green"]},
    {"question_id": 162, "category": "translation", "turns": ["sun moon"]},
    {"question_id": 241, "category": "summarization", "turns": ["cat cat cat dog"]},
    {"question_id": 321, "category": "qa", "turns": ["why?"], "reference": ["so"]},
    {"question_id": 401, "category": "math_reasoning", "turns": ["2+2"]},
    {"question_id": 481, "category": "rag", "turns": ["blue one blue two"]},
]


def question_file(folder: Path, *more: Any) -> Path:
    return write_lines(folder / "question.jsonl", *QUESTIONS, *more)


def settings_for(folders: Folders, data: Path, **changes: Any) -> BenchSettings:
    """A quick benchmark in float32."""
    chosen: dict[str, Any] = {
        "model": folders.target,
        "draft_models": [folders.drafter],
        "data": data,
        "max_new_tokens": 8,
        "dtype": "float32",
        **changes,
    }
    return BenchSettings(**chosen)


def benchmark(folders: Folders, data: Path, **changes: Any) -> BenchResult:
    return run_bench(settings_for(folders, data, **changes), remarks())


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
