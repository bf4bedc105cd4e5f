"""Turns of conversations, converted from the formats of data to the one that chat templates take.

The conversion covers names of roles, texts in parts, tool calls and finish reasons. The template decides in which order
roles may speak.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from outdraft.data.records import BadRecord

Message = dict[str, Any]
"""A turn `{"role", "content"}`, with the fields of `KEPT` that it has."""

ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}

KEPT = ("name", "tool_call_id", "reasoning_content")
"""The other fields of a turn that a template may read."""

ENDED = {"stop", "eos", "eos_token", "end_turn", "tool_calls", "function_call", "tool_use"}
"""The finish reasons of answers that the model ended itself; after any other there is no end token."""


def turns_of(turns: Any, role_key: str = "role", content_key: str = "content") -> list[Message]:
    """Convert the turns of a list, one for one.

    Raises:
        BadRecord: the value is no list of turns, or a turn has no known role or no text.
    """
    if not isinstance(turns, list) or not turns:
        raise BadRecord("the list of turns is empty or no list")
    messages = [_turn(turn, role_key, content_key) for turn in turns]
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
            tools = json.loads(tools) if tools.strip() else []
        except ValueError:
            tools = None
    if not isinstance(tools, list):
        raise BadRecord('"tools" must be a list of tools, or its JSON')
    return tools


def _turn(turn: Any, role_key: str, content_key: str) -> Message:
    if not isinstance(turn, dict) or role_key not in turn:
        raise BadRecord(f'every turn needs "{role_key}" and a string "{content_key}"')
    said = str(turn[role_key]).lower()
    role = ROLES.get(said)
    if role is None:
        raise BadRecord(f'unknown role "{turn[role_key]}"; known are {", ".join(ROLES)}')
    calls, content = _calls(turn), turn.get(content_key)
    if said == "function_call" and not calls and (call := _parsed(content)) is not None:
        calls, content = [_with_object({"type": "function", "function": call})], None
    if content is None and calls:
        content = ""
    elif role == "tool" and isinstance(content, dict):
        content = json.dumps(content, ensure_ascii=False)
    text = _text(content)
    if text is None:
        raise BadRecord(f'every turn needs "{role_key}" and a string "{content_key}"')
    kept = {name: turn[name] for name in KEPT if turn.get(name)}
    return {"role": role, "content": text, **kept, **({"tool_calls": calls} if calls else {})}


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
    """Parse a JSON object; None for other texts and, with `named`, for objects without a name (which calls need)."""
    try:
        found = json.loads(text)
    except (TypeError, ValueError):
        return None
    return found if isinstance(found, dict) and ("name" in found or not named) else None
