"""The file that answers are written to: a line as soon as an answer is there, the prompts' order once all are.

Beside it `NAME.settings.json` says by which settings it was written, so that answers by others do not get into it. A
half-written last line, as a killed run leaves it, is cut off. Knows lines; nothing of how answers are made.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from outdraft.data.messages import Message
from outdraft.errors import UserError
from outdraft.training.asking import Name

FORMAT = 2
"""Of these lines; the first had one answer to a prompt and no word on whether it was finished."""


class AnswerFile:
    """JSON lines of answers; a context manager while lines are added.

    Args:
        path: of the lines.
        settings: by which answers are made; JSON's values.
        resume: whether lines that are there may stay; False refuses an existing file.

    Attributes:
        present: names of the answers that it has, each with what was asked.

    Raises:
        UserError: other settings have written it, or something else has.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], resume: bool = True):
        self.path = path
        self.present: dict[Name, list[Message]] = {}
        self._claim({"format": FORMAT, **settings}, resume)

    def __enter__(self) -> AnswerFile:
        self._lines = self.path.open("ab", buffering=0)  # a line is one write
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.fsync(self._lines.fileno())
        self._lines.close()

    def add(self, record: dict[str, Any]) -> None:
        """One more answer."""
        self._lines.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
        self.present[_name(record)] = _asked(record)

    def arrange(self, order: Sequence[Name]) -> None:
        """Put the lines in this order, others after them."""
        places = {name: place for place, name in enumerate(order)}
        lines = self.path.read_bytes().splitlines(keepends=True)
        arranged = sorted(lines, key=lambda line: places.get(_name(json.loads(line)), len(places)))
        if arranged != lines:
            aside = self.path.with_name(f"{self.path.name}.{os.getpid()}.partial")
            aside.write_bytes(b"".join(arranged))
            os.replace(aside, self.path)

    def _claim(self, settings: dict[str, Any], resume: bool) -> None:
        """Take the file over, or say why it cannot be."""
        output, record = self.path, self.path.with_name(self.path.name + ".settings.json")
        if not output.exists() or not output.stat().st_size:
            output.parent.mkdir(parents=True, exist_ok=True)
            record.write_text(json.dumps(settings) + "\n")
            return
        if not resume:
            raise UserError(f"{output} exists; resume it, or choose another output")
        try:
            before = json.loads(record.read_text())
        except (OSError, ValueError):
            raise UserError(f"{record.name} is missing beside {output}; choose another output") from None
        if before.get("format") != FORMAT:
            raise UserError(f"{output} was written by another version of outdraft; choose another output")
        for name, value in settings.items():
            if before.get(name) != value:
                raise UserError(
                    f"{output} was written with {name} {_said(before.get(name))}, not {_said(value)}; keep it, "
                    "or choose another output"
                )
        self._read()

    def _read(self) -> None:
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            with self.path.open("r+b") as lines:
                lines.truncate(len(whole))
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                record = json.loads(line)
                self.present[_name(record)] = _asked(record)
            except (ValueError, KeyError, TypeError):
                raise UserError(f"{self.path}:{number}: no answer of a run; choose another output") from None


def _name(record: Mapping[str, Any]) -> Name:
    return Name(record["id"], float(record["temperature"]), record.get("sample", 0))


def _asked(record: Mapping[str, Any]) -> list[Message]:
    return [message for message in record.get("messages", []) if message["role"] != "assistant"]


def _said(value: Any) -> str:
    """A setting in a sentence."""
    return ",".join(f"{one:g}" for one in value) if isinstance(value, list) else str(value)
