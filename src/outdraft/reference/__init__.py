"""The small chat model that ships with outdraft for its demo, tests and documentation, and drafters for it and SmolLM2.

``CARD.md`` tells how they were made, by the scripts of the source tree in ``scripts/reference_model``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from outdraft.data.records import split_lines
from outdraft.errors import UserError
from outdraft.reference.quantize import load_reference_target, reference_target_path

__all__ = [
    "DATA",
    "SHIPPED",
    "load_prompts",
    "load_reference_target",
    "reference_drafter_path",
    "reference_target_path",
]

DATA = Path(__file__).parent / "data"
Messages = list[dict[str, str]]

SHIPPED = {"fspad": "drafter", "eagle": "eagle", "eesd": "eesd"}
"""The methods of the drafters that ship for the reference target, and their folders."""


def load_prompts(which: Literal["heldout", "train"]) -> list[Messages]:
    """Return the conversations of a shipped file, each a list of user messages.

    ``heldout`` prompts come from conversations that the target never saw, ``train`` prompts from ones it was trained
    on. The script ``build_prompts`` draws them.
    """
    lines = split_lines((DATA / f"{which}_prompts.jsonl").read_text(encoding="utf-8"))
    return [json.loads(line)["messages"] for line in lines]


def reference_drafter_path(method: str | None = None) -> Path:
    """Return the folder of this method's shipped drafter for the reference target; FSPAD's when None."""
    method = method or "fspad"
    if method not in SHIPPED:
        raise UserError(f"no drafter of method '{method}' ships with the package; there are {', '.join(SHIPPED)}")
    folder = Path(__file__).parent / SHIPPED[method]
    if not (folder / "config.json").exists():
        raise UserError(f"{folder} is missing: reinstall the package, or train a drafter with `outdraft train`")
    return folder
