"""The same seed gives the same text from one release to the next, for every method and kind of draft.

`golden_texts.json` holds what each of them said when it was written; `PYTHONPATH=benchmarks/lookahead python
tests/test_golden_texts.py` writes it anew, which only a change that means to change texts may do.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from models import perturbed, tiny
from outdraft.api.generation import SpeculativeModel
from outdraft.target.target import Target
from test_losslessness import DRAFTERS

FILE = Path(__file__).with_suffix("").parent / "golden_texts.json"
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6, 5], [2, 7, 1, 8, 2, 8, 1, 8]]
SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "greedy-tree": {"tree_depth": 2, "tree_top_k": 3, "tree_size": 8, "repetition_penalty": 1.2},
    "noise": {"temperature": 1.0, "seed": 5, "coupling": "noise"},
    "noise-tree": {"temperature": 0.8, "top_p": 0.9, "seed": 6, "coupling": "noise", "tree_size": 9},
    "dice": {"temperature": 1.0, "seed": 7, "coupling": "dice"},
    "dice-tree": {"temperature": 1.0, "seed": 8, "coupling": "dice", "tree_depth": 2, "tree_top_k": 2, "tree_size": 6},
    "drawn": {"temperature": 0.9, "seed": 9, "candidates": "sampled", "tree_depth": 1, "tree_top_k": 2, "tree_size": 5},
}


@cache
def said(method: str, settings: str) -> dict[str, Any]:
    """Tokens of both prompts together, and what was drafted for them."""
    model = tiny("llama-gqa")
    target = Target(model)
    drafter = None if method == "none" else DRAFTERS[method](target, perturbed(model, lambda: tiny("llama-gqa"), 0.1))
    output = SpeculativeModel(target, drafter).generate(
        PROMPTS, max_new_tokens=24, controller="fixed", **SETTINGS[settings]
    )
    return {"tokens": output.tokens, "tau": round(output.tau, 4), "drafted": output.statistics.drafted}


def cases() -> list[tuple[str, str]]:
    """Every method with every kind of draft that it has."""
    rules = ("prompt-lookup", "lookahead")
    return [
        (method, settings)
        for method in ["none", *DRAFTERS]
        for settings in SETTINGS
        if not (settings == "drawn" and method in rules)
    ]


@pytest.mark.parametrize(("method", "settings"), cases())
def test_the_text_of_a_seed_stays(method: str, settings: str) -> None:
    assert said(method, settings) == json.loads(FILE.read_text())[f"{method} {settings}"]


def test_the_texts_were_drafted() -> None:
    """Golden texts of rounds in which nothing was accepted would hold nothing."""
    taus = [entry["tau"] for name, entry in json.loads(FILE.read_text()).items() if not name.startswith("none ")]
    assert sum(tau > 1.05 for tau in taus) > len(taus) / 2


if __name__ == "__main__":
    FILE.write_text(json.dumps({f"{m} {s}": said(m, s) for m, s in cases()}, indent=0) + "\n")
