"""Last words: of a training, a benchmark, an answer. Each says what it knows, nothing that nobody measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from cli_fixtures import Folders, make_folders, write_lines
from outdraft.cli import app
from outdraft.console.generate import Streamed
from outdraft.core.statistics import Statistics
from outdraft.evaluation.bench.measure import Answer, Run
from outdraft.evaluation.bench.summary import scattered
from outdraft.evaluation.rounds import RoundCost, TrainingVerdict, lifts


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return make_folders(tmp_path_factory.mktemp("verdicts"))


def run(*args: object) -> Result:
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    assert result.exit_code == 0, result.stderr
    return result


# --- of a training -----------------------------------------------------------------------------------------------


def record(examples: int, steps: int, batch_size: int = 4) -> dict[str, Any]:
    return {"examples": examples, "steps": steps, "processes": 1, "config": {"batch_size": batch_size}}


def test_a_training_ends_with_what_it_is_worth_here(folders: Folders, tmp_path: Path) -> None:
    common = ("train", "--model", folders.target, "--data", folders.chats, "--max-length", 64, "--report-to", "none")
    shown = run(*common, "--max-steps", 1, "batch_size=4", "--output-dir", tmp_path / "shown").stdout
    assert "Verdict: at tau " in shown and "x of plain decoding here" in shown
    assert "more data (11 answers were learned from, 5,000 are advised)" in shown
    found = json.loads(run(*common, "--max-steps", 1, "--output-dir", tmp_path / "json", "--json").stdout)
    verdict = found["verdict"]
    assert verdict["tau"] == found["tau"]["tau"]
    assert verdict["expected_speedup"] == pytest.approx(verdict["tau"] / (1 + verdict["draft"] + verdict["verify"]))


def test_a_verdict_says_whether_it_is_faster_and_from_which_tau_on() -> None:
    cost = RoundCost(draft=0.3, verify=0.1, step_seconds=0.002)
    assert "about 1.50x of plain decoding here, faster than the target alone" in str(TrainingVerdict(2.1, cost, []))
    slow = str(TrainingVerdict(1.2, cost, ["more data"]))
    assert "not faster than" in slow and "it pays from tau 1.40 on" in slow and slow.endswith("lift it: more data.")


def test_what_would_lift_a_drafter_follows_from_its_run() -> None:
    assert "longer training (2.0 passes" in lifts(record(6000, 3000), 3000, None)[0]
    assert lifts(record(6000, 9000), 9000, None) == []
    assert "more answers rather than more steps, after 40 passes" in lifts(record(6000, 60000), 60000, None)[0]
    assert "step 300 of 9000 was the best" in lifts(record(6000, 9000), 300, None)[0]
    assert "longer training" in lifts(record(6000, 3000), 300, None)[0], "too early to tell which step is the best"
    assert "40 answers were learned from, 5,000 are advised" in lifts(record(40, 60), 60, None)[-1]
    assert "draft_vocab_size=auto; the output layer is 45% of a draft step" in lifts(record(6000, 9000), 9000, 0.45)[-1]


# --- of a benchmark ----------------------------------------------------------------------------------------------


def runs(seconds_a_round: list[float], rounds: int = 10) -> list[Run]:
    return [
        Run(place, 0, Answer([1], 1.0, Statistics(rounds=rounds, verify_seconds=seconds * rounds)))
        for place, seconds in enumerate(seconds_a_round)
    ]


def test_a_benchmark_ends_with_the_fastest_and_the_losers(folders: Folders, tmp_path: Path) -> None:
    prompts = write_lines(tmp_path / "prompts.jsonl", {"prompt": "one two"}, {"prompt": "three"})
    common = ("bench", "--model", folders.target, "--data", prompts, "--max-new-tokens", 6, "--dtype", "float32")
    shown = run(*common).stdout
    assert "Fastest here: prompt-lookup" in shown or "Nothing was faster than plain decoding here" in shown
    assert "nothing to compare" in run(*common, "--methods", "none").stdout


def test_paired_rounds_that_scatter_say_that_the_machine_was_busy() -> None:
    plain = runs([0.02, 0.03, 0.02, 0.025])
    steady = runs([0.03, 0.045, 0.03, 0.038])
    wild = runs([0.03, 0.09, 0.02, 0.05])
    assert scattered({"plain": plain, "a": steady}) is None
    assert scattered({"plain": plain, "a": steady, "b": wild}) is None, "one steady contender shows a quiet machine"
    note = scattered({"plain": plain, "b": wild})
    assert note is not None and "busy" in note
    assert scattered({"plain": plain[:3], "b": wild[:3]}) is None, "three pairs say nothing"
    assert scattered({"plain": plain}) is None


# --- of an answer ------------------------------------------------------------------------------------------------


def streamed(accepted: list[bool]) -> Streamed:
    return Streamed("text", [1] * len(accepted), accepted, "eos", seconds=1.5, first_seconds=0.5)


def test_the_closing_line_says_how_much_came_from_drafts() -> None:
    line = streamed([False, True, False, True, False]).line()
    assert line == "tau 2.00 | 3.3 tokens/s | 5 tokens | 40% of the text came from drafts"
    assert "drafts" not in streamed([False] * 3).line()


def test_times_of_plain_stand_only_where_plain_was_measured() -> None:
    # Four tokens in the second after the first one; plain decoding would take 0.4 s each.
    assert "1.60x of plain" in streamed([False, True, False, True, False]).line(plain_seconds=0.4)
    assert "plain" not in streamed([False] * 5).line()


def test_a_controller_that_has_measured_plain_rounds_lets_an_answer_tell(folders: Folders) -> None:
    from outdraft.api.generation import load

    model = load(folders.target, folders.drafter, dtype="float32")
    model.generate("hello", max_new_tokens=8, controller="fixed")
    assert model.plain_seconds is None
    model.generate("hello", max_new_tokens=40, controller="calibrated")
    assert model.plain_seconds is not None and 0 < model.plain_seconds < 10


def test_a_busy_machine_is_no_verdict() -> None:
    busy = TrainingVerdict(1.0, RoundCost(draft=0.24, verify=-0.27, step_seconds=0.01), [])
    assert "too busy to tell" in str(busy) and "faster" not in str(busy)
