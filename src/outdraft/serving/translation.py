"""From a request of OpenAI's to what the engine is asked: prompts as tokens, settings checked against the model.

Everything that can be wrong with a request is found here, before it waits for anything. Knows the model's facts and
the tokenizer; nothing of the engine or of the web.
"""

from __future__ import annotations

import threading
from typing import Any

from transformers import PreTrainedTokenizerBase

from outdraft.api.prompts import check_prompt, check_switches, encode_chat
from outdraft.api.settings import model_settings
from outdraft.api.text import decode_text
from outdraft.core.sampling import LogitBias, SamplingSettings
from outdraft.errors import UserError
from outdraft.serving.faults import Fault, refused
from outdraft.serving.jobs import Ask
from outdraft.serving.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    Message,
    Request,
    TokenizeRequest,
)
from outdraft.serving.settings import ServeSettings
from outdraft.target.target import Target

COMPLETION_TOKENS = 16
"""`max_tokens` of a completion that does not say, as in OpenAI's API."""

LEAST_TEMPERATURE = 1e-6
"""Logits over less than this leave what a float can hold."""

PENALTIES = ("presence_penalty", "frequency_penalty", "repetition_penalty")


class Translator:
    """Makes `Ask`s of requests.

    Args:
        target: the model.
        tokenizer: of the model.
        names: that the model may be asked for by.
        settings: of the server.
    """

    def __init__(self, target: Target, tokenizer: PreTrainedTokenizerBase, names: list[str], settings: ServeSettings):
        self.target, self.tokenizer, self.names = target, tokenizer, names
        self.context_length = min(settings.max_model_len or target.context_length, target.context_length)
        own = {name: value for name, value in model_settings(target).items() if name != "do_sample"}
        self.defaults = {"temperature": 1.0, **own, **settings.defaults}
        self.switches = check_switches(settings.chat_template_kwargs)
        self._encoding = threading.Lock()  # tokenizers may keep state while they encode

    def chat(self, request: ChatRequest) -> Ask:
        """A conversation, through the chat template.

        Raises:
            Fault: it cannot be answered, with the parameter at fault.
        """
        prompt = self._chat(request.messages, request.chat_template_kwargs)
        if request.top_logprobs is not None and not request.logprobs:
            raise refused("top_logprobs needs logprobs: true", "top_logprobs")
        if request.max_tokens is not None and request.max_completion_tokens is not None:
            raise refused("max_tokens and max_completion_tokens are the same; give one", "max_tokens")
        most = request.max_tokens if request.max_tokens is not None else request.max_completion_tokens
        logprobs = (request.top_logprobs or 0) if request.logprobs else None
        return self._ask(request, [prompt], most, self.context_length, logprobs, "messages")

    def _chat(self, given: list[Message], switches: dict[str, Any] | None) -> list[int]:
        messages = [message.plain() for message in given]
        for message in messages:
            for part in message.values():
                _is_text(part, "messages")
        try:
            switches = self.switches | check_switches(switches)
        except UserError as error:
            raise refused(str(error), "chat_template_kwargs") from error
        try:
            with self._encoding:
                return encode_chat(messages, self.tokenizer, switches)
        except UserError as error:
            raise refused(str(error), "messages") from error

    def tokenize(self, request: TokenizeRequest) -> dict[str, Any]:
        """What a text or a conversation is as tokens, in vLLM's format.

        Raises:
            Fault: another model's, neither or both, or a conversation that the template refuses.
        """
        self.check_model(request.model)
        if (request.prompt is None) == (request.messages is None):
            raise refused("give prompt or messages, one of them", "prompt")
        if request.messages is not None:
            if request.add_special_tokens:
                raise refused(
                    "add_special_tokens is for a prompt; the chat template adds its own", "add_special_tokens"
                )
            tokens = self._chat(request.messages, request.chat_template_kwargs)
        else:
            if request.chat_template_kwargs:
                raise refused("chat_template_kwargs are for messages", "chat_template_kwargs")
            tokens = self._encode(str(request.prompt), request.add_special_tokens is not False)
        names = self.tokenizer.convert_ids_to_tokens(tokens) if request.return_token_strs else None
        return {
            "count": len(tokens),
            "max_model_len": self.context_length,
            "tokens": tokens,
            "token_strs": names,
        }

    def detokenize(self, request: DetokenizeRequest) -> dict[str, Any]:
        """The text of tokens, special ones spelled out, in vLLM's format.

        Raises:
            Fault: another model's, or tokens that it does not have.
        """
        self.check_model(request.model)
        if request.tokens and max(request.tokens) >= self.target.vocab_size:
            most = self.target.vocab_size - 1
            raise refused(f"tokens holds {max(request.tokens)}, the vocabulary ends at {most}", "tokens")
        return {"prompt": decode_text(self.tokenizer, request.tokens, skip_special_tokens=False)}

    def completion(self, request: CompletionRequest) -> Ask:
        """A text, or several, as they are.

        Raises:
            Fault: it cannot be answered, with the parameter at fault.
        """
        prompts = [self._encode(prompt) if isinstance(prompt, str) else prompt for prompt in request.prompts]
        if len(prompts) * (request.n or 1) > 128:
            raise refused("at most 128 answers a request, prompts times n", "n")
        if request.max_tokens == 0 and not request.echo and request.prompt_logprobs is None:
            raise refused("max_tokens of 0 is for echo or prompt_logprobs; give at least 1", "max_tokens")
        return self._ask(request, prompts, request.max_tokens, COMPLETION_TOKENS, request.logprobs, "prompt")

    def _encode(self, text: str, special: bool = True) -> list[int]:
        _is_text(text, "prompt")
        with self._encoding:
            return list(self.tokenizer(text, add_special_tokens=special)["input_ids"])

    def _ask(
        self,
        request: Request,
        prompts: list[list[int]],
        most: int | None,
        otherwise: int,
        logprobs: int | None,
        param: str,
    ) -> Ask:
        """What both ways of asking have in common."""
        self.check_model(request.model)
        if request.stream_options is not None and not request.stream:
            raise refused("stream_options needs stream: true", "stream_options")
        if request.prompt_logprobs is not None and request.stream:
            raise refused("prompt_logprobs are not streamed; leave stream out", "prompt_logprobs")
        for prompt in prompts:
            self._check(prompt, param)
        longest = max(map(len, prompts))
        room = self.context_length - longest
        if most is not None and most > room:
            raise refused(
                f"the context is {self.context_length} tokens; the prompt has {longest} and {most} are asked for: "
                "shorten the prompt or max_tokens",
                "max_tokens",
                "context_length_exceeded",
            )
        for stop in request.stops:
            _is_text(stop, "stop")
        ends = {*(() if request.ignore_eos else self.target.eos_token_ids), *(request.stop_token_ids or ())}
        return Ask(
            prompts,
            request.n or 1,
            self._sampling(request),
            max(1, min(otherwise, room) if most is None else most),
            tuple(dict.fromkeys(request.stops)),
            frozenset(ends),
            request.seed,
            logprobs,
            request.speculative is not False,
            request.prompt_logprobs,
            bool(getattr(request, "echo", None)),
            most == 0,
        )

    def check_model(self, name: str | None) -> None:
        """Raise a Fault for another model's name; None is any."""
        if name is not None and name not in self.names:
            known = ", ".join(repr(known) for known in self.names)
            raise Fault(404, f"there is no model {name!r} here; this server has {known}", "model", "model_not_found")

    def _check(self, prompt: list[int], param: str) -> None:
        if not prompt:
            raise refused("the prompt has no tokens; give at least one", param)
        if len(prompt) >= self.context_length:
            raise refused(
                f"the prompt has {len(prompt)} tokens, the context is {self.context_length}; shorten the prompt",
                param,
                "context_length_exceeded",
            )
        try:
            check_prompt(prompt, self.target)
        except UserError as error:
            raise refused(str(error), param) from error

    def _sampling(self, request: Request) -> SamplingSettings:
        names = ("temperature", "top_p", "top_k", "min_p", *PENALTIES)
        asked: dict[str, Any] = {name: getattr(request, name) for name in names if getattr(request, name) is not None}
        asked["logit_bias"] = {int(token): bias for token, bias in (request.logit_bias or {}).items()}
        if asked.get("top_k") == -1:
            asked["top_k"] = 0
        if 0 < asked.get("temperature", 0) < LEAST_TEMPERATURE:
            raise refused(f"a temperature above 0 must be at least {LEAST_TEMPERATURE}; 0 is greedy", "temperature")
        try:
            settings = SamplingSettings(**{**self.defaults, **asked})
            LogitBias(settings.logit_bias, self.target.vocab_size)
        except UserError as error:
            raise refused(str(error), "logit_bias" if "logit_bias" in str(error) else None) from error
        return settings


def _is_text(text: str, param: str) -> None:
    """Refuse halves of surrogate pairs, which JSON can spell and no text contains."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise refused("the text holds half of a surrogate pair, which is no character", param) from None
