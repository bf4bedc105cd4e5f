"""From a request's body to the engine's parameters: prompts as tokens, settings checked against the model.

Everything that can be wrong with a request is found here, before it waits for anything.
"""

from __future__ import annotations

import json
import threading
from typing import Any

from transformers import PreTrainedTokenizerBase

from outdraft.api.guided import Grammar, Vocabulary, source_of
from outdraft.api.prompts import check_prompt, check_switches, encode_chat
from outdraft.api.settings import model_settings, model_stops
from outdraft.core.sampling import LogitBias
from outdraft.core.sampling_settings import SamplingSettings
from outdraft.data.text import decode_text, special_ids
from outdraft.errors import UserError
from outdraft.serving.errors import ApiError, bad_request
from outdraft.serving.jobs import GenerationParams
from outdraft.serving.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    GenerationRequest,
    Message,
    Templated,
    TokenizeRequest,
)
from outdraft.serving.responses import PARAMS, ResponsesRequest
from outdraft.serving.settings import ServeSettings
from outdraft.serving.tools import OPEN, Tools, check_beside, tools_of
from outdraft.target.target import Target

COMPLETION_TOKENS = 16
"""Default `max_tokens` of a completion, as in OpenAI's API."""

LEAST_TEMPERATURE = 1e-6
"""Logits divided by a lower temperature overflow."""

PENALTIES = ("presence_penalty", "frequency_penalty", "repetition_penalty")


class RequestParser:
    """Turns requests into `GenerationParams`.

    Args:
        tokenizer: the model's; no other thread may use it.
        names: names that clients may ask for the model by.
    """

    def __init__(self, target: Target, tokenizer: PreTrainedTokenizerBase, names: list[str], settings: ServeSettings):
        self.target, self.tokenizer, self.names = target, tokenizer, names
        self.context_length = settings.max_model_len or target.context_length
        if self.context_length > target.context_length:
            raise UserError(
                f"--max-model-len {settings.max_model_len} exceeds the model's context of {target.context_length}; "
                "lower it or leave it out"
            )
        own = {name: value for name, value in model_settings(target).items() if name != "do_sample"}
        self.defaults = {"temperature": 1.0, **own, **settings.defaults}
        self.switches = check_switches(settings.chat_template_kwargs)
        self._encoding = threading.Lock()  # tokenizers may keep state while they encode

    def chat(self, request: ChatRequest) -> GenerationParams:
        """Parse a conversation, through the chat template."""
        tools = tools_of(request, self.tokenizer)
        prompt = self._encode_chat(request.messages, request, tools)
        if request.top_logprobs and not request.logprobs:
            raise bad_request("top_logprobs needs logprobs: true", "top_logprobs")
        lengths = {request.max_tokens, request.max_completion_tokens} - {None}
        if len(lengths) > 1:
            raise bad_request("max_tokens and max_completion_tokens are the same; give one", "max_tokens")
        most = next(iter(lengths), None)
        logprobs = (request.top_logprobs or 0) if request.logprobs else None
        return self._params(request, [prompt], most, self.context_length, logprobs, "messages", tools)

    def response(self, request: ResponsesRequest) -> GenerationParams:
        """Parse a request of the Responses API."""
        try:
            return self.chat(request.chat())
        except ApiError as error:
            error.param = PARAMS.get(str(error.param), error.param)
            raise

    def _encode_chat(self, given: list[Message], asked: Templated, tools: Tools | None = None) -> list[int]:
        begun = given[-1].role == "assistant"
        for name, follows in (("add_generation_prompt", not begun), ("continue_final_message", begun)):
            if getattr(asked, name) not in (None, follows):
                end = "is" if begun else "is not"
                raise bad_request(f"{name} must be {follows} here: the last message {end} the assistant's", name)
        messages = [message.plain() for message in given]
        _check_text(messages, "messages")
        check_beside(messages, self.tokenizer)
        if tools is not None:
            _check_text(tools.offered, "tools")
        try:
            switches = self.switches | check_switches(asked.chat_template_kwargs)
        except UserError as error:
            raise bad_request(str(error), "chat_template_kwargs") from error
        try:
            with self._encoding:
                return encode_chat(messages, self.tokenizer, switches, None if tools is None else tools.offered)
        except UserError as error:
            raise bad_request(str(error), "messages") from error

    def tokenize(self, request: TokenizeRequest) -> dict[str, Any]:
        """Turn a text or a conversation into tokens, in vLLM's format.

        Raises:
            ApiError: another model is asked for, both or neither are given, or the template refuses the
                conversation.
        """
        self.check_model(request.model)
        if (request.prompt is None) == (request.messages is None):
            raise bad_request("give prompt or messages, one of them", "prompt")
        if request.messages is not None:
            if request.add_special_tokens:
                raise bad_request(
                    "add_special_tokens is for a prompt; the chat template adds its own", "add_special_tokens"
                )
            chat = ChatRequest.model_construct(messages=request.messages, tools=request.tools)
            tokens = self._encode_chat(request.messages, request, tools_of(chat, self.tokenizer))
        else:
            for name in Templated.model_fields:
                if getattr(request, name):
                    raise bad_request(f"{name} is for messages", name)
            tokens = self._encode(str(request.prompt), request.add_special_tokens is not False)
        names = self.tokenizer.convert_ids_to_tokens(tokens) if request.return_token_strs else None
        return {"count": len(tokens), "max_model_len": self.context_length, "tokens": tokens, "token_strs": names}

    def detokenize(self, request: DetokenizeRequest) -> dict[str, Any]:
        """Turn tokens into text, special ones spelled out, in vLLM's format.

        Raises:
            ApiError: another model is asked for, or a token is not in its vocabulary.
        """
        self.check_model(request.model)
        if request.tokens and max(request.tokens) >= self.target.vocab_size:
            most = self.target.vocab_size - 1
            raise bad_request(f"tokens holds {max(request.tokens)}, the vocabulary ends at {most}", "tokens")
        return {"prompt": decode_text(self.tokenizer, request.tokens, skip_special_tokens=False)}

    def completion(self, request: CompletionRequest) -> GenerationParams:
        """Parse one or several texts, taken as they are."""
        special = request.add_special_tokens is not False
        prompts = [self._encode(prompt, special) if isinstance(prompt, str) else prompt for prompt in request.prompts]
        if len(prompts) * (request.n or 1) > 128:
            raise bad_request("at most 128 answers a request, prompts times n", "n")
        if request.max_tokens == 0 and not request.echo and request.prompt_logprobs is None:
            raise bad_request("max_tokens of 0 is for echo or prompt_logprobs; give at least 1", "max_tokens")
        return self._params(request, prompts, request.max_tokens, COMPLETION_TOKENS, request.logprobs, "prompt")

    def _encode(self, text: str, special: bool = True) -> list[int]:
        _check_text(text, "prompt")
        with self._encoding:
            return list(self.tokenizer(text, add_special_tokens=special)["input_ids"])

    def _params(
        self,
        request: GenerationRequest,
        prompts: list[list[int]],
        most: int | None,
        default: int,
        logprobs: int | None,
        param: str,
        tools: Tools | None = None,
    ) -> GenerationParams:
        """Parse what chats and completions have in common."""
        self.check_model(request.model)
        if request.include_usage and not request.stream:
            raise bad_request("stream_options needs stream: true", "stream_options")
        if request.prompt_logprobs is not None and request.stream:
            raise bad_request("prompt_logprobs are not streamed; leave stream out", "prompt_logprobs")
        for prompt in prompts:
            if not prompt:
                raise bad_request("the prompt has no tokens; give at least one", param)
            if len(prompt) >= self.context_length:
                raise bad_request(
                    f"the prompt has {len(prompt)} tokens, the context is {self.context_length}; shorten the prompt",
                    param,
                    "context_length_exceeded",
                )
            try:
                check_prompt(prompt, self.target)
            except UserError as error:
                raise bad_request(str(error), param) from error
        longest = max(map(len, prompts))
        room = self.context_length - longest
        if most is not None and most > room:
            raise bad_request(
                f"the context is {self.context_length} tokens; the prompt has {longest} and {most} are asked for: "
                "shorten the prompt or max_tokens",
                "max_tokens",
                "context_length_exceeded",
            )
        for stop in request.stops:
            _check_text(stop, "stop")
        ends = {*(() if request.ignore_eos else self.target.eos_token_ids), *(request.stop_token_ids or ())}
        return GenerationParams(
            prompts,
            choices=request.n or 1,
            sampling=self._sampling(request),
            max_new_tokens=max(1, min(default, room) if most is None else most),
            stops=tuple(dict.fromkeys(request.stops or model_stops(self.target))),
            ends=frozenset(ends),
            hidden=frozenset(ends) if self._shows_special(request, tools) else None,
            seed=request.seed,
            logprobs=logprobs,
            speculative=request.speculative is not False,
            prompt_logprobs=request.prompt_logprobs,
            echo=bool(getattr(request, "echo", None)),
            prompt_only=most == 0,
            grammar=self._grammar(request, tools, ends),
            tools=tools,
        )

    def _shows_special(self, request: GenerationRequest, tools: Tools | None) -> bool:
        """Whether special tokens are a part of the text: on request, and where they mark the calls of tools."""
        if request.skip_special_tokens is not None:
            return not request.skip_special_tokens
        return tools is not None and self.tokenizer.convert_tokens_to_ids(OPEN) in special_ids(self.tokenizer)

    def _grammar(self, request: GenerationRequest, tools: Tools | None, ends: set[int]) -> Grammar | None:
        """What the answers' text must be."""
        given = request.response_format
        if request.structured_outputs is not None:
            if given is not None:
                raise bad_request("response_format and structured_outputs are the same; give one", "response_format")
            given = request.structured_outputs.response_format()
        if tools is not None and given is not None and given.get("type") != "text":
            raise bad_request("an answer that may call tools has no response_format; leave one out", "response_format")
        called = None if tools is None else tools.response_format()
        param = "tools" if called is not None else "response_format"
        _check_text(given, param)
        try:
            source = source_of(called or given)
            if source is None:
                return None
            with self._encoding:
                vocabulary = Vocabulary(self.tokenizer, ends, self.target.eos_token_ids)
            return Grammar(source, vocabulary)
        except UserError as error:
            raise bad_request(str(error), param) from error

    def check_model(self, name: str | None) -> None:
        """Raise an ApiError if `name` is another model's; None asks for any."""
        if name is not None and name not in self.names:
            known = ", ".join(repr(known) for known in self.names)
            raise ApiError(404, f"there is no model {name!r} here; this server has {known}", "model", "model_not_found")

    def _sampling(self, request: GenerationRequest) -> SamplingSettings:
        names = ("temperature", "top_p", "top_k", "min_p", *PENALTIES)
        asked: dict[str, Any] = {name: getattr(request, name) for name in names if getattr(request, name) is not None}
        asked["logit_bias"] = {int(token): bias for token, bias in (request.logit_bias or {}).items()}
        if request.min_tokens is not None:
            asked["min_new_tokens"] = request.min_tokens
        if asked.get("top_k") == -1:
            asked["top_k"] = 0
        if 0 < asked.get("temperature", 0) < LEAST_TEMPERATURE:
            raise bad_request(f"a temperature above 0 must be at least {LEAST_TEMPERATURE}; 0 is greedy", "temperature")
        try:
            settings = SamplingSettings(**{**self.defaults, **asked})
            LogitBias(settings.logit_bias, self.target.vocab_size)
        except UserError as error:
            raise bad_request(str(error), "logit_bias" if "logit_bias" in str(error) else None) from error
        return settings


def _check_text(given: Any, param: str) -> None:
    """Refuse halves of surrogate pairs, which JSON can spell and no text contains, in a text or anywhere in a value."""
    try:
        (given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)).encode()
    except UnicodeEncodeError:
        raise bad_request("the text holds half of a surrogate pair, which is no character", param) from None
