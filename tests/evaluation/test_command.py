"""`outdraft bench` on the command line: its flags arrive, its result is complete."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench_data import question_file
from torch import nn
from typer.testing import CliRunner

from cli_fixtures import Folders
from outdraft.cli import app
from outdraft.evaluation.bench import baselines
from outdraft.evaluation.bench.questions import SPEC_BENCH
from outdraft.target.backends import PackedLinear


def bench(folders: Folders, data: Path, *flags: object) -> Any:
    common = ("bench", "--model", folders.target, "--data", data, "--max-new-tokens", 6, "--dtype", "float32")
    return CliRunner().invoke(app, [str(part) for part in (*common, *flags)])


def test_the_json_has_all_figures_of_all_questions_and_of_every_group(folders: Folders, tmp_path: Path) -> None:
    data = question_file(tmp_path, "{broken")
    drafter = ("-d", folders.drafter, "--methods", "none,fspad", "--peers", "generate,prompt-lookup=4")
    result = bench(folders, data, *drafter, "--suite", "spec-bench", "--on-bad-line", "skip", "--limit", 1, "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    (one,) = found["results"]
    names = ["plain", "transformers generate", "transformers prompt-lookup", "fspad"]
    assert list(one["methods"]) == names and list(one["groups"]) == list(SPEC_BENCH)
    assert all(list(figures) == names for figures in one["groups"].values())
    assert found["settings"]["prompts"] == 6 and found["settings"]["suite"] == "spec-bench"
    (left,) = found["left_out"]
    assert left["source"] == f"{data}:9"
    for figures in (one["methods"]["fspad"], one["groups"]["rag"]["fspad"]):
        assert {"tau", "acceptance_rate", "acceptance_by_position", "draft_lengths", "seconds"} < set(figures)
        assert {"tokens_per_second", "first_token_seconds", "speedup", "speedup_interval"} < set(figures)
        assert figures["identical"] is True and figures["mean_rate_speedup"] > 0 and figures["spec_bench_speedup"] > 0
        assert all(figures["milliseconds_per_round"][part] > 0 for part in ("draft", "verify", "rest"))
    assert one["groups"]["rag"]["fspad"]["speedup_interval"] == [None, None], "one question has no interval"
    assert one["methods"]["transformers generate"]["milliseconds_per_round"]["verify"] is None
    assert {"load_average", "git_revision", "threads", "versions", "backend", "dtype"} < set(found["environment"])


def test_peers_run_on_stock_modules_unless_asked_otherwise(folders: Folders, tmp_path: Path, monkeypatch: Any) -> None:
    ran: list[Any] = []
    monkeypatch.setattr(
        baselines, "_config_kept", lambda model, kept=baselines._config_kept: ran.append(model) or kept(model)
    )
    for flags, packed in (((), 0), (("--peers-backend", "same"), 1)):
        ran.clear()
        given = ("--limit", 1, "--peers", "generate", "--backend", "packed", "--json", *flags)
        result = bench(folders, question_file(tmp_path), *given)
        assert result.exit_code == 0, result.stderr
        modules = {type(module) for model in ran for module in model.modules()}
        assert (PackedLinear in modules) == packed and (nn.Linear in modules) != packed
        found = json.loads(result.stdout)
        (one,) = found["results"]
        assert found["environment"]["backend"] == "packed"
        for group in (one["methods"], *one["groups"].values()):
            stock, drafted = group["transformers generate"], group["prompt-lookup"]
            assert stock["speedup_over_stock"] == 1.0 != drafted["speedup_over_stock"] > 0
            assert group["plain"]["speedup_over_stock"] > 0
    told = ("--limit", 1, "--peers", "generate")
    assert "over stock" in bench(folders, question_file(tmp_path), *told, "--all-figures").stdout
    shown = bench(folders, question_file(tmp_path), *told).stdout.split("Fastest here")[0].split("Nothing was")[0]
    assert "over stock" not in shown and shown.count("speed-up") == 2, "one speed-up a table: of all, and by task"


def test_tables_by_task_are_printed(folders: Folders, tmp_path: Path) -> None:
    result = bench(folders, question_file(tmp_path), "--limit", 1, "--output-dir", tmp_path / "out", "--all-figures")
    assert result.exit_code == 0, result.stderr
    for said in ("Spec-Bench's own", "by task, greedy", "math_reasoning (1)", "prompt-lookup"):
        assert said in result.stdout, said
    assert (tmp_path / "out/model_answer/prompt-lookup.jsonl").exists()


def test_mistakes_are_one_line(folders: Folders, tmp_path: Path) -> None:
    data = question_file(tmp_path)
    for flags, said in (
        (("--suite", "specbench"), "unknown suite 'specbench'"),
        (("--on-bad-line", "ignore"), "--on-bad-line"),
        (("--peers", "medusa"), "unknown peer 'medusa'"),
        (("--peers-backend", "packed"), "--peers-backend must be eager or same"),
        (("--temperatures", "1,1"), "twice"),
        (("--report", tmp_path), "is a folder"),
    ):
        result = bench(folders, data, *flags)
        assert result.exit_code == 2 and said in result.stderr, (flags, result.stderr)
        assert len(result.stderr.strip().splitlines()) == 1
