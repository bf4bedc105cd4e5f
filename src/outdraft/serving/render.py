"""Responses in OpenAI's format: whole answers, and the chunks of streamed ones."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from outdraft.data.text import Detokenizer, bytes_of
from outdraft.serving.errors import ApiError
from outdraft.serving.jobs import Delta, Job, Piece, TokenLogprob
from outdraft.serving.tools import CallReader

LEAST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON does not have."""


class Renderer:
    """Renders one request's answers as they grow.

    Args:
        chat: render a chat completion, else a completion of text.
        pieces: report for every piece of text whether a drafter had guessed it.
        echo: the prompts' texts, if answers begin with them.
    """

    def __init__(
        self,
        job: Job,
        model: str,
        tokenizer: PreTrainedTokenizerBase,
        chat: bool,
        pieces: bool = False,
        echo: Sequence[str] = (),
    ):
        self.job, self.model, self.tokenizer = job, model, tokenizer
        self.chat, self.pieces, self.echo = chat, pieces, echo
        self.created = int(time.time())
        self._deltas: list[list[Delta]] = [[] for _ in job.answers]
        self._begun: set[int] = set()
        self._untold = [0 for _ in job.answers]  # tokens decided since the last chunk
        self._names: dict[int, _TokenNames] = {}
        tools = job.params.tools
        self._readers = [] if tools is None else [CallReader(tools) for _ in job.answers]

    # --- whole -------------------------------------------------------------------------------------------------

    def add(self, delta: Delta) -> None:
        """Keep it for the whole response."""
        self._deltas[delta.index].append(self._visible(delta))

    def whole(self) -> dict[str, Any]:
        """The response, once all answers have ended."""
        choices = [self._whole_choice(index, deltas) for index, deltas in enumerate(self._deltas)]
        whole = {**self._head(""), "choices": choices, "usage": self.usage()}
        if self.chat and self.job.params.prompt_logprobs is not None:
            whole["prompt_logprobs"] = self._of_prompt(0)
        return whole

    def _whole_choice(self, index: int, deltas: list[Delta]) -> dict[str, Any]:
        begin = self._beginning(index)
        text = begin + "".join(delta.text for delta in deltas)
        logprobs = [one for delta in deltas for one in delta.logprobs]
        starts = [start for delta in deltas for start in delta.starts]
        text, calls, reason = self._called(index, text, deltas[-1].finish_reason)
        message: dict[str, Any] = {"role": "assistant", "content": text or None if calls else text, "refusal": None}
        if calls:
            message["tool_calls"] = [{name: call[name] for name in ("id", "type", "function")} for call in calls]
        choice: dict[str, Any] = {
            "index": index,
            **({"message": message} if self.chat else {"text": text}),
            "logprobs": self._logprobs(index, logprobs, starts),
            "finish_reason": reason,
        }
        if not self.chat and self.job.params.prompt_logprobs is not None:
            choice["prompt_logprobs"] = self._of_prompt(index)
        if self.pieces:
            choice |= _pieces([piece for delta in deltas for piece in delta.pieces])
        return choice

    # --- streamed ----------------------------------------------------------------------------------------------

    def chunks(self, delta: Delta) -> list[dict[str, Any]]:
        """The chunks to send for it: none if no text has become certain and nothing else is to report."""
        delta = self._visible(delta)
        chunks = []
        begin = ""
        self._untold[delta.index] += delta.tokens
        if delta.index not in self._begun:
            self._begun.add(delta.index)
            begin = self._beginning(delta.index)
            if self.chat:
                chunks.append(self._chunk(delta.index, {"delta": {"role": "assistant", "content": ""}}))
        if delta.text or begin or delta.logprobs or delta.finish_reason is not None:
            text, calls, reason = self._called(delta.index, begin + delta.text, delta.finish_reason)
            part = ({"content": text} if text else {}) | ({"tool_calls": calls} if calls else {})
            said: dict[str, Any] = {"delta": part} if self.chat else {"text": text}
            logprobs = self._logprobs(delta.index, delta.logprobs, delta.starts)
            if self.pieces:
                said |= _pieces(delta.pieces)
                said["speculation"] = {"tokens": self._untold[delta.index], "tau": delta.tau}
            if not self._readers or part or logprobs or reason is not None:
                chunks.append(self._chunk(delta.index, said, logprobs, reason))
                self._untold[delta.index] = 0
        return chunks

    def failed(self, error: ApiError) -> list[dict[str, Any]]:
        """The last chunk of a stream that an error ends."""
        return [error.body]

    def usage_chunk(self) -> dict[str, Any]:
        """The last chunk, for clients that asked for it."""
        return {**self._head(".chunk"), "choices": [], "usage": self.usage()}

    def _chunk(
        self, index: int, said: dict[str, Any], logprobs: Any = None, finish_reason: str | None = None
    ) -> dict[str, Any]:
        choice = {"index": index, **said, "logprobs": logprobs, "finish_reason": finish_reason}
        return {**self._head(".chunk"), "choices": [choice]}

    # --- parts -------------------------------------------------------------------------------------------------

    def _head(self, kind: str) -> dict[str, Any]:
        name = f"chat.completion{kind}" if self.chat else "text_completion"
        return {"id": self.job.id, "object": name, "created": self.created, "model": self.model}

    def usage(self) -> dict[str, Any]:
        """Token counts, and under `speculation` what drafting did."""
        prompt = self.job.prompt_tokens
        completion = self.job.completion_tokens
        did = self.job.statistics
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "speculation": {
                "rounds": did.rounds,
                "drafted_tokens": did.drafted,
                "accepted_tokens": did.accepted,
                "repeats": did.repeats,
                "tau": round(did.tau, 4) if did.rounds else None,
            },
        }

    def _called(self, index: int, text: str, reason: str | None) -> tuple[str, list[dict[str, Any]], str | None]:
        """An answer's next text without its calls of tools, those, and the reason for which it ended, if it did."""
        if not self._readers:
            return text, [], reason
        reader = self._readers[index]
        text, calls = reader.add(text, last=reason is not None)
        return text, calls, "tool_calls" if reader.calls and reason == "stop" else reason

    def _beginning(self, index: int) -> str:
        return self.echo[index // self.job.params.choices] if self.echo else ""

    def _visible(self, delta: Delta) -> Delta:
        """What the client is told of it: only its end where the prompt alone was asked for."""
        if not self.job.params.prompt_only:
            return delta
        reason = "length" if delta.finish_reason is not None else None
        return replace(delta, pieces=[], tokens=0, logprobs=[], starts=[], finish_reason=reason)

    def _named(self, index: int) -> tuple[_TokenNames, bool]:
        """The spelling of an answer's tokens, and whether this is the first call for that answer."""
        first = index not in self._names
        if first:
            prompt = () if self.echo else self.job.answers[index].row.prompt
            self._names[index] = _TokenNames(self.tokenizer, prompt)
        return self._names[index], first

    def _logprobs(self, index: int, logprobs: list[TokenLogprob], starts: list[int]) -> dict[str, Any] | None:
        """Logprobs of the tokens since the last call; an echoed prompt's come before the first."""
        most = self.job.params.logprobs
        if most is None:
            return None
        names, first = self._named(index)
        if self.chat:
            entries = [names.entry(one, most) for one in logprobs]
            return {"content": entries, "refusal": None}
        begin = self._beginning(index)
        offsets = [len(begin) + start for start in starts]
        entries = []
        if first and self.echo:
            prompt, answer = self.job.answers[index].row.prompt, self.job.answers[index]
            entries, before = names.prompt(prompt, answer.prompt_logprobs, most)
            offsets = [min(start, len(begin)) for start in before] + offsets
        entries += [names.entry(one, most) for one in logprobs]
        return {
            "tokens": [entry["token"] for entry in entries],
            "token_logprobs": [entry["logprob"] for entry in entries],
            "top_logprobs": [
                # Names of different tokens may be the same text; the most probable one keeps it.
                {top["token"]: top["logprob"] for top in reversed(entry["top_logprobs"])} or None
                for entry in entries
            ],
            "text_offset": offsets,
        }

    def _of_prompt(self, index: int) -> list[dict[str, Any] | None]:
        """vLLM's `prompt_logprobs`: a dict from token id to logprob for every token of the prompt."""
        answer, names = self.job.answers[index], _TokenNames(self.tokenizer)
        most, prompt = self.job.params.prompt_logprobs or 0, answer.row.prompt
        found: list[dict[str, Any] | None] = [None]
        names.take(prompt[0])
        for one in answer.prompt_logprobs:
            ranked = [(token, value, rank) for rank, (token, value) in enumerate(one.top[:most], start=1)]
            own = (one.token, one.logprob, one.rank)
            found.append(
                {
                    str(token): {"logprob": _finite(value), "rank": rank, "decoded_token": names.name(token)}
                    for token, value, rank in [own, *(top for top in ranked if top[0] != one.token)]
                }
            )
            names.take(one.token)
        return found


class _TokenNames:
    """Spells tokens that follow each other: a token's name is what it adds to the text.

    A token that is a part of a character adds nothing; the one that completes the character adds it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int] = ()):
        self.tokenizer, self._detokenizer = tokenizer, Detokenizer(tokenizer, prompt=prompt)
        self._length = 0

    def name(self, token: int) -> str:
        """What the token would add here."""
        return self._detokenizer.peek(token)

    def take(self, token: int) -> int:
        """Append the token; returns the character at which its text begins."""
        start = self._length
        if token not in self._detokenizer.special:
            self._length += len(self.name(token))
        self._detokenizer.add(token)
        return start

    def entry(self, one: TokenLogprob, most: int) -> dict[str, Any]:
        """Append a token; returns it and its alternatives in OpenAI's format."""
        entry = {**self._one(one.token, one.logprob), "top_logprobs": [self._one(*top) for top in one.top[:most]]}
        self.take(one.token)
        return entry

    def prompt(
        self, tokens: Sequence[int], logprobs: Sequence[TokenLogprob], most: int
    ) -> tuple[list[dict[str, Any]], list[int]]:
        """Append a prompt; returns its tokens' entries and the characters at which their text begins."""
        first = {**self._one(tokens[0], 0.0), "logprob": None, "top_logprobs": []}
        self.take(tokens[0])
        entries, starts = [first], [0]
        for one in logprobs:
            starts.append(self._length)
            entries.append(self.entry(one, most))
        return entries, starts

    def _one(self, token: int, logprob: float) -> dict[str, Any]:
        name = self.name(token)
        return {"token": name, "logprob": _finite(logprob), "bytes": list(bytes_of(self.tokenizer, token, name))}


def _pieces(pieces: Sequence[Piece]) -> dict[str, Any]:
    """The pieces of an answer, and beside them what had drafted each."""
    return {
        "pieces": [[piece.text, piece.accepted] for piece in pieces],
        "piece_sources": [piece.source for piece in pieces],
    }


def _finite(value: float) -> float:
    return value if math.isfinite(value) else LEAST_LOGPROB
