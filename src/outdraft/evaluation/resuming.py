"""Whether what lies in an output folder is of the same models and settings, so that a run may go on from it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

NAMED = 3
"""The most differences that a message names."""


def folder_state(path: str | Path) -> str | None:
    """Digest the names, sizes and times of a local folder's files, so that a retrained model shows; None for a name
    that is no folder."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        return None
    files = sorted(file for file in folder.iterdir() if file.is_file())
    facts = [[file.name, file.stat().st_size, int(file.stat().st_mtime)] for file in files]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """Say in which facts a folder's run differs from this one; an empty text if in none."""
    differing = [name for name in {**there, **here} if there.get(name) != here.get(name)]
    return "; ".join(
        f"{name} {json.dumps(there.get(name))} there, {json.dumps(here.get(name))} here" for name in differing[:NAMED]
    )
