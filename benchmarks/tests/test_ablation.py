"""The ablation study from end to end on a tiny target: trained once, read back, measured once, summed up."""

from __future__ import annotations

import importlib.util
import io
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
from rich.console import Console

from cli_fixtures import save_model
from outdraft.errors import UserError
from training.tiny import write_chats


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ablation")
    save_model(folder / "target", layers=2)
    write_chats(folder / "chats.jsonl", 20)
    write_chats(folder / "prompts.jsonl", 3, seed=1)
    return folder


def run(ablation: ModuleType, root: Path, *more: str) -> None:
    given = ["--model", root / "target", "--data", root / "chats.jsonl", "--prompts", root / "prompts.jsonl"]
    sizes = ["--output-dir", root / "study", "--steps", "2", "--seeds", "2", "--limit", "2", "--max-new-tokens", "6"]
    sys.argv = ["ablation.py", *map(str, [*given, *sizes]), *more]
    ablation.main()


@pytest.fixture(scope="module")
def study(ablation: ModuleType, root: Path, request: pytest.FixtureRequest) -> Path:
    before = sys.argv
    run(ablation, root, "--train-only")
    table = json.loads((root / "study" / "study.json").read_text())["table"]
    assert not any(entry["decoding"] for entry in table)
    run(ablation, root)
    sys.argv = before
    return root / "study"


def test_every_variant_is_a_switch_and_all_else_is_equal(study: Path) -> None:
    records = {}
    for name in ("eagle", "fs", "pad", "fspad"):
        for seed in (0, 1):
            config = json.loads((study / f"{name}-seed{seed}" / "config.json").read_text())
            settings = config["training"]["config"]
            records[name, seed] = settings
            switches = (config["feature_sampling"], config["partial_alignment"])
            assert switches == ("fs" in name.replace("fspad", "fs"), name in ("pad", "fspad"))
            assert (settings["seed"], settings["max_steps"], settings["learning_rate"]) == (seed, 2, 1.5e-3)
    free = {"method", "feature_sampling", "partial_alignment", "seed", "output_dir"}
    assert len({json.dumps({k: v for k, v in one.items() if k not in free}) for one in records.values()}) == 1
    assert len(list((study / "features").iterdir())) == 1  # one cache for all


def test_what_is_finished_is_read_back(study: Path, ablation: ModuleType, root: Path, monkeypatch) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("nothing is left to be done")

    for name in ("train", "compare"):
        monkeypatch.setattr(ablation, name, never)
    monkeypatch.setattr(sys, "argv", sys.argv)
    before = (study / "study.json").read_text()
    run(ablation, root)
    assert (study / "study.json").read_text() == before


def test_the_table_holds_means_and_spreads_over_seeds(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads((study / "study.json").read_text())
    assert [entry["variant"] for entry in found["table"]] == ["EAGLE", "+FS", "+PAD", "FSPAD"]
    assert len(found["measured"]) == 4 * 2 * 2
    entry = found["table"][3]
    for temperature in ("0", "1"):
        own = [r for r in found["measured"] if r["variant"] == "FSPAD" and f"{r['temperature']:g}" == temperature]
        taus = [row["tau"] for row in own]
        assert entry["decoding"][temperature]["tau"]["mean"] == pytest.approx(sum(taus) / 2)
        assert entry["decoding"][temperature]["tau"]["deviation"] == pytest.approx(abs(taus[0] - taus[1]) / 2**0.5)
    base = found["table"][0]["decoding"]["0"]["speed_against_eagle"]
    assert base == {"mean": 1.0, "deviation": 0.0}
    text = (study / "study.md").read_text()
    assert text.count("| FSPAD |") == 3 and "2 seeds" in text and " +- " in text
    if importlib.util.find_spec("plotly"):
        assert "speed-up, temperature 1" in (study / "study.html").read_text()


@pytest.mark.parametrize("changed", [("--steps", "3"), ("--learning-rate", "1e-4")])
def test_another_study_does_not_mix_in(
    study: Path, ablation: ModuleType, root: Path, changed: tuple[str, str], monkeypatch, capsys
) -> None:
    monkeypatch.setattr(sys, "argv", sys.argv)
    with pytest.raises(SystemExit) as stopped:
        run(ablation, root, *changed)
    assert "choose another --output-dir" in str(stopped.value)


def test_other_data_are_noticed(study: Path, ablation: ModuleType, root: Path, monkeypatch) -> None:
    write_chats(root / "others.jsonl", 20, seed=9)
    monkeypatch.setattr(sys, "argv", sys.argv)
    with pytest.raises(SystemExit, match="trained on other data"):
        run(ablation, root, "--data", str(root / "others.jsonl"), "--limit", "1")


def test_an_interrupted_study_goes_on(ablation: ModuleType, root: Path, monkeypatch) -> None:
    """Killed between two runs: only the missing ones are trained."""
    trained = []

    def counting(target, config, **more):
        if len(trained) == 2:
            raise KeyboardInterrupt
        trained.append(config.output_dir.name)
        return real(target, config, **more)

    real = ablation.train
    monkeypatch.setattr(ablation, "train", counting)
    given = ablation.Study(
        str(root / "target"), root / "chats.jsonl", None, root / "second", 1, 1, 1, 4, 1, (0.0,), 1e-3
    )
    given.output_dir.mkdir()
    with pytest.raises(KeyboardInterrupt):
        ablation.train_all(given, Console(file=io.StringIO()))
    monkeypatch.setattr(ablation, "train", lambda *args, **more: (trained.append("later"), real(*args, **more)))
    ablation.train_all(given, Console(file=io.StringIO()))
    assert trained == ["eagle-seed0", "fs-seed0", "later", "later"]


def test_impossible_sizes_are_refused(ablation: ModuleType) -> None:
    with pytest.raises(UserError, match="--seeds must be at least 1, not 0"):
        ablation.Study("m", Path("d"), None, Path("o"), 1, 0, 1, 1, 1, (0.0,), 1e-3)
