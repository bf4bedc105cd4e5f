"""Checkpoints of a training run: written aside and renamed, so that a folder named `checkpoint-N` is always whole.

Knows files only.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

PARTIAL = ".partial"
NAME = re.compile(r"checkpoint-(\d+)$")
NEEDED = ("trainer_state.json", "optimizer.pt", "scheduler.pt", "model.safetensors")


def complete_checkpoints(output_dir: str | Path) -> list[Path]:
    """All whole checkpoints of a run, oldest step first; folders that lack a file are passed over."""
    found = []
    folder = Path(output_dir)
    for path in folder.iterdir() if folder.is_dir() else ():
        name = NAME.match(path.name)
        if name and all((path / file).is_file() and (path / file).stat().st_size for file in NEEDED):
            found.append((int(name[1]), path))
    return [path for _, path in sorted(found)]


def last_checkpoint(output_dir: str | Path) -> Path | None:
    """The newest whole checkpoint, None when there is none."""
    found = complete_checkpoints(output_dir)
    return found[-1] if found else None


def publish(output_dir: str | Path, name: str, keep: int) -> None:
    """Rename `.partial/<name>` to `<name>`, then delete all but the newest `keep` checkpoints and what kills left."""
    folder = Path(output_dir)
    final = folder / name
    if final.exists():  # the same step, e.g. saved again on Ctrl-C, or a folder that was damaged by hand
        shutil.rmtree(final)
    os.replace(folder / PARTIAL / name, final)
    shutil.rmtree(folder / PARTIAL, ignore_errors=True)
    for old in complete_checkpoints(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
