"""Runs that were stopped: they go on from their folder alone, say so, and their checkpoints can be tried."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import outdraft
from cli_fixtures import Folders, make_folders, write_lines
from outdraft.cli import app
from outdraft.methods.checkpoint import UNFOLDED
from outdraft.methods.fspad.beginning import scale_of
from outdraft.methods.fspad.folder import load_drafter
from trainer_runs import QUESTION, Seen, record, rows_of, trainer
from training.tiny import byte_tokenizer


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return make_folders(tmp_path_factory.mktemp("trainer"))


def command(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def stopped(folders: Folders, folder: Path, **values: Any) -> None:
    """A run of 5 steps that a Ctrl-C has ended after 2."""
    with pytest.raises(KeyboardInterrupt):
        trainer(folders.target, folder, rows_of(folders), {"max_steps": 5, **values}, callbacks=[Seen(2)]).train()


def test_a_run_goes_on_from_its_folder_alone_with_its_own_settings(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed, folder = tmp_path / "undisturbed", tmp_path / "run"
    trainer(folders.target, undisturbed, rows_of(folders), {"max_steps": 5, "clip_value": 0.25}).train()
    stopped(folders, folder, clip_value=0.25)
    monkeypatch.chdir(tmp_path)
    result = command("train", "--resume", "--output-dir", "run", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["steps"] == 5 and "going on from checkpoint-2" in result.stderr
    there, here = (load_drafter(place).head.state_dict() for place in (undisturbed, folder))
    assert all(torch.equal(weight, here[name]) for name, weight in there.items())
    assert record(folder)["config"]["clip_value"] == 0.25 and record(folder)["resumed_from"] == "checkpoint-2"


def test_what_the_command_line_was_given_is_kept_too(folders: Folders, tmp_path: Path) -> None:
    data = write_lines(tmp_path / "data.jsonl", *rows_of(folders))
    begun = ("train", "--model", folders.target, "--data", data, "--output-dir", tmp_path / "run", "--dtype", "float32")
    more = ("--max-steps", 2, "--max-length", 64, "--report-to", "none", "--hold-out", 1, "batch_size=2")
    assert command(*begun, *more).exit_code == 0
    kept = json.loads((tmp_path / "run/training_run.json").read_text())["begun_with"]
    assert kept == {
        "model": folders.target,
        "data": str(data.resolve()),
        "dtype": "float32",
        "hold_out": 1,
        "max_steps": 2,
        "max_length": 64,
        "batch_size": 2,
        "report_to": ["none"],
    }
    assert command("train", "--resume", "--output-dir", tmp_path / "run").exit_code == 0
    in_part = command(*begun, "--resume")
    assert in_part.exit_code == 0, "what is not given is as it was, too"
    other = command("train", "--resume", "--output-dir", tmp_path / "run", "--max-length", 32)
    assert other.exit_code == 2 and "max_length was 64 in this run and is 32 now" in other.stderr


def test_a_folder_that_keeps_no_settings_says_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old/training_run.json").write_text('{"total_steps": 5}')
    for folder in (tmp_path / "none", tmp_path / "old"):
        result = command("train", "--resume", "--output-dir", folder)
        assert result.exit_code == 2
        assert f"{folder} keeps no settings of a run to go on with; give --model and --data" in result.stderr


def test_a_stopped_runs_folder_says_how_to_go_on_and_its_checkpoint_can_be_tried(
    folders: Folders, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    stopped(folders, folder)
    says = (
        f"training of {folder} stopped at step 2 of 5; go on with `outdraft train --resume --output-dir {folder}`, or "
        f"try its checkpoint {folder / 'checkpoint-2'}"
    )
    with pytest.raises(outdraft.UserError) as raised:
        outdraft.load(folders.target, folder)
    assert str(raised.value) == says
    assert says in command("info", folder).stderr.replace("\n", " ")
    plain = outdraft.load(folders.target, dtype="float32").generate(QUESTION, max_new_tokens=16)
    tried = outdraft.load(folders.target, folder / "checkpoint-2", dtype="float32").generate(
        QUESTION, max_new_tokens=16
    )
    assert tried.tokens == plain.tokens and tried.statistics.drafted > 0
    assert json.loads(command("info", folder / "checkpoint-2", "--json").stdout)["method"] == "fspad"


def test_a_run_without_a_checkpoint_says_so(folders: Folders, tmp_path: Path) -> None:
    (tmp_path / "training_run.json").write_text('{"total_steps": 5}')
    with pytest.raises(outdraft.UserError, match="stopped before its first checkpoint; go on with `outdraft train"):
        outdraft.load(folders.target, tmp_path)


def test_a_checkpoint_decodes_as_the_drafter_that_is_saved(tmp_path: Path, folders: Folders) -> None:
    """Embeddings that are scaled in training are folded in when it is loaded, and left as they train on disk."""
    model = AutoModelForCausalLM.from_pretrained(folders.target)
    with torch.no_grad():
        model.model.embed_tokens.weight *= 1 / 16
    training = trainer(model, tmp_path / "run", folders.chats, tokenizer=byte_tokenizer())
    training.train()
    scale = scale_of(training.target)
    checkpoint = load_drafter(tmp_path / "run/checkpoint-3")
    assert scale > 1 and checkpoint.training[UNFOLDED] == scale
    last = checkpoint.head.state_dict()
    assert all(torch.equal(weight, last[name]) for name, weight in training.drafter.state_dict().items())


@pytest.mark.parametrize("method", ["eesd", "medusa"])
def test_checkpoints_of_every_method_can_be_tried(method: str, folders: Folders, tmp_path: Path) -> None:
    values = {"method": method, "max_steps": 1, **({"exit_layer": 1} if method == "eesd" else {})}
    training = trainer(folders.target, tmp_path / "run", folders.chats, values)
    training.train()
    for drafter in (tmp_path / "run/checkpoint-1", training.drafter):
        model = outdraft.load(folders.target, drafter, dtype="float32")
        assert model.drafter is not None and model.drafter.method == method
        assert model.generate(QUESTION, max_new_tokens=4).statistics.rounds > 0


def test_a_folders_rows_are_never_replaced_by_those_of_another_run(folders: Folders, tmp_path: Path) -> None:
    stopped(folders, tmp_path / "run")
    given = (tmp_path / "run/data/given.jsonl").read_bytes()
    for resume in (False, True):
        with pytest.raises(outdraft.UserError, match="holds a run on other rows"):
            trainer(folders.target, tmp_path / "run", rows_of(folders)[1:], {"max_steps": 5}).train(resume)
    assert (tmp_path / "run/data/given.jsonl").read_bytes() == given
