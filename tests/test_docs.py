"""The documents hold together: links lead somewhere, names of code exist, and pages are complete."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from outdraft.cli import app
from outdraft.core.sampling_settings import SamplingSettings
from outdraft.training.config import DrafterConfig
from test_layers_of_the_package import ORDER

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PACKAGE = ROOT / "src" / "outdraft"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]


def anchors(page: Path) -> set[str]:
    """The fragments that headings of a page can be linked by."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        place, _, fragment = link.partition("#")
        if not link.startswith("http"):
            target = page.parent / place if place else page
            assert target.exists(), link
            assert not fragment or fragment in anchors(target), link


@pytest.mark.parametrize("page", ["how-it-works.md", "architecture.md"])
def test_code_that_a_page_names_is_there(page: str) -> None:
    for file, name in re.findall(r"`([\w/]+\.py):(\w+)`", (DOCS / page).read_text(encoding="utf-8")):
        if file != "file.py":  # how the page says it names code
            code = (PACKAGE / file).read_text(encoding="utf-8")
            assert re.search(rf"^ *(def|class) {name}\b", code, re.MULTILINE), f"{file} has no {name}"


def test_the_layout_page_lists_folders_in_the_order_of_their_imports() -> None:
    rows = re.findall(r"^\| (`.*?`) \|", (DOCS / "architecture.md").read_text(encoding="utf-8"), re.MULTILINE)
    names = [name for row in rows for name in re.findall(r"`(\w+)(?:/|\.py)`", row)]
    assert names == list(ORDER)


def test_tests_that_the_table_of_faults_names_are_there() -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    kinds = re.search(r"\| kind \| tests \|\n\|---\|---\|\n((?:\|.*\n)+)", page)
    assert kinds is not None
    for row in kinds[1].splitlines():
        named = re.findall(r"`([\w/]+\.py)::(test_\w+)`", row)
        assert len(named) >= 2, row
        for file, name in named:
            assert f"def {name}(" in (ROOT / "tests" / file).read_text(encoding="utf-8"), f"{file} has no {name}"


ROOT_COMMAND: Any = get_command(app)
FLAGS = {
    verb: {"--help"}.union(*((*one.opts, *one.secondary_opts) for one in (*command.params, *ROOT_COMMAND.params)))
    for verb, command in ROOT_COMMAND.commands.items()
}
OTHERS = {"--enforce-eager"}
"""Flags of other programs that stand in pages alone."""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_verbs_and_flags_that_a_page_names_are_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    commands = re.findall(r"(?:^ *|`| -m )outdraft(?:\.cli)? ([a-z-]+)\b([^`#\n]*)", text, re.MULTILINE)
    assert len(commands) > 8 or page != DOCS / "quickstart.md"
    for verb, rest in commands:
        if verb in FLAGS:
            assert set(re.findall(r"(?<!\S)--?[a-z][\w-]*", rest)) <= FLAGS[verb], f"outdraft {verb}{rest}"
        given = '"' in rest or "..." in rest or ".json" in rest or "--" not in rest
        assert verb != "generate" or given, f"generate without a prompt: {rest}"
    if "measurements" not in page.parts:  # whose flags are those of benchmarks, too
        assert set(re.findall(r"`(--[a-z][\w-]*)", text)) - OTHERS <= set().union(*FLAGS.values())


def test_every_page_is_reached_from_the_index() -> None:
    reached, waiting = set(), [DOCS / "index.md"]
    while waiting:
        page = waiting.pop()
        if page not in reached:
            reached.add(page)
            links = re.findall(r"\]\(([^)#\s]+\.md)", page.read_text(encoding="utf-8"))
            waiting += [(page.parent / link).resolve() for link in links if not link.startswith("http")]
    assert set(DOCS.rglob("*.md")) <= reached


@pytest.mark.parametrize("page", sorted((DOCS / "measurements").glob("[!R]*.md")), ids=lambda page: page.stem)
def test_a_measurement_says_when_at_which_commit_and_by_which_command(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert re.search(r"Date: \d{4}-\d\d-\d\d\. Commit: [0-9a-f]{7}", text)
    assert re.search(r"^    (OMP_NUM_THREADS=2 )?(python|outdraft) ", text, re.MULTILINE)


def test_the_settings_page_names_every_setting() -> None:
    page = (DOCS / "reference" / "settings.md").read_text(encoding="utf-8")
    names = [field.name for field in fields(SamplingSettings)] + list(DrafterConfig.model_fields)
    assert [name for name in names if f"`{name}`" not in page] == []


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 100
