"""Unknown names are answered with the one that was meant; models and outputs say what they are when printed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import outdraft
from cli_fixtures import Folders, make_folders
from outdraft.api.generation import SpeculativeModel
from outdraft.cli import app
from outdraft.errors import UserError, meant
from outdraft.training.config import DrafterConfig


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return make_folders(tmp_path_factory.mktemp("names"))


@pytest.fixture(scope="module")
def model(folders: Folders) -> SpeculativeModel:
    return outdraft.load(folders.target, folders.drafter, dtype="float32")


def test_the_nearest_name_is_named_and_none_where_none_is_near() -> None:
    assert meant("tempreature", ["temperature", "top_p"]) == "; did you mean 'temperature'?"
    assert meant("hydra", ["temperature", "top_p"]) == ""
    assert meant("stop", ["top_k"]) == "; here it is stop_strings"


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ({"stop": "x"}, "stop_strings"),
        ({"max_length": 20}, "max_new_tokens"),
        ({"max_tokens": 20}, "max_new_tokens"),
        ({"max_new_token": 20}, "'max_new_tokens'"),
        ({"tempreature": 1}, "'temperature'"),
        ({"contoller": "fixed"}, "'controller'"),
        ({"tree_dept": 2}, "'tree_depth'"),
        ({"prompt_lookup_minimum": 2}, "'prompt_lookup_min'"),
        ({"zzz": 1}, "known are"),
    ],
)
def test_settings_of_generate(model: SpeculativeModel, setting: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        model.generate("hello", **setting)


def test_every_setting_that_is_named_exists(model: SpeculativeModel) -> None:
    with pytest.raises(UserError) as error:
        model.generate("hello", zzz=1)
    for name in str(error.value).partition("known are ")[2].split(", "):
        try:
            model.generate("hello", max_new_tokens=1, **({} if name == "max_new_tokens" else {name: None}))
        except UserError as problem:
            assert "unknown" not in str(problem)


@pytest.mark.parametrize(
    ("argument", "named"), [("torch_dtype", "dtype"), ("draft_modle", "draft_model"), ("z", "known")]
)
def test_arguments_of_load(folders: Folders, argument: str, named: str) -> None:
    with pytest.raises(UserError, match=f"'{argument}'.*{named}"):
        outdraft.load(folders.target, **{argument: "float32"})


@pytest.mark.parametrize(
    ("command", "flag", "named"),
    [
        ("generate", "--max-lenght", "--max-new-tokens"),
        ("generate", "--max-tokens", "--max-new-tokens"),
        ("generate", "--torch-dtype", "--dtype"),
        ("generate", "--stop-strings", "--stop"),
        ("generate", "--temprature", "did you mean --temperature?"),
        ("generate", "--temp", "did you mean --temperature?"),
        ("train", "--lr", "here it is --learning-rate"),
        ("train", "--num-train-epochs", "here it is --epochs"),
        ("bench", "--method", "did you mean --methods?"),
        ("train", "--max-lenght", "did you mean --max-length?"),
        ("serve", "--assistant-model", "--draft-model"),
    ],
)
def test_flags(command: str, flag: str, named: str) -> None:
    result = CliRunner().invoke(app, [command, flag, "1"])
    assert result.exit_code == 2 and named in result.stderr and len(result.stderr.splitlines()) == 1


def test_settings_of_training(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'learning_rate'"):
        DrafterConfig(data=tmp_path, output_dir=tmp_path, learning_rates=1)  # type: ignore[call-arg]
    with pytest.raises(UserError, match="here it is batch_size"):
        DrafterConfig(data=tmp_path, output_dir=tmp_path, per_device_train_batch_size=1)  # type: ignore[call-arg]


# --- printed -----------------------------------------------------------------------------------------------------


def test_a_model_says_what_it_is_in_one_line(model: SpeculativeModel) -> None:
    shown = str(model)
    assert "\n" not in shown and "drafter fspad" in shown and "float32 on cpu" in shown and "target" in shown
    assert "no drafter" in repr(model.with_drafter(None))


def test_an_output_says_its_figures_and_its_text(model: SpeculativeModel) -> None:
    output = model.generate("hello", max_new_tokens=12)
    figures, text = str(output).split("\n", 1)
    assert figures.startswith("<GenerationOutput: 12 tokens") and f"tau {output.tau:.2f}" in figures
    assert "ended by length" in figures and text == output.text
    both = str(model.generate(["hello", "good"], max_new_tokens=4))
    assert both.startswith("<GenerationOutput: 2 answers, 8 tokens")
    assert len(str(model.generate("hello", max_new_tokens=900))) < 500, "long answers are cut"
    assert "tau" not in str(model.generate("hello", max_new_tokens=1)), "no round, no tau"
