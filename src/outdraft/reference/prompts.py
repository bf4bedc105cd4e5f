"""The prompt files that ship with the reference target.

``heldout`` prompts come from conversations that the target never saw, ``train`` prompts from ones it was trained on.
The script ``build_prompts`` draws them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from outdraft.data.text_file import split_lines

DATA = Path(__file__).parent / "data"
Messages = list[dict[str, str]]


def load_prompts(which: Literal["heldout", "train"]) -> list[Messages]:
    """Return the conversations of a shipped file, each a list of user messages."""
    lines = split_lines((DATA / f"{which}_prompts.jsonl").read_text(encoding="utf-8"))
    return [json.loads(line)["messages"] for line in lines]
