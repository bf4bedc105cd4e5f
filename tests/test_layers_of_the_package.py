"""Imports point one way: a folder of the package imports what stands before it in `ORDER`, never what stands after."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "src" / "outdraft"
ORDER = (
    "errors",
    "output",
    "data",
    "reference",
    "core",
    "target",
    "control",
    "drafting",
    "losses",
    "methods",
    "engine",
    "api",
    "training",
    "serving",
    "export",
    "evaluation",
    "drafter_trainer",
    "console",
    "cli",
    "__main__",
)


def imported(file: Path) -> set[str]:
    """Folders and files at the top of the package that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("outdraft."):
            names.add(node.module.split(".")[1])
        elif isinstance(node, ast.ImportFrom) and node.module == "outdraft":
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("outdraft.")}
    return names & set(ORDER)


def home(file: Path) -> str:
    return file.relative_to(PACKAGE).with_suffix("").parts[0]


FILES = sorted(
    file for file in PACKAGE.rglob("*.py") if file.parent != PACKAGE or file.stem not in ("__init__", "moved")
)


@pytest.mark.parametrize("folder", sorted({home(file) for file in FILES}))
def test_a_folder_imports_only_what_stands_before_it(folder: str) -> None:
    assert folder in ORDER, f"say in ORDER where {folder} stands"
    own = ORDER.index(folder)
    wrong = [
        f"{file.relative_to(PACKAGE)} imports {name}"
        for file in FILES
        if home(file) == folder
        for name in imported(file)
        if ORDER.index(name) > own
    ]
    assert not wrong


def test_imports_are_seen() -> None:
    assert {"core", "target", "drafting"} <= imported(PACKAGE / "engine" / "round.py")
