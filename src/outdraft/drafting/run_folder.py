"""The folder of a training run: its checkpoints, and the record of the settings that it began with.

Checkpoints are written aside and renamed, so that a folder named `checkpoint-N` is always whole.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

RUN = "training_run.json"
"""Name of the file that describes the run, kept as long as the run may be resumed."""

BEGUN_WITH = "begun_with"
"""Key in that file for the settings that the run was given."""

PARTIAL = ".partial"
NAME = re.compile(r"checkpoint-(\d+)$")
NEEDED = ("trainer_state.json", "optimizer.pt", "scheduler.pt", "model.safetensors")


def complete_checkpoints(output_dir: str | Path) -> list[Path]:
    """Return all whole checkpoints of a run, oldest step first; folders that lack a file are skipped."""
    found = []
    folder = Path(output_dir)
    for path in folder.iterdir() if folder.is_dir() else ():
        name = NAME.match(path.name)
        if name and all((path / file).is_file() and (path / file).stat().st_size for file in NEEDED):
            found.append((int(name[1]), path))
    return [path for _, path in sorted(found)]


def last_checkpoint(output_dir: str | Path) -> Path | None:
    """Return the newest whole checkpoint, None if there is none."""
    found = complete_checkpoints(output_dir)
    return found[-1] if found else None


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def begun_with(output_dir: str | Path) -> dict[str, Any] | None:
    """Return the settings that a run was given, so that it resumes from its folder alone; None if none were kept."""
    found = _record(Path(output_dir)).get(BEGUN_WITH)
    return found if isinstance(found, dict) else None


def unfinished(folder: str | Path) -> str | None:
    """Return a message about the folder of a run that has not ended; None if there is no such run."""
    folder = Path(folder)
    if not (folder / RUN).is_file() or (folder / "config.json").is_file():
        return None
    resume = f"go on with `outdraft train --resume --output-dir {folder}`"
    if (last := last_checkpoint(folder)) is None:
        return f"training of {folder} stopped before its first checkpoint; {resume}"
    total = _record(folder).get("total_steps", "?")
    return f"training of {folder} stopped at step {step_of(last)} of {total}; {resume}, or try its checkpoint {last}"


def _record(folder: Path) -> dict[str, Any]:
    try:
        record = json.loads((folder / RUN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def publish(output_dir: str | Path, name: str, keep: int) -> None:
    """Rename `.partial/<name>` to `<name>`, then delete all but the newest `keep` checkpoints and any partial ones."""
    folder = Path(output_dir)
    final = folder / name
    if final.exists():  # the same step, e.g. saved again on Ctrl-C, or a folder that was damaged by hand
        shutil.rmtree(final)
    os.replace(folder / PARTIAL / name, final)
    shutil.rmtree(folder / PARTIAL, ignore_errors=True)
    for old in complete_checkpoints(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
