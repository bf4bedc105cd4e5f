"""Conversations from JSON lines: three shapes in, one shape out, every mistake named with its file and line.

Reads `{"messages": [...]}`, ShareGPT's `{"conversations": [...]}` and `{"text": ...}`. Knows no tokenizer and no
model: what becomes of a conversation is decided in `tokenization.py` and `regenerate.py`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from outdraft.errors import UserError

Message = dict[str, str]
OnBadLine = Literal["error", "skip"]

ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
}
SHAPES = '{"messages": [...]}, {"conversations": [...]} or {"text": "..."}'


@dataclass(frozen=True)
class Conversation:
    """One line of the data: either the turns of a chat or the text of a document."""

    source: str
    """`file:line`, for messages to the user."""
    messages: tuple[Message, ...] = ()
    """`{"role", "content"}` with roles system, user, assistant; an optional system turn, then user first, in turns."""
    text: str | None = None
    """A plain document for base models; None for a chat."""


@dataclass
class ConversationSet:
    """What was read, in the order of the files and their lines."""

    conversations: list[Conversation] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    """One line for every record that could not be used, with `on_bad_line="skip"`."""

    def __len__(self) -> int:
        return len(self.conversations)

    def __iter__(self) -> Iterator[Conversation]:
        return iter(self.conversations)


class _BadLine(Exception):
    """A record that cannot be used; carries the reason."""


def read_conversations(path: str | Path, on_bad_line: OnBadLine = "error") -> ConversationSet:
    """Read one JSON-lines file, a JSON file that holds a list of records, or every `*.jsonl` of a folder by name.

    Args:
        path: the file or folder.
        on_bad_line: `error` stops at the first record that cannot be used; `skip` leaves it out and lists it.

    Raises:
        UserError: the path is missing, a record cannot be used (and `on_bad_line="error"`), or nothing is left.
    """
    found = ConversationSet()
    for file in data_files(path):
        for source, record in _records(file):
            try:
                found.conversations.append(_conversation(source, record))
            except _BadLine as problem:
                message = f"{source}: {problem}"
                if on_bad_line == "error":
                    raise UserError(
                        f"{message} (mend the line, or leave such lines out with --on-bad-line skip)"
                    ) from None
                found.skipped.append(message)
    if not found.conversations:
        reason = f"all {len(found.skipped)} lines were skipped, first {found.skipped[0]}" if found.skipped else "empty"
        raise UserError(f"no conversation in {path} ({reason}); give --data JSON lines such as {SHAPES}")
    return found


def data_files(path: str | Path) -> list[Path]:
    """The files that `path` stands for, sorted by name.

    Raises:
        UserError: there is none.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(path.glob("*.jsonl"))
        if not files:
            raise UserError(f"no *.jsonl file in {path}; give --data a JSON-lines file or a folder that has some")
        return files
    if not path.is_file():
        raise UserError(f"no such file or folder: {path}; give --data a JSON-lines file or a folder of them")
    return [path]


def _records(file: Path) -> Iterator[tuple[str, bytes | dict[str, Any]]]:
    with file.open("rb") as lines:
        start = lines.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()
        lines.seek(0)
        if start.startswith(b"["):  # ShareGPT is published as one JSON list
            try:
                records = json.load(lines)
            except ValueError as problem:
                raise UserError(
                    f"{file}: not valid JSON ({problem}); mend the file or convert it to JSON lines"
                ) from None
            yield from ((f"{file}:#{i + 1}", record) for i, record in enumerate(records))
            return
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield f"{file}:{number}", line


def _conversation(source: str, record: bytes | dict[str, Any]) -> Conversation:
    if isinstance(record, bytes):
        try:
            record = json.loads(record.decode("utf-8-sig"))
        except UnicodeDecodeError:
            raise _BadLine("not UTF-8 text") from None
        except ValueError as problem:
            raise _BadLine(f"broken JSON, {problem}") from None
    if not isinstance(record, dict):
        raise _BadLine(f"a record must be an object such as {SHAPES}")
    if "messages" in record:
        return Conversation(source, messages=_turns(record["messages"], "role", "content"))
    if "conversations" in record:
        return Conversation(source, messages=_turns(record["conversations"], "from", "value"))
    if "text" in record:
        if not isinstance(record["text"], str) or not record["text"].strip():
            raise _BadLine('"text" must be a non-empty string')
        return Conversation(source, text=record["text"])
    keys = ", ".join(sorted(map(str, record))) or "none"
    raise _BadLine(f"unknown shape with keys: {keys}; expected {SHAPES}")


def _turns(turns: Any, role_key: str, content_key: str) -> tuple[Message, ...]:
    if not isinstance(turns, list) or not turns:
        raise _BadLine("the list of turns is empty or no list")
    messages = []
    for turn in turns:
        if not isinstance(turn, dict) or not isinstance(turn.get(content_key), str):
            raise _BadLine(f'every turn needs "{role_key}" and a string "{content_key}"')
        role = ROLES.get(str(turn.get(role_key)).lower())
        if role is None:
            raise _BadLine(f'unknown role "{turn.get(role_key)}"; known are {", ".join(ROLES)}')
        messages.append({"role": role, "content": turn[content_key]})
    order = [message["role"] for message in messages]
    spoken = order[1:] if order[0] == "system" else order
    if spoken != ["user" if i % 2 == 0 else "assistant" for i in range(len(spoken))] or not spoken:
        raise _BadLine(f"wrong role order ({', '.join(order[:6])}); user and assistant must alternate, user first")
    return tuple(messages)
