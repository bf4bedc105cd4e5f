"""Folders that are made once per user and found again, under ``$OUTDRAFT_CACHE`` or ``~/.cache/outdraft``.

Knows nothing of what is in them; whoever asks for one gives it a name that changes with its contents.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from outdraft.errors import UserError, first_line


def cache_folder() -> Path:
    """Where unpacked models are kept."""
    return Path(os.environ.get("OUTDRAFT_CACHE") or Path.home() / ".cache" / "outdraft")


def made_once(name: str, make: Callable[[Path], None]) -> Path:
    """The folder of this name in the cache. It appears whole or not at all, however many processes ask for it at once.

    Args:
        name: of the folder.
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
