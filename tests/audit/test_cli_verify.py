"""`outdraft verify` from end to end: exit codes, JSON, the saved page, mistakes."""

from __future__ import annotations

import json
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import outdraft.core.verify
import outdraft.engine.round
from audit import faults
from cli_fixtures import Folders, make_folders, write_lines
from outdraft.cli import app


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return make_folders(tmp_path_factory.mktemp("verify"))


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    records = [{"prompt": text} for text in ("one two", "three", "a cat and a dog", "red")]
    return write_lines(tmp_path_factory.mktemp("prompts") / "prompts.jsonl", *records)


def verify(folders: Folders, prompts: Path, *args: object) -> Result:
    small = ("--max-new-tokens", 8, "--dtype", "float32", "--total-variation", 0.25)
    both = ("--model", folders.target, "-d", folders.small_model, "--data", prompts)
    return CliRunner().invoke(app, [str(arg) for arg in ("verify", *both, *small, *args)])


class Text(HTMLParser):
    """What a page says, and what it would load."""

    def __init__(self, page: str):
        super().__init__()
        self.said, self.loads = "", []
        self.feed(page)

    def handle_data(self, data: str) -> None:
        self.said += data

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("script", "link", "img", "iframe"):
            self.loads.append(tag)


@pytest.mark.parametrize(
    "setting", [("--prompt-lookup-min", 0), ("--prompt-lookup-min", 2, "--prompt-lookup-num-tokens", 3)]
)
def test_repetitions_may_be_audited_or_left_out(folders: Folders, prompts: Path, setting: tuple[object, ...]) -> None:
    result = verify(folders, prompts, *setting, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["kept"] is True


def test_a_kept_law_is_exit_code_0(folders: Folders, prompts: Path, tmp_path: Path) -> None:
    report = tmp_path / "new" / "report.html"
    result = verify(folders, prompts, "--temperature", 1, "--json", "--report", report)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["kept"] is True and found["verdict"].startswith("KEPT")
    assert set(found["checks"]) == {
        *(
            "plain",
            "greedy",
            "candidates_greedy",
            "declared_laws",
            "draws",
            "samples",
            "tokens",
            "seeded",
            "beginnings",
            "forwards",
        ),
    }
    for check in found["checks"].values():
        assert check["passed"] and (check["p_value"] is None or 0 < check["p_value"] <= check["p_value_holm"] <= 1)
    page = Text(report.read_text())
    assert found["verdict"] in page.said and page.loads == []
    assert all(check["evidence"] in page.said for check in found["checks"].values())


def test_a_broken_law_is_exit_code_1(
    folders: Folders, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outdraft.engine.round, "verify", faults.bonus_from_the_parent(outdraft.core.verify.verify))
    report = tmp_path / "report.html"
    itself = ("-d", folders.target)  # a draft model that is always right
    result = verify(folders, prompts, *itself, "--num-speculative-tokens", 2, "--report", report)
    assert result.exit_code == 1, result.output
    assert "NOT KEPT" in result.stdout and "BUG" in result.stdout
    assert "NOT KEPT" in Text(report.read_text()).said


@pytest.mark.clocked
@pytest.mark.parametrize("setting", [(), ("--tree-size", "auto"), ("--controller", "calibrated")], ids=str)
def test_drafts_that_follow_the_clock_are_audited(folders: Folders, prompts: Path, setting: tuple[object, ...]) -> None:
    """How far to draft differs from run to run then, and that is no finding."""
    result = verify(folders, prompts, *setting, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["checks"]["candidates_greedy"]["trees"] > 0


def test_greedy_is_what_is_checked_without_a_temperature(folders: Folders, prompts: Path) -> None:
    result = verify(folders, prompts, "--tree-depth", 2, "--tree-top-k", 2, "--tree-size", 6)
    assert result.exit_code == 0, result.output
    assert "4 of 4 texts are token-exact" in " ".join(result.stdout.split()) and "KEPT" in result.stdout
    assert "backend; greedy" in result.stdout and "dice" not in result.stdout


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (("--power", 1.5), "--power"),
        (("--alpha", 0), "--alpha"),
        (("--total-variation", 0), "--total-variation"),
        (("--limit", 0), "--limit"),
        (("--temperature", -1), "temperature"),
        (("--method", "none"), "--draft-model"),
        (("--controller", "none-such"), "none-such"),
        (("--data", "none-such.jsonl"), "none-such.jsonl"),
        (("--max-new-tokens", 5000), "--max-new-tokens"),
        (("--tree-size", 0), "tree_size"),
        (("--report", "."), "--report"),
    ],
    ids=lambda value: str(value[0]) if isinstance(value, tuple) else None,
)
def test_mistakes_are_one_line_and_exit_code_2(
    folders: Folders, prompts: Path, args: tuple[object, ...], named: str
) -> None:
    result = verify(folders, prompts, *args)
    assert result.exit_code == 2, result.output
    assert len(result.stderr.splitlines()) == 1 and named in result.stderr
    assert result.stdout == ""


@pytest.fixture
def without_scipy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "scipy"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "scipy", None)


@pytest.mark.usefixtures("without_scipy")
def test_only_tests_of_sampled_texts_need_scipy(folders: Folders, prompts: Path) -> None:
    sampled = verify(folders, prompts, "--temperature", 1)
    assert sampled.exit_code == 2 and sampled.stdout == ""
    (said,) = sampled.stderr.splitlines()
    assert "pip install 'outdraft[verify]'" in said
    assert verify(folders, prompts, "--limit", 2).exit_code == 0


# --- how long it takes, a quick look, and the end by Ctrl-C -----------------------------------------------------------


def test_the_time_is_stated_first_and_progress_is_that_of_the_whole(folders: Folders, prompts: Path) -> None:
    result = verify(folders, prompts, "--temperature", 1)
    assert result.exit_code == 0, result.output
    first, *stages = [line for line in result.stderr.splitlines() if "..." in line or "expected" in line]
    assert first.startswith("expected to take about ") and "--quick" in first and "Ctrl-C" in first
    shares = [int(line.rpartition("(")[2].partition("%")[0]) for line in stages]
    assert shares[0] == 0 and shares == sorted(shares) and shares[-1] > 50
    assert stages[0].startswith("plain greedy texts") and stages[-1].startswith("trees node by node")


def test_a_quick_look_says_so_in_its_verdict(folders: Folders, prompts: Path) -> None:
    result = verify(folders, prompts, "--temperature", 1, "--quick", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["settings"]["quick"] and found["settings"]["text_prompts"] == 3 and found["settings"]["trees"] == 8
    assert found["settings"]["total_variation"] == 0.25, "no finer than what was asked for"
    assert "A quick look" in found["verdict"] and "total variation of 0.25" in found["verdict"]
    assert "A quick look" not in json.loads(verify(folders, prompts, "--json").stdout)["verdict"]


def interrupted_in(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def interrupt(*args: object, **settings: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(f"outdraft.evaluation.audit.audit.{name}", interrupt)


def test_what_was_found_is_kept_and_shown_when_it_is_stopped(
    folders: Folders, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted_in(monkeypatch, "beginnings_finding")
    report = tmp_path / "report.html"
    result = verify(folders, prompts, "--temperature", 1, "--json", "--report", report)
    assert result.exit_code == 130, result.output
    found = json.loads(result.stdout)
    assert found["kept"] is None and found["stopped_during"] == "samples of the first tokens"
    assert found["verdict"].startswith("STOPPED") and {"plain", "greedy", "tokens"} <= set(found["checks"])
    assert found["verdict"] in Text(report.read_text()).said
    assert "STOPPED" in verify(folders, prompts, "--temperature", 1).stdout


def test_a_difference_counts_even_when_the_rest_was_stopped(
    folders: Folders, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outdraft.engine.round, "verify", faults.bonus_from_the_parent(outdraft.core.verify.verify))
    interrupted_in(monkeypatch, "forwards_finding")
    result = verify(folders, prompts, "-d", folders.target, "--num-speculative-tokens", 2)
    said = " ".join(result.stdout.replace("│", " ").split())
    assert result.exit_code == 1 and "NOT KEPT" in said and "Stopped during the check 'trees node by node'" in said


def test_nothing_is_said_where_no_check_was_finished(
    folders: Folders, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted_in(monkeypatch, "decoded")
    result = verify(folders, prompts)
    assert result.exit_code == 130 and result.stdout == ""
    assert result.stderr.splitlines()[-1] == "interrupted before any check was finished"
