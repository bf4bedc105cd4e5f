"""The bodies of OpenAI's API, field by field: their types and bounds.

What cannot be honoured is refused, never ignored: an unknown field is an error unless it is null or empty, and so is a
field of `NEUTRAL` unless its value asks for nothing.
"""

from __future__ import annotations

import contextlib
import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr, model_validator

from outdraft.serving.errors import bad_request

Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
TokenId = Annotated[int, Field(strict=True, ge=0, lt=2**31)]
Count = Annotated[int, Field(strict=True, ge=1, lt=2**31)]
Bias = Annotated[float, Field(strict=True, ge=-100, le=100, allow_inf_nan=False)]
TokenKey = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]
Stop = Annotated[StrictStr, Field(min_length=1, max_length=256)]

MAX_CHOICES = 128
MAX_LOGPROBS = 20


class Strict(BaseModel):
    """A part of a body that has no fields but its own."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _without_empty(cls, given: Any) -> Any:
        """Unknown fields that are null or empty ask for nothing; clients send them with what the server sent them."""
        if not isinstance(given, dict):
            return given
        return {name: it for name, it in given.items() if name in cls.model_fields or it not in (None, "", [], {})}


class StreamOptions(Strict):
    """What a stream holds beside text."""

    include_usage: StrictBool | None = None
    """Send one more chunk at the end, with the request's usage and no choices."""
    include_obfuscation: Literal[False] | None = None
    continuous_usage_stats: StrictBool | None = None
    """With `include_usage`: every chunk has the usage so far, as in vLLM."""


class TextPart(Strict):
    """A part of a message."""

    type: Literal["text"]
    text: StrictStr


def refuse_other_than_text(content: Any, kinds: tuple[str, ...], param: str) -> None:
    """Raise an ApiError that names the type of the first part of a content that is none of the `kinds`."""
    for part in content if isinstance(content, list) else []:
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and kind not in kinds:
            raise bad_request(f"content of type '{kind[:64]}' is not supported: the server reads text only", param)


class CalledFunction(Strict):
    """Of a call that an assistant made."""

    name: StrictStr
    arguments: StrictStr = "{}"
    """JSON."""
    parsed_arguments: Any = None
    """The same as OpenAI's client has read it."""


class ToolCall(Strict):
    """A call that an assistant made."""

    id: StrictStr | None = None
    type: Literal["function"] = "function"
    function: CalledFunction
    index: StrictInt | None = None

    def plain(self) -> dict[str, Any]:
        """The call as chat templates take it: its arguments as an object, which they write as JSON."""
        arguments: Any = self.function.arguments
        with contextlib.suppress(ValueError, RecursionError):
            arguments = json.loads(arguments)
        return {"id": self.id, "type": self.type, "function": {"name": self.function.name, "arguments": arguments}}


class Message(Strict):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: StrictStr | list[TextPart] | None = None
    """Null is an assistant's message of no text."""
    name: StrictStr | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=128)] | None = None
    tool_call_id: StrictStr | None = None
    reasoning_content: StrictStr | None = None
    """An assistant's thoughts before the content, for templates that take them."""
    parsed: Any = None
    """The content as OpenAI's client has read it."""

    @model_validator(mode="before")
    @classmethod
    def _of_text(cls, given: Any) -> Any:
        """Refuse content that is not text, naming its type."""
        if isinstance(given, dict):
            refuse_other_than_text(given.get("content"), ("text",), "messages")
            if given.get("content") is None and given.get("role") != "assistant":
                raise bad_request("a message has no content; only an assistant's may have none", "messages")
        return given

    def plain(self) -> dict[str, Any]:
        """The message as chat templates take it."""
        content = self.content or ""
        if not isinstance(content, str):
            content = "".join(part.text for part in content)
        beside: dict[str, Any] = {"name": self.name, "tool_call_id": self.tool_call_id}
        beside["reasoning_content"] = self.reasoning_content or None
        beside["tool_calls"] = [call.plain() for call in self.tool_calls or []] or None
        return {"role": self.role, "content": content, **{name: it for name, it in beside.items() if it is not None}}


class Function(Strict):
    """A function that the answer may call."""

    name: Annotated[str, Field(strict=True, pattern=r"^[a-zA-Z0-9_.-]{1,128}$")]
    description: StrictStr | None = None
    parameters: dict[str, Any] | None = None
    """The JSON schema of its arguments."""
    strict: StrictBool | None = None


class Tool(Strict):
    """Something that the answer may call."""

    type: Literal["function"]
    function: Function


class NamedFunction(Strict):
    """The name of a function."""

    name: StrictStr


class NamedTool(Strict):
    """The one tool that must be called."""

    type: Literal["function"]
    function: NamedFunction


class StructuredOutputs(Strict):
    """What an answer's text must be, by vLLM's names; one of these."""

    json_: Annotated[dict[str, Any] | StrictStr | None, Field(alias="json")] = None
    json_object: Literal[True] | None = None
    regex: StrictStr | None = None
    choice: list[StrictStr] | None = None
    grammar: StrictStr | None = None

    def response_format(self) -> dict[str, Any]:
        """The same as a `response_format`."""
        given = [(name, value) for name, value in self if value is not None]
        if len(given) != 1:
            raise bad_request(
                "structured_outputs needs one of json, json_object, regex, choice, grammar", "structured_outputs"
            )
        ((name, value),) = given
        if name == "json_":
            return {"type": "json_schema", "json_schema": {"schema": value}}
        return {"type": name} if name == "json_object" else {"type": name, name: value}


class SamplingRequest(Strict):
    """What all requests for answers have in common."""

    model: StrictStr | None = None
    stream: StrictBool | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    seed: Annotated[int, Field(strict=True, ge=-(2**63), lt=2**63)] | None = None
    temperature: Annotated[Number, Field(ge=0, le=100)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(strict=True, ge=-1, lt=2**31)] | None = None
    """0 and -1 keep all."""
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[Number, Field(ge=0.01, le=100)] | None = None
    logit_bias: Annotated[dict[TokenKey, Bias], Field(max_length=1024)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=1024)] | None = None
    """Further tokens that end an answer, as an end of sequence does."""
    min_tokens: Annotated[int, Field(strict=True, ge=0, lt=2**31)] | None = None
    """No end of sequence before so many tokens."""
    ignore_eos: StrictBool | None = None
    """Go on past an end of sequence, until `max_tokens`; for measurements."""
    skip_special_tokens: StrictBool | None = None
    """False spells special tokens out in the text, except the one that ends an answer."""
    structured_outputs: StructuredOutputs | None = None
    speculative: StrictBool | None = None
    """False decodes without the drafter, for comparison."""
    user: StrictStr | None = None
    metadata: dict[str, StrictStr] | None = None
    safety_identifier: StrictStr | None = None
    prompt_cache_key: StrictStr | None = None

    @classmethod
    def neutral(cls) -> dict[str, tuple[tuple[Any, ...], str]]:
        """Parameters that are not offered, as in `NEUTRAL`."""
        return NEUTRAL

    @model_validator(mode="before")
    @classmethod
    def _neutral(cls, given: Any) -> Any:
        """Drop the fields of `NEUTRAL` that ask for nothing, and refuse those that ask for something."""
        if not isinstance(given, dict):
            return given
        neutral = {name: it for name, it in cls.neutral().items() if name not in cls.model_fields}
        for name, (values, reason) in neutral.items():
            same_type = (one for one in values if type(one) is type(given.get(name)))  # for 1 == True
            if name in given and given[name] not in same_type:
                raise bad_request(f"{name} is not supported: {reason}", name, "unsupported_parameter")
        return {name: value for name, value in given.items() if name not in neutral}

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])


class GenerationRequest(SamplingRequest):
    """What chats and completions have in common."""

    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(strict=True, ge=1, le=MAX_CHOICES)] | None = None
    max_tokens: Count | None = None
    prompt_logprobs: Annotated[int, Field(strict=True, ge=0, le=MAX_LOGPROBS)] | None = None
    """Report the logprobs of the prompt's tokens, with so many alternatives each, in vLLM's format."""
    response_format: dict[str, Any] | None = None
    """What the answer's text must be: JSON, JSON of a schema, and by our own names what `structured_outputs` has."""
    return_pieces: StrictBool | None = None
    """Report for every piece of text whether a drafter had guessed it (`pieces` of a choice)."""

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


class Templated(Strict):
    """What is asked of a conversation's chat template."""

    add_generation_prompt: StrictBool | None = None
    continue_final_message: StrictBool | None = None
    """Both follow from the conversation: an assistant's message at its end is continued."""
    chat_template_kwargs: dict[str, Any] | None = None
    """The chat template's own switches, such as `enable_thinking`."""
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None


class ChatRequest(GenerationRequest, Templated):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)]
    max_completion_tokens: Count | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: StrictBool | None = None
    """False keeps an answer's first call only."""
    logprobs: StrictBool | None = None
    top_logprobs: Annotated[int, Field(strict=True, ge=0, le=MAX_LOGPROBS)] | None = None


class CompletionRequest(GenerationRequest):
    """POST /v1/completions."""

    prompt: (
        StrictStr
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[StrictStr], Field(min_length=1, max_length=MAX_CHOICES)]
        | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1, max_length=MAX_CHOICES)]
    )
    max_tokens: Annotated[int, Field(strict=True, ge=0, lt=2**31)] | None = None
    """0 scores the prompt alone, with `echo` or `prompt_logprobs`."""
    logprobs: Annotated[int, Field(strict=True, ge=0, le=MAX_LOGPROBS)] | None = None
    """How many alternatives to report beside each token's logprob; `echo` reports the prompt's, too."""
    echo: StrictBool | None = None
    add_special_tokens: StrictBool | None = None
    """Whether texts get the tokenizer's special tokens; yes by default."""

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, each a text or token ids."""
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)


class TokenizeRequest(Templated):
    """POST /tokenize: a text, or a conversation through the chat template."""

    model: StrictStr | None = None
    prompt: StrictStr | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)] | None = None
    add_special_tokens: StrictBool | None = None
    """Whether a text gets the tokenizer's special tokens; yes by default."""
    return_token_strs: StrictBool | None = None
    """Also return the tokens as the vocabulary spells them."""


class DetokenizeRequest(Strict):
    """POST /detokenize."""

    model: StrictStr | None = None
    tokens: list[TokenId]


_TEXT = "the server answers with text only"
_TOOLS = "tools are for chats, as tools and tool_choice"
_STORE = "nothing is stored here"

NEUTRAL: dict[str, tuple[tuple[Any, ...], str]] = {
    "tools": ((None, []), _TOOLS),
    "tool_choice": ((None, "none", "auto"), _TOOLS),
    "functions": ((None, []), _TOOLS),
    "function_call": ((None, "none"), _TOOLS),
    "parallel_tool_calls": ((None, True, False), _TOOLS),
    "modalities": ((None, ["text"]), _TEXT),
    "audio": ((None,), _TEXT),
    "prediction": ((None,), "drafts come from the server's drafter"),
    "web_search_options": ((None,), "the server reaches nothing outside"),
    "reasoning_effort": ((None, "none"), "models here have no such setting"),
    "verbosity": ((None, "medium"), "models here have no such setting"),
    "service_tier": ((None, "auto", "default"), "there is one tier"),
    "store": ((None, False), _STORE),
    "suffix": ((None, ""), "text is written from left to right"),
    "echo": ((None, False), "it is for completions"),
    "add_special_tokens": ((None, False), "the chat template adds its own"),
    "best_of": ((None, 1), "ask for n choices and choose"),
    "include_stop_str_in_output": ((None, False), "a stop string is no part of the answer"),
    "spaces_between_special_tokens": ((None, True), "special tokens are no text"),
    "length_penalty": ((None, 1, 1.0), "it is for beam search"),
    "priority": ((None, 0), "requests are answered in the order in which they came"),
    "return_token_ids": ((None, False), "see logprobs and /tokenize"),
    "return_tokens_as_token_ids": ((None, False), "see logprobs and /tokenize"),
    "use_beam_search": ((None, False), "beam search is not sampling from the model's output distribution"),
}
"""Parameters of OpenAI and vLLM that are not offered -> the values that ask for nothing, why others are refused."""
