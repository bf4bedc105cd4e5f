"""The finished parts of an audit in a folder, from which a stopped one goes on: `settings.json` says of what audit they
are, `parts.pt` holds them.

A part is whatever took seconds to compute: a batch of texts, a prefix's cells, a finding. What is collected along the
way (trees, ranks of draws) is stored with every part, so that the file is that of one moment.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from outdraft.errors import UserError, first_line
from outdraft.evaluation.resuming import differences, folder_state
from outdraft.output import is_main_process, plain, write_whole

SETTINGS, PARTS = "settings.json", "parts.pt"


class Collected(Protocol):
    """Something that is collected part by part."""

    def state(self) -> Any:
        """Return all that was collected, in tensors, numbers, texts, lists and dictionaries."""

    def restore(self, state: Any) -> None:
        """Go on from what `state` returned."""


class Store:
    """The finished parts of an audit by name, kept in a folder, or nowhere without one.

    Args:
        folder: the folder, made if missing.
        facts: all that changes what the audit finds.

    Raises:
        UserError: the folder holds the parts of another audit, cannot be read or cannot be written.
    """

    def __init__(self, folder: Path | None = None, facts: Mapping[str, Any] | None = None):
        self.folder = folder
        self._parts: dict[str, Any] = {}
        self._states: dict[str, Any] = {}
        self._collected: dict[str, Collected] = {}
        if folder is not None:
            self._open(folder, json.loads(json.dumps(plain(dict(facts or {})))))

    def __contains__(self, name: str) -> bool:
        return name in self._parts

    def __getitem__(self, name: str) -> Any:
        return self._parts[name]

    def __len__(self) -> int:
        return len(self._parts)

    def collect(self, name: str, collected: Collected) -> None:
        """Store the state of this with every part from now on; a stored one is restored first."""
        if name in self._states:
            collected.restore(self._states[name])
        self._collected[name] = collected

    def keep(self, name: str, part: Any) -> None:
        """Add a finished part; it is in the folder when this returns."""
        if self.folder is None:
            return
        self._parts[name] = part
        self._states |= {name: collected.state() for name, collected in self._collected.items()}
        if is_main_process():
            content = io.BytesIO()
            torch.save({"parts": self._parts, "states": self._states}, content)
            write_whole(self.folder / PARTS, content.getvalue())

    def _open(self, folder: Path, facts: dict[str, Any]) -> None:
        settings, parts = folder / SETTINGS, folder / PARTS
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if settings.exists() or parts.exists():
                self._read(settings, parts, facts)
            elif is_main_process():
                write_whole(settings, json.dumps({"audit": facts}, indent=2))
        except OSError as error:
            raise UserError(f"--output-dir {folder} cannot be used ({first_line(error)}); give another") from None

    def _read(self, settings: Path, parts: Path, facts: dict[str, Any]) -> None:
        try:
            there = dict(json.loads(settings.read_text(encoding="utf-8"))["audit"])
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            raise UserError(
                f"{settings.parent} holds something else than an audit; give another --output-dir"
            ) from None
        if said := differences(there, facts):
            raise UserError(
                f"{settings.parent} holds an audit with other settings ({said}); give another --output-dir, or the "
                "settings that were used there"
            )
        if parts.exists():
            try:
                found = torch.load(parts, weights_only=True)
                self._parts, self._states = dict(found["parts"]), dict(found["states"])
            except OSError:
                raise
            except Exception as error:  # a broken archive has many exceptions
                raise UserError(f"{parts} is broken ({first_line(error)}); remove it to begin anew") from None


def facts_of(
    settings: Mapping[str, Any],
    about: Mapping[str, Any],
    environment: Mapping[str, Any],
    prompts: Sequence[list[int]],
) -> dict[str, Any]:
    """Return all that changes what an audit finds: settings, model and drafter, versions, machine.

    Args:
        about: names and methods; what names a folder stands for its files, too.
        environment: as `data.provenance.environment` gives it.
        prompts: token ids.
    """
    digest = hashlib.sha256(json.dumps(prompts).encode()).hexdigest()[:16]
    files = {f"{name}_files": folder_state(value) for name, value in about.items() if isinstance(value, str)}
    known = ("versions", "dtype", "backend", "device", "cpu", "gpu", "threads")
    return {
        **about,
        **settings,
        "prompts": digest,
        **{name: state for name, state in files.items() if state is not None},
        **{name: environment[name] for name in known},
    }
