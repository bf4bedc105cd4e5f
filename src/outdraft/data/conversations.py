"""Conversations from records of data: several formats become one, and every error names file and line.

The reader takes `{"messages": [...]}`, ShareGPT's `{"conversations": [...]}`, `{"text": ...}`, and bare questions with
or without an answer: `{"prompt": ...}`, Alpaca's `{"instruction", "input", "output"}`, `{"question", "answer"}`,
Spec-Bench's `{"turns": [...]}`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from outdraft.data.messages import Message, tools_of, turns_of, was_cut
from outdraft.data.records import ANSWERS, BadRecord, bare_question, data_files, read_records
from outdraft.errors import UserError

OnBadLine = Literal["error", "skip"]

SHAPES = '{"messages": [...]}, {"conversations": [...]}, {"prompt": "..."} or {"text": "..."}'


@dataclass(frozen=True)
class Conversation:
    """A record of the data: either the turns of a chat or the text of a document."""

    source: str
    """The record's `file:line`, for messages to the user."""
    messages: tuple[Message, ...] = ()
    """The turns `{"role", "content"}` with the fields of tool calls, in the order of the data (`messages.py`).
    Spec-Bench's `turns` are the user's only."""
    text: str | None = None
    """A plain document for base models; None for a chat."""
    bare: bool = False
    """True for a question without turns, which a model without a chat template can continue as it is."""
    cut: frozenset[int] = frozenset()
    """The indices of assistant turns that were cut off and get no end token; 0 for a text."""
    id: int | str | None = None
    """The record's own id, where it has one."""
    origin: str | None = None
    """The record's `source`."""
    tools: tuple[Any, ...] = ()
    """The tools that the assistant may call, as chat templates take them."""

    @property
    def asked(self) -> list[list[Message]]:
        """Return the turns before each answer that a model can give in the assistant's place, without the answer.

        Turns that call tools stay as they are, for their results follow, and so does a turn that answers nobody.
        Without assistant turns, every turn of the user is a question.
        """
        silent = all(message["role"] != "assistant" for message in self.messages)
        found, said = list[list[Message]](), list[Message]()
        for place, message in enumerate(self.messages):
            answers = said and said[-1]["role"] in ("user", "tool")
            if message["role"] == "assistant" and answers and not message.get("tool_calls"):
                found.append(said)
                said = []
                continue
            said.append({**message, "finished": False} if place in self.cut else message)
            if silent and message["role"] == "user":
                found.append(said)
                said = []
        if said and said[-1]["role"] in ("user", "tool"):
            found.append(said)
        return found

    @property
    def questions(self) -> list[Message]:
        """The turns that are not the assistant's."""
        return [message for message in self.messages if message["role"] != "assistant"]

    def record(self) -> dict[str, Any]:
        """Return a record that reads as this conversation again."""
        if self.text is not None:
            return {"text": self.text, **({"finished": False} if self.cut else {})}
        messages: list[dict[str, Any]] = [dict(message) for message in self.messages]
        last = last_answer(self.messages)
        for place in self.cut - {last}:
            messages[place]["finished"] = False
        tools = {"tools": list(self.tools)} if self.tools else {}
        return {**({"finished": False} if last in self.cut else {}), **tools, "messages": messages}


def last_answer(messages: Sequence[Message]) -> int:
    """Return the index of the last assistant turn; -1 where there is none."""
    return max((place for place, message in enumerate(messages) if message["role"] == "assistant"), default=-1)


@dataclass
class ConversationSet:
    """The conversations in the order of the files and their lines."""

    conversations: list[Conversation] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    """A line for every record that could not be used, with `on_bad_line="skip"`."""

    def __len__(self) -> int:
        return len(self.conversations)

    def __iter__(self) -> Iterator[Conversation]:
        return iter(self.conversations)


def read_conversations(path: str | Path, on_bad_line: OnBadLine = "error") -> ConversationSet:
    """Read all records of a file, of every `*.jsonl` and `*.parquet` of a folder by name, or of `hf:NAME`.

    A file is JSON lines, a JSON list, Parquet, or a text with a prompt a line.

    Args:
        path: the file, the folder or the data set.
        on_bad_line: `error` stops at the first record that cannot be used; `skip` leaves it out and lists it.

    Raises:
        UserError: the path is missing, a record cannot be used (and `on_bad_line="error"`), or nothing is left.
    """
    found = ConversationSet()
    for file in data_files(path):
        for source, _, record in read_records(file):
            try:
                found.conversations.append(_conversation(source, record))
            except BadRecord as problem:
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


def _conversation(source: str, record: Any) -> Conversation:
    if isinstance(record, BadRecord):
        raise record
    if not isinstance(record, dict):
        raise BadRecord(f"a record must be an object such as {SHAPES}")
    name, origin = record.get("id"), record.get("source")
    known: dict[str, Any] = {
        "id": name if isinstance(name, int | str) else None,
        "origin": origin if isinstance(origin, str) else None,
    }
    unfinished = was_cut(record)
    for name, role, content in (("messages", "role", "content"), ("conversations", "from", "value")):
        if name in record:
            messages = tuple(turns_of(record[name], role, content))
            cut = {place for place, turn in enumerate(record[name]) if was_cut(turn)}
            last = {last_answer(messages)} if unfinished else set()
            said: dict[str, Any] = {"cut": frozenset(cut | last), "tools": tuple(tools_of(record))}
            return Conversation(source, messages, **said, **known)
    if "text" in record and not isinstance(record.get("instruction"), str):  # Alpaca's `text` is both in a template
        if not isinstance(record["text"], str) or not record["text"].strip():
            raise BadRecord('"text" must be a non-empty string')
        return Conversation(source, text=record["text"], cut=frozenset({0} if unfinished else ()), **known)
    if "turns" in record:
        return Conversation(source, _asked(record["turns"]), **known)
    if (question := bare_question(record)) is not None:
        answers = [record[name] for name in ANSWERS if isinstance(record.get(name), str)]
        spoken = [("user", question), *(("assistant", answer) for answer in answers[:1])]
        messages = tuple({"role": role, "content": content} for role, content in spoken)
        end = frozenset({1} if unfinished and answers else ())
        return Conversation(source, messages, bare=True, cut=end, **known)
    keys = ", ".join(sorted(map(str, record))) or "none"
    raise BadRecord(f"unknown shape with keys: {keys}; expected {SHAPES}")


def _asked(turns: Any) -> tuple[Message, ...]:
    """Convert Spec-Bench's turns, all of them the user's."""
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) and turn.strip() for turn in turns):
        raise BadRecord('"turns" must be a list of non-empty strings')
    return tuple({"role": "user", "content": turn} for turn in turns)
