"""Conversations from records of data: several formats become one, and every error names file and line.

The reader takes `{"messages": [...]}`, ShareGPT's `{"conversations": [...]}`, TRL's `{"prompt": [...], "completion":
[...]}`, `{"text": ...}`, and bare questions with or without an answer: `{"prompt": ...}`, Alpaca's `{"instruction",
"input", "output"}`, `{"question", "answer"}`, Spec-Bench's `{"turns": [...]}`. Turns become those that chat templates
take: names of roles, texts in parts, tool calls and finish reasons are converted. The template decides in which order
roles may speak.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from outdraft.data.records import ANSWERS, BadRecord, bare_question, data_files, read_records, sound
from outdraft.errors import UserError

Message = dict[str, Any]
"""A turn `{"role", "content"}`, with the fields of `KEPT` that it has."""

NAMES = {
    "system": ("system",),
    "developer": ("developer",),
    "user": ("user", "human"),
    "assistant": ("assistant", "gpt", "chatgpt", "bot", "model", "ai", "function_call", "tool_call"),
    "tool": ("tool", "ipython", "function", "function_response", "tool_response", "observation"),
}
ROLES = {name: role for role, names in NAMES.items() for name in names}
"""The roles of chat templates by the names that data have for them."""

KEPT = ("name", "tool_call_id", "reasoning_content")
"""The other fields of a turn that a template may read."""

ENDED = {"stop", "eos", "eos_token", "end_turn", "complete", "completed", "tool_calls", "function_call", "tool_use"}
"""The finish reasons of answers that the model ended itself; after any other there is no end token."""


def turns_in(record: Mapping[str, Any]) -> list[Any] | None:
    """Return the turns that a record lists, as it has them; None for a record of another shape.

    They are `messages`, ShareGPT's `conversations`, or TRL's `prompt` and `completion` as lists. The record's own
    `system` text is a turn before them.

    Raises:
        BadRecord: they are no list, or an empty one.
    """
    if isinstance(turns := record.get("prompt"), list):
        turns = turns + (record.get("completion") or [])
    elif (turns := record.get("messages", record.get("conversations"))) is None:
        return None
    if not isinstance(turns, list) or not turns:
        raise BadRecord("the list of turns is empty or no list")
    system, first = record.get("system"), turns[0] if isinstance(turns[0], dict) else {}
    if (
        isinstance(system, str)
        and system.strip()
        and first.get("role", first.get("from")) not in ("system", "developer")
    ):
        return [{"role": "system", "content": system}, *turns]
    return turns


def turns_of(turns: Sequence[Any]) -> list[Message]:
    """Convert turns, one for one.

    Raises:
        BadRecord: the value is no list of turns, or a turn has no known role or no text.
    """
    messages = [_turn(turn) for turn in turns]
    if not any(message["role"] in ("user", "assistant", "tool") for message in messages):
        raise BadRecord("no turn of a user or an assistant")
    return messages


def was_cut(record: Mapping[str, Any]) -> bool:
    """Return True if an answer was cut, by `finished`, or by `finish_reason` as servers give it."""
    reason = record.get("finish_reason") or record.get("stop_reason")
    return record.get("finished") is False or (isinstance(reason, str) and reason.lower() not in ENDED)


def tools_of(record: Mapping[str, Any]) -> list[Any]:
    """Return the callable tools of a record, which has a list or its JSON.

    Raises:
        BadRecord: the field is something else.
    """
    tools = record.get("tools") or []
    if isinstance(tools, str):
        try:
            tools = sound(json.loads(tools)) if tools.strip() else []
        except ValueError:
            tools = None
    if not isinstance(tools, list):
        raise BadRecord('"tools" must be a list of tools, or its JSON')
    return tools


def for_template(message: Mapping[str, Any]) -> Message:
    """Return a turn as chat templates take it: parts of text are joined, and the arguments of calls are objects.

    Raises:
        BadRecord: a part is no text.
    """
    content, calls = message.get("content"), _calls(message)
    if content is None and message.get("role") == "assistant":
        content = ""
    text = _text(content)
    return {**message, "content": content if text is None else text, **({"tool_calls": calls} if calls else {})}


def _turn(turn: Any) -> Message:
    old = isinstance(turn, dict) and "role" not in turn and "from" in turn
    role_key, content_key = ("from", "value") if old else ("role", "content")
    if not isinstance(turn, dict) or role_key not in turn:
        raise BadRecord('every turn needs "role" and a string "content", or "from" and "value"')
    said = str(turn[role_key]).lower()
    role = ROLES.get(said)
    if role is None:
        raise BadRecord(f'unknown role "{turn[role_key]}"; known are {", ".join(ROLES)}')
    calls, content = _calls(turn), turn.get(content_key)
    if said in ("function_call", "tool_call") and not calls and (call := _parsed(content)) is not None:
        calls, content = [_with_object({"type": "function", "function": call})], None
    if content is None and (calls or role == "tool"):  # a tool may have nothing to say
        content = ""
    elif role == "tool" and not isinstance(content, str) and not _has_parts(content):
        content = json.dumps(content, ensure_ascii=False)
    text = _text(content)
    if text is None:
        raise BadRecord(f'every turn needs "{role_key}" and a string "{content_key}"')
    kept = {name: turn[name] for name in KEPT if turn.get(name)}
    return {"role": role, "content": text, **kept, **({"tool_calls": calls} if calls else {})}


def _has_parts(content: Any) -> bool:
    """Whether a content is a list of texts or of OpenAI's parts, and not a result of its own."""
    return isinstance(content, list) and all(
        isinstance(part, str) or (isinstance(part, dict) and ("text" in part or "type" in part)) for part in content
    )


def _text(content: Any) -> str | None:
    """Return a text, or the joined parts of one; None for anything else."""
    if not isinstance(content, Sequence) or isinstance(content, str):
        return content if isinstance(content, str) else None
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, dict) else part
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise BadRecord(f'a part of the content is no text but "{kind}"')
        texts.append(text)
    return "".join(texts)


def _calls(turn: Mapping[str, Any]) -> list[Any]:
    """Return a turn's tool calls with their arguments as an object, which templates write as JSON."""
    calls = turn.get("tool_calls")
    if not calls and isinstance(turn.get("function_call"), dict):  # OpenAI's first form
        calls = [{"type": "function", "function": turn["function_call"]}]
    if not isinstance(calls, list):
        return []
    return [_with_object(call) if isinstance(call, dict) else call for call in calls]


def _with_object(call: dict[str, Any]) -> dict[str, Any]:
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    arguments = _parsed(function["arguments"], named=False)
    return call if arguments is None else {**call, "function": {**function, "arguments": arguments}}


def _parsed(text: Any, named: bool = True) -> dict[str, Any] | None:
    """Parse a JSON object; None for other texts and, with `named`, for objects without a name (which calls need).

    Raises:
        BadRecord: a text in it is none.
    """
    try:
        found = sound(json.loads(text))
    except (TypeError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and ("name" in found or not named) else None


OnBadLine = Literal["error", "skip"]

SHAPES = '{"messages": [...]}, {"conversations": [...]}, {"prompt": "..."} or {"text": "..."}'


@dataclass(frozen=True)
class Conversation:
    """A record of the data: either the turns of a chat or the text of a document."""

    source: str
    """The record's `file:line`, for messages to the user."""
    messages: tuple[Message, ...] = ()
    """The turns `{"role", "content"}` with the fields of tool calls, in the order of the data.
    Spec-Bench's `turns` are the user's only."""
    text: str | None = None
    """A plain document for base models; None for a chat."""
    bare: bool = False
    """True for a question without turns, which a model without a chat template can continue as it is."""
    cut: frozenset[int] = frozenset()
    """The indices of assistant turns that were cut off and get no end token; 0 for a text."""
    untrained: frozenset[int] = frozenset()
    """The indices of assistant turns of weight 0, which are read and not learned."""
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
        return [message for message in self.messages if message["role"] != "assistant"]

    def record(self) -> dict[str, Any]:
        """Return a record that reads as this conversation again."""
        if self.text is not None:
            return {"text": self.text, **({"finished": False} if self.cut else {})}
        messages: list[dict[str, Any]] = [dict(message) for message in self.messages]
        last = last_answer(self.messages)
        for place in self.cut - {last}:
            messages[place]["finished"] = False
        for place in self.untrained:
            messages[place]["weight"] = 0
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

    A file is JSON lines, a JSON list, a table, Parquet, or a text with a prompt a line.

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


def _untrained(turns: Sequence[Any], messages: Sequence[Message]) -> frozenset[int]:
    """Return the indices of assistant turns of OpenAI's `weight` 0; one that is neither 0 nor 1 raises BadRecord."""
    weights = {i: turn.get("weight") for i, turn in enumerate(turns) if messages[i]["role"] == "assistant"}
    if odd := [weight for weight in weights.values() if weight not in (None, 0, 1)]:
        raise BadRecord(f'the "weight" of a turn must be 0 or 1, not {odd[0]!r}')
    return frozenset(place for place, weight in weights.items() if weight == 0)


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
    if (turns := turns_in(record)) is not None:
        messages = tuple(turns_of(turns))
        cut = {place for place, turn in enumerate(turns) if was_cut(turn)}
        last = {last_answer(messages)} if unfinished else set()
        said: dict[str, Any] = {"cut": frozenset(cut | last), "tools": tuple(tools_of(record))}
        return Conversation(source, messages, untrained=_untrained(turns, messages), **said, **known)
    if "text" in record and not isinstance(record.get("instruction"), str):  # Alpaca's `text` is both in a template
        if not isinstance(record["text"], str) or not record["text"].strip():
            raise BadRecord('"text" must be a non-empty string')
        return Conversation(source, text=record["text"], cut=frozenset({0} if unfinished else ()), **known)
    if "turns" in record:
        turns = record["turns"]  # Spec-Bench's, all of them the user's
        if not isinstance(turns, list) or not turns or not all(isinstance(one, str) and one.strip() for one in turns):
            raise BadRecord('"turns" must be a list of non-empty strings')
        return Conversation(source, tuple({"role": "user", "content": one} for one in turns), **known)
    if (question := bare_question(record)) is not None:
        answers = [record[name] for name in ANSWERS if isinstance(record.get(name), str)]
        spoken = [("user", question), *(("assistant", answer) for answer in answers[:1])]
        messages = tuple({"role": role, "content": content} for role, content in spoken)
        end = frozenset({1} if unfinished and answers else ())
        return Conversation(source, messages, bare=True, cut=end, **known)
    keys = ", ".join(sorted(map(str, record))) or "none"
    raise BadRecord(f"unknown shape with keys: {keys}; expected {SHAPES}")
