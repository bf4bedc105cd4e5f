"""Output for users: consoles for results and remarks, JSON, figures, files, and folders that are made once per user.

Such a folder lies under ``$OUTDRAFT_CACHE`` or ``~/.cache/outdraft`` and is found again; its name changes with its
contents.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from outdraft.errors import UserError, first_line

ACCEPTED = "black on green"
"""Style of tokens that a drafter had guessed."""

FILE_WIDTH = 132
"""Columns of tables that go into a file or a pipe."""


def is_main_process() -> bool:
    """Return True in the first of torchrun's or accelerate's processes, which prints, writes and reports for all."""
    return os.environ.get("RANK", "0") == "0"


def remarks() -> Console:
    """For progress and figures beside the result: stderr."""
    return Console(stderr=True, highlight=False, quiet=not is_main_process())


def results(force_colour: bool = False) -> Console:
    """For the result: stdout; `force_colour` also into a pipe, unless NO_COLOR is set."""
    wanted = force_colour and "NO_COLOR" not in os.environ
    width = None if sys.stdout.isatty() else FILE_WIDTH
    return Console(
        highlight=False,
        soft_wrap=True,
        force_terminal=True if wanted else None,
        width=width,
        quiet=not is_main_process(),
    )


def print_json(value: Any) -> None:
    """One JSON document on stdout; what is not a number is null."""
    if not is_main_process():
        return
    sys.stdout.write(json.dumps(plain(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    sys.stdout.flush()


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file whole or not at all; its folder exists, and several processes may do this at once."""
    aside = path.with_name(f"{path.name}.{os.getpid()}.partial")
    aside.write_bytes(content.encode() if isinstance(content, str) else content)
    aside.replace(path)


def whole_lines(file: Path) -> list[bytes]:
    """Return the lines of a file; a last one that an interruption left without an end is cut off the file."""
    content = file.read_bytes()
    end = content.rfind(b"\n") + 1
    if end < len(content):
        os.truncate(file, end)
    return content[:end].splitlines()


def plain(value: Any) -> Any:
    """The same value in what JSON can say."""
    if isinstance(value, dict):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, str | int | bool | None) else str(value)


def number(value: float | None, form: str = ".2f") -> str:
    """A figure, or a dash where there is none."""
    return "-" if value is None or not math.isfinite(value) else format(value, form)


def counted(count: int, noun: str) -> str:
    """`1 prompt`, `2 prompts`."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def cache_folder() -> Path:
    """Where unpacked models are kept."""
    return Path(os.environ.get("OUTDRAFT_CACHE") or Path.home() / ".cache" / "outdraft")


def made_once(name: str, make: Callable[[Path], None]) -> Path:
    """The folder of this name in the cache. It appears whole or not at all, however many processes ask for it at once.

    Args:
        make: fills an empty folder; called only where there is none of this name.

    Raises:
        UserError: there is no place to write it.
    """
    folder = cache_folder() / name
    if folder.exists():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=folder.parent))
    except OSError as error:
        raise UserError(
            f"'{folder.parent}' cannot be written ({first_line(error)}); set OUTDRAFT_CACHE to a folder with room"
        ) from error
    try:
        make(draft)
        draft.chmod(0o755)
        draft.rename(folder)
    except OSError:
        if not folder.exists():  # else another process was faster
            raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder
