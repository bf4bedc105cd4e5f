"""`outdraft advise`: what is timed and tried, what follows from the figures, and the command that comes next."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from cli_fixtures import Folders, make_folders, write_lines
from outdraft.cli import app
from outdraft.core.statistics import Statistics
from outdraft.evaluation import advising
from outdraft.evaluation.advice import Advice, AdviceSettings, Kind, drafts_table, next_steps, trained
from outdraft.evaluation.bench.bench import Comparison
from outdraft.evaluation.bench.summary import Summary
from outdraft.evaluation.rounds import RoundCost

NAN = float("nan")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return make_folders(tmp_path_factory.mktemp("advise"))


@pytest.fixture(autouse=True)
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny model's passes need no forty seconds."""
    monkeypatch.setattr(advising, "TIMING_SECONDS", 1.0)


def run(*args: object) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args])


def advised(folders: Folders, tmp_path: Path, *more: object) -> dict[str, Any]:
    prompts = write_lines(tmp_path / "prompts.jsonl", {"prompt": "one two one two"}, {"prompt": "three"})
    result = run(
        *("advise", "--model", folders.target, "--data", prompts, "--max-new-tokens", 16, "--dtype", "float32"),
        *(*more, "--json"),
    )
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def test_everything_is_timed_and_prompt_lookup_is_tried(folders: Folders, tmp_path: Path) -> None:
    found = advised(folders, tmp_path)
    assert list(found["passes"]) == ["1", "5", "16"] and min(found["passes"].values()) > 0 < found["head_seconds"]
    trained = ["fspad", "fspad-1f", "eagle3", "eesd, exit after layer 1 of 2"]
    assert list(found["drafts"]) == [*trained, "prompt-lookup"]
    for draft in found["drafts"].values():
        assert draft["tau_to_pay"] == pytest.approx(1 + draft["draft"] + draft["verify"])
        assert draft["speedup_at_tau"]["2.5"] == pytest.approx(2.5 / draft["tau_to_pay"])
    assert list(found["prompts"]) == ["plain", "prompt-lookup"]
    assert found["prompts"]["plain"]["questions"] == 2 and found["prompts"]["prompt-lookup"]["identical"] is True
    assert found["memory_bytes"]["target"] > found["memory_bytes"]["fspad"] > 0
    assert all(step["command"].startswith("outdraft ") and step["why"] for step in found["next"]) and found["next"]


def test_a_drafter_that_is_given_is_tried_too(folders: Folders, tmp_path: Path) -> None:
    found = advised(folders, tmp_path, "-d", folders.drafter)
    assert list(found["prompts"]) == ["plain", "prompt-lookup", "fspad", "fspad+lookup"]
    assert found["drafts"]["fspad as given"]["to_train"] is False


def test_a_model_of_one_layer_has_no_early_exit(folders: Folders, tmp_path: Path) -> None:
    found = advised(folders, tmp_path, "--model", folders.small_model)
    assert list(found["drafts"]) == ["fspad", "fspad-1f", "prompt-lookup"]
    assert "exit layer" in found["left_out"]["eesd, exit after layer 1 of 1"]


def test_it_is_shown_with_the_formula_and_ends_with_a_command(folders: Folders, tmp_path: Path) -> None:
    prompts = write_lines(tmp_path / "prompts.jsonl", {"prompt": "one two one two"})
    result = run("advise", "--model", folders.target, "--data", prompts, "--max-new-tokens", 8, "--dtype", "float32")
    assert result.exit_code == 0, result.stderr
    assert "tau / (1 + draft + verify)" in result.stdout and "Without training: " in result.stdout
    assert result.stdout.splitlines()[-1].strip().startswith("outdraft ")


def test_mistakes_are_one_line_and_exit_code_2(folders: Folders, tmp_path: Path) -> None:
    for args, said in (
        (("--limit", 0), "--limit"),
        (("--quantize", "int3"), "int8, int4 or gguf"),
        (("--data", tmp_path / "none.jsonl"), "none.jsonl"),
        (("--max-new-tokens", 5000), "--max-new-tokens"),
        (("--draft-model", folders.wider), "hidden_size"),
    ):
        result = run("advise", "--model", folders.target, *args)
        assert result.exit_code == 2 and said in result.stderr and len(result.stderr.splitlines()) == 1, result.stderr


# --- what follows from figures -----------------------------------------------------------------------------------


def summary(name: str, speedup: float) -> Summary:
    return Summary(
        *(name, "none" if name == "plain" else name, 0, Statistics(rounds=1), 1, 1.0, 1.0, 1.0, 1.0),
        *(speedup, (speedup, speedup), 1.0, []),
    )


def advice(speedups: dict[str, float], tau_to_pay: float, passes: tuple[float, ...] = (1, 1, 1), **own: Any) -> Advice:
    kind = Kind("fspad", RoundCost(tau_to_pay - 1, 0.0, 0.01), 1, to_train=True, flags=" --method fspad")
    summaries = [summary(name, speedup) for name, speedup in {"plain": 1.0, **speedups}.items()]
    settings = AdviceSettings(own.pop("model", "some/model"), **own)
    times = dict(zip((1, 5, 16), passes, strict=True))
    return Advice(settings, {}, times, 0.01, [kind], {}, Comparison(0.0, summaries, {}), {}, 1.0)


def test_on_80_columns_no_name_and_no_number_of_the_table_is_cut() -> None:
    found = advice({}, 1.62)
    late = Kind("eesd, exit after layer 7 of 30", RoundCost(3.4, 1.06, 0.0762), 1, to_train=True)
    copied = Kind("prompt-lookup", RoundCost(0.0, 0.78, 0.0), 1, to_train=False, always=False)
    Console(file=(shown := io.StringIO()), width=80).print(
        drafts_table(replace(found, kinds=[*found.kinds, late, copied]), wide=False)
    )
    words = shown.getvalue().split()
    assert "…" not in shown.getvalue() and max(map(len, shown.getvalue().splitlines())) <= 80
    assert {"fspad", "prompt-lookup", "eesd,", "3.40", "1.06", "5.46", "1.62", "1.23x", "repeats"} <= set(words)


def commands(found: Advice) -> list[str]:
    return [step.command for step in next_steps(found)]


def test_what_pays_now_comes_first_and_then_training() -> None:
    first, second, third = commands(advice({"prompt-lookup": 1.3}, 1.4, quantize="int8"))
    assert first == "outdraft chat --model some/model --quantize int8 --method prompt-lookup"
    assert second.startswith("outdraft regenerate --model some/model --quantize int8 --data prompts.jsonl")
    assert (
        third == "outdraft train --model some/model --method fspad --data answers.jsonl --output-dir drafter --dry-run"
    )


def test_training_is_not_advised_where_it_would_not_pay() -> None:
    found = advice({"prompt-lookup": 0.9}, 3.2)
    assert commands(found) == ["outdraft chat --model some/model --method none"]
    assert "not expected to pay" in trained(found)


def test_a_drafter_that_pays_is_used_with_or_without_repetitions() -> None:
    alone = advice({"prompt-lookup": 1.1, "fspad": 1.5, "fspad+lookup": 1.2}, 1.4, draft_model="my drafter")
    both = advice({"prompt-lookup": 1.1, "fspad": 1.2, "fspad+lookup": 1.5}, 1.4, draft_model="my drafter")
    given = "outdraft chat --model some/model --draft-model 'my drafter' --controller calibrated"
    assert commands(alone) == [f"{given} --prompt-lookup-min 0"] and commands(both) == [given]


def test_settings_go_into_the_command_and_a_shipped_drafter_is_named() -> None:
    first, second = commands(advice({"prompt-lookup": 1.3}, 1.4, model="smollm2", dtype="float32", backend="eager"))
    assert first == "outdraft chat --model smollm2 --dtype float32 --backend eager --method prompt-lookup"
    assert second.startswith("outdraft advise --model smollm2") and second.endswith("--draft-model smollm2")


def test_nothing_follows_from_timings_that_contradict_each_other() -> None:
    found = advice({"prompt-lookup": 1.3}, 0.7, passes=(0.13, 0.08, 0.11))
    assert "too busy to tell" in trained(found) and "over 5 tokens" in trained(found)
    assert commands(found)[-1] == "outdraft advise --model some/model"
