"""Tools that an answer may call: those of a request, the grammar of a call, and the calls in an answer's text.

A call is written `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, as most chat templates ask for, or as the
bare object, which is also what a call that the request requires is guided to.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from outdraft.api.guided import JSON_OPTIONS
from outdraft.serving.errors import bad_request
from outdraft.serving.protocol import ChatRequest, NamedTool

OPEN, CLOSE = "<tool_call>", "</tool_call>"


@dataclass(frozen=True)
class Tools:
    """The functions that an answer may call.

    Attributes:
        offered: as the request has them, which is what chat templates take.
        required: the answer must be a call, of one of these functions.
        single: the answer has one call at most.
    """

    offered: Sequence[Mapping[str, Any]]
    required: bool = False
    single: bool = False

    @property
    def names(self) -> frozenset[str]:
        return frozenset(tool["function"]["name"] for tool in self.offered)

    def response_format(self) -> dict[str, Any] | None:
        """What a required call looks like; None where the answer may be text."""
        if not self.required:
            return None
        # Every schema is a document of its own, so that the references in it go to its own definitions.
        rules = ["start: " + " | ".join(f"call_{place}" for place in range(len(self.offered)))]
        for place, tool in enumerate(self.offered):
            begin = f'{{"name": {json.dumps(tool["function"]["name"])}, "arguments": '
            given = tool["function"].get("parameters") or {"type": "object", "additionalProperties": False}
            schema = {"x-guidance": JSON_OPTIONS, **given}
            rules.append(f'call_{place}: {json.dumps(begin)} arguments_{place} "}}"')
            rules.append(f"arguments_{place}: %json {json.dumps(schema)}")
        return {"type": "grammar", "grammar": "\n".join(rules)}


def tools_of(request: ChatRequest, tokenizer: PreTrainedTokenizerBase) -> Tools | None:
    """The tools that a request offers; None where there are none, or none may be called.

    Raises:
        ApiError: the chosen tool is not offered, two have one name, or the model's chat template takes no tools.
    """
    choice, given = request.tool_choice, request.tools or []
    if choice not in (None, "none", "auto") and not given:
        raise bad_request("tool_choice needs tools", "tool_choice")
    if choice == "none" or not given:
        return None
    offered = [tool.model_dump(exclude_none=True) for tool in given]
    tools = Tools(offered, choice == "required", request.parallel_tool_calls is False)
    if len(tools.names) < len(offered):
        raise bad_request("two tools have the same name", "tools")
    if not _reads(tokenizer, "tools", offered):
        raise bad_request("tools are not supported: the model's chat template takes none", "tools")
    if isinstance(choice, NamedTool):
        named = [tool for tool in offered if tool["function"]["name"] == choice.function.name]
        if not named:
            raise bad_request(f"tool_choice names {choice.function.name!r}, which is none of tools", "tool_choice")
        return Tools(named, True, True)
    return tools


def check_beside(messages: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise an ApiError if a conversation has calls of tools, or thoughts, that the chat template would leave out."""
    for name in ("tool_calls", "reasoning_content"):
        if any(name in message for message in messages) and not _reads(tokenizer, name):
            raise bad_request(f"the model's chat template takes no {name}", "messages")


def _reads(tokenizer: PreTrainedTokenizerBase, name: str, tools: Any = None) -> bool:
    """Whether the chat template speaks of `name`."""
    try:
        template = tokenizer.get_chat_template(tools=tools)
    except ValueError:  # there is none, which is said where the conversation is encoded
        return True
    return re.search(rf"\b{name}\b", template) is not None


class CallReader:
    """Tells the calls in an answer's text from what is said beside them, while the text comes.

    Text is held back while it may be a call, and handed out as text if it turns out to be none: its JSON is broken, or
    the function is not among those offered.
    """

    def __init__(self, tools: Tools):
        self.tools = tools
        self.calls = 0
        """How many there were."""
        self._held = ""
        self._said = False  # whether any text was handed out
        self._after_call = False  # nothing was said since the last call

    def add(self, text: str, last: bool = False) -> tuple[str, list[dict[str, Any]]]:
        """Take in more of the text; returns the text that is no call, and the calls, in OpenAI's format.

        Args:
            last: no more comes.
        """
        self._held += text
        said, calls = "", list[dict[str, Any]]()
        while self._held:
            start = self._held.find(OPEN)
            if start == 0:
                end = self._held.find(CLOSE)
                if end < 0 and not last:
                    break
                whole = self._held if end < 0 else self._held[: end + len(CLOSE)]
                found = self._read(whole.removeprefix(OPEN).removesuffix(CLOSE))
            elif start < 0 and not self._said and self._held.lstrip()[:1] in ("", "{", "["):
                if not last:  # perhaps a bare call, which ends with the answer
                    break
                whole = self._held
                found = self._read(whole, bare=True)
            else:
                cut = start if start > 0 else len(self._held) - (0 if last else _overlap(self._held, OPEN))
                whole, found = self._held[:cut], None
                if not cut or (start < 0 and not last and not self._said and not whole.strip()):
                    break
            self._held = self._held[len(whole) :]
            if found is None:
                said += self._say(whole, before_call=start > 0)
            else:
                calls += found
        return said, calls

    def _say(self, text: str, before_call: bool) -> str:
        """A text that is no call, without the white space that only parts it from calls."""
        if self._after_call or (before_call and not self._said):
            text = text.lstrip()
        if text:
            self._said, self._after_call = True, False
        return text

    def _read(self, text: str, bare: bool = False) -> list[dict[str, Any]] | None:
        """The calls that a text is the JSON of: one, or where it is bare a list of some; None where it is no call."""
        try:
            given = json.loads(text)
            calls = [self._call(one) for one in (given if bare and isinstance(given, list) and given else [given])]
        except (ValueError, RecursionError):
            return None
        if self.tools.single:  # what comes after the first call is dropped
            calls = calls[:1] if self.calls == 0 else []
        for place, call in enumerate(calls, start=self.calls):
            call["index"] = place
        self.calls += len(calls)
        self._after_call = True
        return calls

    def _call(self, given: Any) -> dict[str, Any]:
        """A call in OpenAI's format.

        Raises:
            ValueError: it is none.
        """
        arguments = given.get("arguments", given.get("parameters", {})) if isinstance(given, dict) else None
        if not isinstance(arguments, dict) or str(given.get("name")) not in self.tools.names:
            raise ValueError
        written = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
        function = {"name": given["name"], "arguments": written}
        return {"index": 0, "id": f"call_{uuid.uuid4().hex}", "type": "function", "function": function}


def _overlap(text: str, mark: str) -> int:
    """How many characters at the end of a text are the beginning of a mark."""
    return next((n for n in range(min(len(text), len(mark) - 1), 0, -1) if text.endswith(mark[:n])), 0)
