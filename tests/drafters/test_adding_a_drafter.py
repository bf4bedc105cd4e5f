"""docs/adding-a-drafter.md is true: its drafter runs, and its output is the target's, greedy and as a law."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from models import tiny
from outdraft.core.dice import Dice
from outdraft.core.sampling import Warper
from outdraft.core.sampling_settings import SamplingSettings
from outdraft.core.shape import TreeShape
from outdraft.engine.round import decode
from outdraft.engine.rows import Row
from outdraft.methods import registry
from outdraft.target.target import Target

PAGE = Path(__file__).resolve().parents[2] / "docs" / "adding-a-drafter.md"


@pytest.fixture(scope="module")
def blocks() -> list[str]:
    found = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert len(found) == 4, "a drafter, how to decode with it, having it by name, the proof"
    return found


def run(block: str, names: dict[str, Any]) -> None:
    exec(compile(block, str(PAGE), "exec"), names)


NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
PROMPTS = [[5, 6, 7, 5, 6, 7, 5, 6], [1, 2, 1, 2, 1], [9]]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_GPU)])
def test_the_page_s_drafter_decodes_what_plain_decoding_does(blocks: list[str], device: str) -> None:
    model: Any = tiny("llama-gqa", seed=3).to(device)
    names: dict[str, Any] = {"model": model, "prompts": PROMPTS}
    run(blocks[0], names)
    run(blocks[1], names)
    plain = [Row(prompt, Warper(SamplingSettings(), len(prompt), 32, device=device), Dice(0), 24) for prompt in PROMPTS]
    for _ in decode(Target(model), None, plain, TreeShape.chain(1)):
        pass
    assert [row.tokens for row in names["rows"]] == [row.tokens for row in plain]
    drafted = sum(row.statistics.drafted for row in names["rows"])
    accepted = sum(row.statistics.accepted for row in names["rows"])
    assert 0 < accepted < drafted


@pytest.mark.parametrize(("temperature", "shape"), [(1.3, TreeShape.chain(1)), (0.7, TreeShape.chain(3))])
def test_the_page_s_drafter_keeps_the_law_of_the_target(
    blocks: list[str], temperature: float, shape: TreeShape
) -> None:
    """The page's own proof, with a guard that there was something to prove."""
    model = tiny("llama-gqa", seed=3, vocab_size=4)
    counted = {"drafted": 0, "accepted": 0}

    def counting(target: Target, drafter: Any, rows: list[Row], _: TreeShape) -> Any:
        yield from decode(target, drafter, rows, shape)
        counted["drafted"] += rows[0].statistics.drafted
        counted["accepted"] += rows[0].statistics.accepted

    names: dict[str, Any] = {"model": model, "prompts": [[1, 2, 1, 2]], "torch": torch}
    run(blocks[0], names)
    run(blocks[1], names)
    names |= {"prompt": [1, 2, 1, 2], "decode": counting, "settings": SamplingSettings(temperature=temperature)}
    run(blocks[3], names)
    assert 0 < counted["accepted"] < counted["drafted"]


def test_the_page_s_drafter_is_had_by_its_name(
    blocks: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(registry, "_registered", {})
    names: dict[str, Any] = {"model": tiny("llama-gqa", seed=3), "prompts": PROMPTS}
    run(blocks[0], names)
    run(blocks[2], names)
    assert names["fast"].method == "successors" and float(capsys.readouterr().out) > 1


def test_the_page_names_the_files_of_a_method() -> None:
    """Every trained method has what the page's table says, a file or part of another one."""
    page = PAGE.read_text(encoding="utf-8")
    rows = set(re.findall(r"^\| `(\w+\.py)` \|", page, re.MULTILINE))
    assert rows == {"network.py", "drafter.py", "folder.py", "loss.py"}
    for function in re.findall(r"`(\w+)`", "".join(re.findall(r"^\| `\w+\.py` .*\|(.*)\|$", page, re.MULTILINE))):
        assert hasattr(registry.Method, function), function
