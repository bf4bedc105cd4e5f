"""The body of POST /v1/responses, in its simple form, field by field, and the chat that it asks for.

Nothing is stored, so a conversation is sent whole with every request, as for chats.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, StrictBool, StrictStr, Tag, model_validator

from outdraft.serving.errors import bad_request
from outdraft.serving.protocol import (
    MAX_LOGPROBS,
    NEUTRAL,
    CalledFunction,
    ChatRequest,
    Count,
    Function,
    Message,
    NamedFunction,
    NamedTool,
    SamplingRequest,
    Strict,
    Tool,
    ToolCall,
    refuse_other_than_text,
)

LOGPROBS = "message.output_text.logprobs"
"""What `include` asks for logprobs by."""

PARAMS = {"messages": "input", "max_tokens": "max_output_tokens", "response_format": "text"}
"""Parameters of chats and their names here."""


class Part(Strict):
    """A part of a message; what an answer's part has beside its text is not read."""

    type: Literal["input_text", "output_text", "text"]
    text: StrictStr
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None
    parsed: Any = None
    """The text as OpenAI's client has read it."""


class _OfText(Strict):
    """An item whose content is text."""

    @model_validator(mode="before")
    @classmethod
    def _of_text(cls, given: Any) -> Any:
        """Refuse content that is not text, naming its type."""
        if isinstance(given, dict):
            kinds = ("input_text", "output_text", "text")
            refuse_other_than_text(given.get("content") or given.get("output"), kinds, "input")
        return given


class InputMessage(_OfText):
    """A turn of the conversation; those of the server itself have an id and a status, too."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: StrictStr | list[Part]
    id: StrictStr | None = None
    status: StrictStr | None = None


class FunctionCall(Strict):
    """A call that an answer made."""

    type: Literal["function_call"]
    call_id: StrictStr
    name: StrictStr
    arguments: StrictStr
    parsed_arguments: Any = None
    """The same as OpenAI's client has read it."""
    id: StrictStr | None = None
    status: StrictStr | None = None


class FunctionCallOutput(_OfText):
    """What a function said that an answer had called."""

    type: Literal["function_call_output"]
    call_id: StrictStr
    output: StrictStr | list[Part]
    id: StrictStr | None = None
    status: StrictStr | None = None


def _kind(item: Any) -> str:
    """The kind of an item; a message need not say it."""
    return str(item.get("type") or "message") if isinstance(item, dict) else str(getattr(item, "type", "message"))


Item = Annotated[
    Annotated[InputMessage, Tag("message")]
    | Annotated[FunctionCall, Tag("function_call")]
    | Annotated[FunctionCallOutput, Tag("function_call_output")],
    Discriminator(_kind),
]
Items = Annotated[list[Item], Field(min_length=1, max_length=4096)]


class _Function(Strict):
    type: Literal["function"]


class FunctionTool(Function, _Function):
    """A function that the answer may call."""


class ChosenFunction(NamedFunction, _Function):
    """The one function that must be called."""


class Format(Strict):
    """What the answer's text must be."""

    type: Literal["text", "json_object", "json_schema"]
    name: StrictStr | None = None
    description: StrictStr | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: StrictBool | None = None

    def response_format(self) -> dict[str, Any]:
        """The same in a chat's words."""
        given = self.model_dump(by_alias=True, exclude_none=True, exclude={"type"})
        return {"type": self.type, **({"json_schema": given} if self.type == "json_schema" else given)}


class TextSettings(Strict):
    """Settings of the answer's text."""

    format: Format | None = None
    verbosity: Literal["medium"] | None = None


class ResponseStreamOptions(Strict):
    """What a stream holds beside events."""

    include_obfuscation: Literal[False] | None = None


class ResponsesRequest(SamplingRequest):
    """POST /v1/responses."""

    input: Annotated[
        Annotated[StrictStr, Tag("text")] | Annotated[Items, Tag("items")],
        Discriminator(lambda given: "text" if isinstance(given, str) else "items"),
    ]
    instructions: StrictStr | None = None
    """A system message before the input."""
    max_output_tokens: Count | None = None
    stream_options: ResponseStreamOptions | None = None
    text: TextSettings | None = None
    tools: Annotated[list[FunctionTool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ChosenFunction | None = None
    parallel_tool_calls: StrictBool | None = None
    include: list[Literal["message.output_text.logprobs", "reasoning.encrypted_content"]] | None = None
    top_logprobs: Annotated[int, Field(strict=True, ge=0, le=MAX_LOGPROBS)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @classmethod
    def neutral(cls) -> dict[str, tuple[tuple[Any, ...], str]]:
        """Parameters that are not offered, as in `NEUTRAL`."""
        stored, nothing = "nothing is stored here: send the whole conversation", "models here have no such setting"
        unset = (None, *(dict.fromkeys(names) for names in ((), ("effort",), ("summary",), ("effort", "summary"))))
        return NEUTRAL | {
            "previous_response_id": ((None,), stored),
            "conversation": ((None,), stored),
            "prompt": ((None,), stored),
            "background": ((None, False), stored),
            "truncation": ((None, "disabled"), "a prompt is never cut"),
            "reasoning": (unset, nothing),
            "max_tool_calls": ((None,), "functions are called by the client"),
        }

    def chat(self) -> ChatRequest:
        """The same as a chat."""
        own = {name: getattr(self, name) for name in SamplingRequest.model_fields if getattr(self, name) is not None}
        chosen, logprobs = self.tool_choice, LOGPROBS in (self.include or [])
        if self.top_logprobs and not logprobs:
            raise bad_request(f"top_logprobs needs include: ['{LOGPROBS}']", "top_logprobs")
        form = None if self.text is None or self.text.format is None else self.text.format.response_format()
        tools = [
            Tool(type="function", function=Function(**tool.model_dump(exclude={"type"}))) for tool in self.tools or []
        ]
        if isinstance(chosen, ChosenFunction):
            chosen = NamedTool(type="function", function=NamedFunction(name=chosen.name))  # type: ignore[assignment]
        return ChatRequest.model_construct(
            **own,
            messages=list(self._messages()),
            max_completion_tokens=self.max_output_tokens,
            response_format=form,
            tools=tools or None,
            tool_choice=chosen,
            parallel_tool_calls=self.parallel_tool_calls,
            logprobs=logprobs or None,
            top_logprobs=self.top_logprobs,
            chat_template_kwargs=self.chat_template_kwargs,
        )

    def _messages(self) -> Iterator[Message]:
        """The conversation; calls that follow each other, or an answer's text, are of one message."""
        if self.instructions:
            yield Message(role="system", content=self.instructions)
        items = [InputMessage(role="user", content=self.input)] if isinstance(self.input, str) else self.input
        said: Message | None = None  # an assistant's message that calls may belong to
        for item in items:
            if isinstance(item, FunctionCall):
                said = said or Message(role="assistant")
                call = ToolCall(id=item.call_id, function=CalledFunction(name=item.name, arguments=item.arguments))
                said.tool_calls = [*(said.tool_calls or []), call]
                continue
            if said is not None:
                yield said
                said = None
            if isinstance(item, FunctionCallOutput):
                yield Message(role="tool", content=_text(item.output), tool_call_id=item.call_id)
                continue
            message = Message(role=item.role, content=_text(item.content))
            if item.role == "assistant":
                said = message
            else:
                yield message
        if said is not None:
            yield said


def _text(content: str | list[Part]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)
