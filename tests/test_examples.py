"""The examples run as they stand, on a tiny model."""

from __future__ import annotations

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


def test_every_example_is_tested() -> None:
    tested = {"generate", "stream", "batch", "custom_generate", "train_drafter"}
    assert {path.stem for path in EXAMPLES.glob("*.py")} == tested
