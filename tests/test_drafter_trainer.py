"""Training from Python: data and targets in every form, what is handed on, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import outdraft
from cli_fixtures import Folders, make_folders
from outdraft.data.provenance import portable
from outdraft.methods.fspad.folder import load_drafter
from outdraft.methods.fspad.network import FeatureHead
from trainer_runs import QUESTION, Seen, record, rows_of, trainer
from training.tiny import byte_tokenizer, tiny_target

SHARED = {"config.json", "model.safetensors", "provenance.json", "README.md"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return make_folders(tmp_path_factory.mktemp("trainer"))


class Rows:
    """What training asks of a `datasets.Dataset`."""

    def __init__(self, rows: list[dict[str, Any]]):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.rows)


def test_the_trained_drafter_drafts_for_its_target(folders: Folders, tmp_path: Path) -> None:
    seen = Seen()
    training = trainer(folders.target, tmp_path / "run", rows_of(folders), {"max_steps": 40}, callbacks=[seen])
    result = training.train()
    assert result.steps == 40 and result.tau["tau"] >= 1
    model = outdraft.load(folders.target, training.drafter, dtype="float32")
    plain = outdraft.load(folders.target, dtype="float32").generate(QUESTION, max_new_tokens=24)
    drafted = model.generate(QUESTION, max_new_tokens=24)
    assert drafted.tokens == plain.tokens and drafted.statistics.drafted > 0
    assert any("tau" in names for _, names in seen.entries) and any("acc" in names for _, names in seen.entries)
    from_folder = load_drafter(tmp_path / "run").head.state_dict()
    assert all(torch.equal(weight, from_folder[name]) for name, weight in training.drafter.state_dict().items())


@pytest.mark.parametrize("form", ["list", "generator", "data set", "path", "text of a path", "configuration"])
def test_data_come_in_every_form(form: str, folders: Folders, tmp_path: Path) -> None:
    rows = rows_of(folders)
    forms: dict[str, Any] = {
        "list": rows,
        "generator": (row for row in rows),
        "data set": Rows(rows),
        "path": folders.chats,
        "text of a path": str(folders.chats),
        "configuration": None,
    }
    values = {"data": folders.chats} if form == "configuration" else {}
    training = trainer(folders.target, tmp_path / "run", forms[form], {**values, "max_steps": 1})
    assert training.plan().examples == 11, "one of twelve is held out"
    assert not (tmp_path / "run").exists()
    training.train()
    assert record(tmp_path / "run")["examples"] == 11


def test_strings_are_texts(folders: Folders, tmp_path: Path) -> None:
    texts = [f"one two three {number} four five six" for number in range(12)]
    trainer(folders.target, tmp_path / "run", texts, {"max_steps": 1}, hold_out=0).train()
    given = [json.loads(line) for line in (tmp_path / "run/data/given.jsonl").read_text().splitlines()]
    assert given[3] == {"text": texts[3]} and record(tmp_path / "run")["examples"] == 12


def test_prompts_to_measure_on_may_be_rows(folders: Folders, tmp_path: Path) -> None:
    asked = [{"prompt": "one two"}, {"turns": ["three"]}]
    result = trainer(folders.target, tmp_path / "run", folders.chats, {"max_steps": 1}, eval_dataset=asked).train()
    assert result.tau["tau"] >= 1 and record(tmp_path / "run")["examples"] == 12, "then none is held out"


@pytest.mark.parametrize("form", ["loaded", "loaded by name", "target"])
def test_the_target_may_be_loaded_already(form: str, folders: Folders, tmp_path: Path) -> None:
    model: Any = tiny_target() if form == "target" else AutoModelForCausalLM.from_pretrained(folders.target)
    more = {"tokenizer": byte_tokenizer()} if form == "loaded" else {}
    training = trainer(model, tmp_path / "run", rows_of(folders), {"max_steps": 1}, **more)
    training.train()
    assert isinstance(training.drafter, FeatureHead)
    if form != "target":
        assert training.target.model is model


def test_a_model_is_saved_with_a_card_that_names_no_folder_of_this_machine(folders: Folders, tmp_path: Path) -> None:
    training = trainer(folders.target, tmp_path / "run", folders.chats)
    training.train()
    assert training.save_model() == tmp_path / "run"
    saved = training.save_model(tmp_path / "saved")
    assert {path.name for path in saved.iterdir()} == SHARED
    for name in ("config.json", "provenance.json", "README.md"):
        assert str(tmp_path) not in (saved / name).read_text() and str(Path.home()) not in (saved / name).read_text()
    card = (saved / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: outdraft\ntags:"), "a folder is no repository that the Hub knows"
    assert "# Drafter for target" in card and "| learning_rate | 0.01 |" in card and "3 steps on 11 examples" in card
    assert f"tau {record(saved)['tau']['tau']:.2f}" in card
    answer = outdraft.load(folders.target, saved, dtype="float32").generate(QUESTION, max_new_tokens=4)
    assert answer.statistics.rounds > 0


def test_the_card_of_a_repositorys_drafter_names_it_for_the_hub(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    model = AutoModelForCausalLM.from_pretrained(folders.target)
    model.config._name_or_path = "owner/name"
    training = trainer(model, tmp_path / "run", folders.chats, {"max_steps": 1}, tokenizer=byte_tokenizer())
    training.train()
    sent: dict[str, Any] = {}

    class Api:
        def __init__(self, token: str | None):
            pass

        def create_repo(self, repo_id: str, **options: Any) -> None:
            sent["repository"] = repo_id

        def upload_folder(self, *, folder_path: Path, allow_patterns: list[str], **options: Any) -> Any:
            sent["files"] = {name for name in allow_patterns if (folder_path / name).is_file()}
            sent["card"] = (folder_path / "README.md").read_text()
            return type("Commit", (), {"commit_url": "https://hub/commit/1"})

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert training.push_to_hub("me/drafter") == "https://hub/commit/1"
    assert sent["repository"] == "me/drafter" and "base_model: owner/name\n" in sent["card"]
    assert sent["files"] == SHARED


def test_records_keep_the_last_part_of_a_path() -> None:
    given = {"argv": ["/usr/bin/x", "--data=/home/me/a.jsonl", "data=/d/b", "a/b=c"], "data": "/d/b", "rate": 1}
    shown = {"argv": ["x", "--data=a.jsonl", "data=b", "a/b=c"], "data": "b", "rate": 1}
    assert portable(given) == shown
    assert portable(given, {"data"}) == {key: value for key, value in shown.items() if key != "data"}


def test_short_runs_log_their_last_step(folders: Folders, tmp_path: Path) -> None:
    seen = Seen()
    result = trainer(folders.target, tmp_path / "run", folders.chats, callbacks=[seen]).train()
    assert result.metrics["step"] == 3
    assert [step for step, names in seen.entries if "loss" in names] == [1, 3]


def test_mistakes_are_named(folders: Folders, tmp_path: Path) -> None:
    rows = rows_of(folders)
    with pytest.raises(outdraft.UserError, match=r"training needs data; give --data a file or .* train_dataset"):
        trainer(folders.target, tmp_path, None)
    with pytest.raises(outdraft.UserError, match="both train_dataset and the configuration's data"):
        trainer(folders.target, tmp_path, rows, {"data": folders.chats})
    with pytest.raises(outdraft.UserError, match="a dictionary of train, test; give one of its splits"):
        trainer(folders.target, tmp_path, {"train": rows, "test": rows})
    with pytest.raises(outdraft.UserError, match="row 2 of the data is a int; give dictionaries or texts"):
        trainer(folders.target, tmp_path, ["a text", 3]).train()
    with pytest.raises(outdraft.UserError, match=r"given.jsonl:1: unknown shape with keys: words"):
        trainer(folders.target, tmp_path, [{"words": "one"}]).train()
    with pytest.raises(outdraft.UserError, match="hold-out must be 0 or more"):
        trainer(folders.target, tmp_path, rows, hold_out=-1)
    with pytest.raises(outdraft.UserError, match="a Target has its own tokenizer"):
        trainer(tiny_target(), tmp_path, rows, tokenizer=byte_tokenizer())
    untrained = trainer(folders.target, tmp_path, rows)
    for use in (lambda: untrained.drafter, untrained.save_model, lambda: untrained.push_to_hub("me/drafter")):
        with pytest.raises(outdraft.UserError, match=r"no trained drafter yet; call train\(\) first"):
            use()


def test_importing_the_package_and_its_settings_costs_no_framework() -> None:
    program = (
        "import sys, outdraft; outdraft.DrafterConfig(output_dir='x'); "
        "assert 'DrafterTrainer' in outdraft.__all__ and not {'torch', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
