"""The examples run as they stand, on a tiny model."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

from cli_fixtures import Folders, make_folders

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return make_folders(tmp_path_factory.mktemp("examples"))


def output_of(name: str, *args: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """What the example prints."""
    monkeypatch.setattr("sys.argv", [name, *map(str, args)])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("generate", "drafted tokens accepted"),
        ("stream", "ended by"),
        ("batch", "same as one by one: True"),
        ("custom_generate", "same as without drafting: True"),
    ],
)
@pytest.mark.parametrize("with_drafter", [True, False], ids=["drafter", "plain"])
def test_example(
    name: str,
    says: str,
    with_drafter: bool,
    folders: Folders,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    args = (folders.target, folders.drafter) if with_drafter else (folders.target,)
    assert says in output_of(name, *args, monkeypatch=monkeypatch, capsys=capsys)


def test_training_example(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    args = (folders.target, folders.chats, tmp_path, 3)
    printed = output_of("train_drafter", *args, monkeypatch=monkeypatch, capsys=capsys)
    assert "3 steps" in printed and "tau" in printed


def test_notebook_runs_as_it_stands_and_shows_what_it_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    cells = json.loads((EXAMPLES / "train_a_drafter.ipynb").read_text(encoding="utf-8"))["cells"]
    space: dict[str, object] = {}
    whole = ""
    for number, cell in enumerate((cell for cell in cells if cell["cell_type"] == "code"), start=1):
        exec(compile("".join(cell["source"]), f"cell {number}", "exec"), space)
        printed = capsys.readouterr().out
        whole += printed
        assert cell["execution_count"] == number and bool(cell["outputs"]) == bool(printed)
    assert "step 12: loss" in whole and "same text as without drafting: True" in whole
    assert "['README.md', 'config.json', 'model.safetensors', 'provenance.json']" in whole


def test_every_example_is_tested() -> None:
    tested = {"generate", "stream", "batch", "custom_generate", "train_drafter", "train_a_drafter"}
    assert {path.stem for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb")} == tested
