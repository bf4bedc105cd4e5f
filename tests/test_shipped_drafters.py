"""Drafters that ship for a real model: small enough, whole, and for that model."""

from __future__ import annotations

import json

import pytest
import torch

from outdraft.methods.fspad.folder import load_drafter
from outdraft.reference import PACKED
from outdraft.target.named import DRAFTERS, shipped_drafters

FOLDER = DRAFTERS / "smollm2"
BYTES = 30e6


def test_all_that_ships_for_it_is_small() -> None:
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) <= BYTES


@pytest.mark.parametrize("method", sorted(shipped_drafters("smollm2")))
def test_a_shipped_drafter_loads_from_int8_rows_and_names_no_place_on_a_machine(method: str) -> None:
    folder = shipped_drafters("smollm2")[method]
    assert (folder / PACKED).is_file() and not (folder / "model.safetensors").exists()
    record = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert record["method"] == method and record["target"]["id"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    for name in ("config.json", "provenance.json"):
        assert '"/' not in (folder / name).read_text(encoding="utf-8")
    if method != "eesd":
        head = load_drafter(folder).head
        assert head.method == method and head.fusion.fc.weight.dtype == torch.bfloat16
        assert all(weight.isfinite().all() for weight in head.parameters())


def test_fspad_ships_for_it() -> None:
    assert "fspad" in shipped_drafters("smollm2")
