"""The study of training recipes from end to end on a tiny target: costs, equal steps and seconds, measured, kept."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from cli_fixtures import save_model
from training.tiny import write_chats

VARIANTS = "FSPAD,several layers,all,corpus answers"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipes")
    save_model(folder / "target", layers=4)
    write_chats(folder / "chats.jsonl", 20)
    write_chats(folder / "corpus.jsonl", 20, seed=2)
    write_chats(folder / "prompts.jsonl", 2, seed=1)
    return folder


def run(recipes: ModuleType, root: Path, *more: str, steps: int = 4) -> None:
    given = ["--model", root / "target", "--data", root / "chats.jsonl", "--prompts", root / "prompts.jsonl"]
    sizes = ["--output-dir", root / "study", "--steps", steps, "--limit", 2, "--max-new-tokens", 6]
    which = ["--variants", VARIANTS, "--corpus-data", root / "corpus.jsonl"]
    before, sys.argv = sys.argv, ["recipes.py", *map(str, [*given, *sizes, *which]), *more]
    try:
        recipes.main()
    finally:
        sys.argv = before


@pytest.fixture(scope="module")
def study(recipes: ModuleType, root: Path) -> Path:
    with pytest.raises(SystemExit, match="is not measured yet; run with --costs"):
        run(recipes, root, "--train-only")
    run(recipes, root, "--costs", "--cost-steps", "2")
    costs = json.loads((root / "study" / "costs.json").read_text())
    assert set(costs) == {"FSPAD", "several layers", "all"} and all(one[0] > 0 for one in costs.values())
    # What was measured decides: a variant of twice the cost gets half the steps.
    costs = {"FSPAD": [0.2, 0.1, 0.1], "several layers": [0.1], "all": [0.2]}
    (root / "study" / "costs.json").write_text(json.dumps(costs))
    run(recipes, root)
    return root / "study"


def test_switches_steps_and_data_are_the_rows(study: Path, root: Path) -> None:
    found = {path.parent.name: json.loads(path.read_text())["config"] for path in study.glob("*/provenance.json")}
    assert {name: config["max_steps"] for name, config in found.items()} == {
        "fspad-steps-seed0": 4,
        "several-layers-steps-seed0": 4,
        "all-steps-seed0": 4,
        "all-seconds-seed0": 2,
        "corpus-answers-steps-seed0": 4,
    }
    together = found["all-seconds-seed0"]
    assert (together["unroll_steps"], together["token_loss"], together["tap_layers"]) == (3, "top-k", "auto")
    assert (together["w_reg_schedule"], together["state_norm"]) == ("linear", True)
    base = found["fspad-steps-seed0"]
    assert (base["unroll_steps"], base["token_loss"], base["tap_layers"]) == (1, "soft", None)
    assert base["data"].endswith("chats.jsonl") and found["corpus-answers-steps-seed0"]["data"].endswith("corpus.jsonl")


def test_the_table_has_tau_and_positions_and_speed_only_where_asked(
    study: Path, recipes: ModuleType, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = json.loads((study / "study.json").read_text())["table"]
    names = ["FSPAD", "several layers", "all", "corpus answers", "all, equal seconds"]
    assert [entry["variant"] for entry in table] == names
    assert [entry["idle_seconds"] for entry in table] == pytest.approx([0.4, 0.4, 0.8, 0.4, 0.4])
    for entry in table:
        for temperature in ("0", "1"):
            decoding = entry["decoding"][temperature]
            assert decoding["tau"]["mean"] >= 1 and decoding["acceptance_by_position"] and "speedup" not in decoding
    run(recipes, root, "--speed")
    assert "speed against FSPAD" in capsys.readouterr().out
    table = json.loads((study / "study.json").read_text())["table"]
    assert table[0]["decoding"]["0"]["speed_against_base"]["mean"] == 1.0


def test_what_is_finished_is_read_back(study: Path, recipes: ModuleType, root: Path, monkeypatch) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("nothing is left to be done")

    run(recipes, root)
    before = (study / "study.json").read_text()
    for name in ("train", "compare"):
        monkeypatch.setattr(recipes, name, never)
    run(recipes, root)
    assert (study / "study.json").read_text() == before


def test_what_does_not_belong_together_is_refused(study: Path, recipes: ModuleType, root: Path) -> None:
    with pytest.raises(SystemExit, match="trained with max_steps 4, not 3"):
        run(recipes, root, steps=3)
    with pytest.raises(SystemExit, match="equal seconds have begun with the costs as they are"):
        run(recipes, root, "--costs")
    with pytest.raises(SystemExit, match="--variants knows FSPAD, unrolled"):
        run(recipes, root, "--variants", "FSPAD,hydra")
    few = write_chats(root / "few.jsonl", 5)
    with pytest.raises(SystemExit, match=r"has 5 conversations where .* has 20"):
        run(recipes, root, "--output-dir", str(root / "other"), "--corpus-data", str(few), "--budgets", "steps")
    with pytest.raises(SystemExit, match="trained on other data"):
        run(recipes, root, "--corpus-data", str(root / "chats.jsonl"), "--limit", "1")
