"""What clients get back, in OpenAI's format: whole answers, and the chunks of streamed ones.

Knows events and tokens; nothing of how they came about, nor of the web.
"""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from outdraft.api.text import Detokenizer, bytes_of
from outdraft.serving.jobs import Gained, Job, TokenLogprob

LEAST_LOGPROB = -9999.0
"""In place of minus infinity, which JSON cannot say."""


class Reply:
    """One request's answers as they grow.

    Args:
        job: the request.
        model: name that stands in the answer.
        tokenizer: for the names of tokens.
        chat: a chat completion, else a completion of text.
        pieces: say of every piece of text whether a drafter had guessed it.
        echo: of every prompt, the text that its completions begin with.
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
        self.id = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
        self.created = int(time.time())
        self._gains: list[list[Gained]] = [[] for _ in job.answers]
        self._begun: set[int] = set()
        self._names: dict[int, _Names] = {}

    # --- whole -------------------------------------------------------------------------------------------------

    def add(self, news: Gained) -> None:
        """Keep it for the whole answer."""
        self._gains[news.index].append(self._told(news))

    def whole(self) -> dict[str, Any]:
        """Once all answers have ended."""
        choices = [self._whole_choice(index, gains) for index, gains in enumerate(self._gains)]
        whole = {**self._head(""), "choices": choices, "usage": self.usage()}
        if self.chat and self.job.ask.prompt_logprobs is not None:
            whole["prompt_logprobs"] = self._of_prompt(0)
        return whole

    def _whole_choice(self, index: int, gains: list[Gained]) -> dict[str, Any]:
        begin = self._beginning(index)
        text = begin + "".join(gain.text for gain in gains)
        logprobs = [one for gain in gains for one in gain.logprobs]
        starts = [start for gain in gains for start in gain.starts]
        said = {"message": {"role": "assistant", "content": text, "refusal": None}} if self.chat else {"text": text}
        choice: dict[str, Any] = {
            "index": index,
            **said,
            "logprobs": self._logprobs(index, logprobs, starts),
            "finish_reason": gains[-1].finish_reason,
        }
        if not self.chat and self.job.ask.prompt_logprobs is not None:
            choice["prompt_logprobs"] = self._of_prompt(index)
        if self.pieces:
            choice["pieces"] = [list(piece) for gain in gains for piece in gain.pieces]
        return choice

    # --- streamed ----------------------------------------------------------------------------------------------

    def chunks(self, news: Gained) -> list[dict[str, Any]]:
        """What to send of this; nothing where no text has become certain and nothing else is to be said."""
        news = self._told(news)
        chunks = []
        begin = ""
        if news.index not in self._begun:
            self._begun.add(news.index)
            begin = self._beginning(news.index)
            if self.chat:
                chunks.append(self._chunk(news.index, {"delta": {"role": "assistant", "content": ""}}))
        if news.text or begin or news.logprobs or news.finish_reason is not None:
            text = begin + news.text
            said: dict[str, Any] = {"delta": {"content": text} if text else {}} if self.chat else {"text": text}
            logprobs = self._logprobs(news.index, news.logprobs, news.starts)
            if self.pieces:
                said["pieces"] = [list(piece) for piece in news.pieces]
                said["speculation"] = {"tokens": news.tokens, "tau": news.tau}
            chunks.append(self._chunk(news.index, said, logprobs, news.finish_reason))
        return chunks

    def usage_chunk(self) -> dict[str, Any]:
        """The last chunk, for those who asked for it."""
        return {**self._head(".chunk"), "choices": [], "usage": self.usage()}

    def _chunk(
        self, index: int, said: dict[str, Any], logprobs: Any = None, finish_reason: str | None = None
    ) -> dict[str, Any]:
        choice = {"index": index, **said, "logprobs": logprobs, "finish_reason": finish_reason}
        return {**self._head(".chunk"), "choices": [choice]}

    # --- parts -------------------------------------------------------------------------------------------------

    def _head(self, kind: str) -> dict[str, Any]:
        name = f"chat.completion{kind}" if self.chat else "text_completion"
        return {"id": self.id, "object": name, "created": self.created, "model": self.model}

    def usage(self) -> dict[str, Any]:
        """Tokens, and what speculation did, under `speculation`."""
        prompt = self.job.prompt_tokens
        completion = 0 if self.job.ask.silent else self.job.completion_tokens
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

    def _beginning(self, index: int) -> str:
        return self.echo[index // self.job.ask.choices] if self.echo else ""

    def _told(self, news: Gained) -> Gained:
        """What is said of it: nothing where only the prompt was asked for."""
        if not self.job.ask.silent:
            return news
        reason = "length" if news.finish_reason is not None else None
        return replace(news, pieces=[], tokens=0, logprobs=[], starts=[], finish_reason=reason)

    def _named(self, index: int) -> tuple[_Names, bool]:
        """The names of an answer's tokens as they follow each other, and whether they are asked for first now."""
        first = index not in self._names
        if first:
            prompt = () if self.echo else self.job.answers[index].row.prompt
            self._names[index] = _Names(self.tokenizer, prompt)
        return self._names[index], first

    def _logprobs(self, index: int, logprobs: list[TokenLogprob], starts: list[int]) -> dict[str, Any] | None:
        """Of tokens that follow those of the last call; before the first ones those of an echoed prompt."""
        most = self.job.ask.logprobs
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
        """vLLM's `prompt_logprobs`: for every token of the prompt those of its own place, by their ids."""
        answer, names = self.job.answers[index], _Names(self.tokenizer)
        most, prompt = self.job.ask.prompt_logprobs or 0, answer.row.prompt
        found: list[dict[str, Any] | None] = [None]
        names.take(prompt[0])
        for one in answer.prompt_logprobs:
            ranked = [(token, value, place) for place, (token, value) in enumerate(one.top[:most], start=1)]
            own = (one.token, one.logprob, one.rank)
            found.append(
                {
                    str(token): {"logprob": _number(value), "rank": rank, "decoded_token": names.name(token)}
                    for token, value, rank in [own, *(top for top in ranked if top[0] != one.token)]
                }
            )
            names.take(one.token)
        return found


class _Names:
    """Names and bytes of tokens that follow each other: what each adds to the text, which together are the text.

    A token that is a part of a character adds nothing; the one that completes the character adds it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int] = ()):
        self.tokenizer, self._detokenizer = tokenizer, Detokenizer(tokenizer, prompt=prompt)
        self._length = 0

    def name(self, token: int) -> str:
        """What a token would add here."""
        return self._detokenizer.peek(token)

    def take(self, token: int) -> int:
        """It stands here, and others follow; where its own text begins."""
        start = self._length
        if token not in self._detokenizer.special:
            self._length += len(self.name(token))
        self._detokenizer.add(token)
        return start

    def entry(self, one: TokenLogprob, most: int) -> dict[str, Any]:
        """A token and its alternatives in OpenAI's format; it stands here."""
        entry = {**self._one(one.token, one.logprob), "top_logprobs": [self._one(*top) for top in one.top[:most]]}
        self.take(one.token)
        return entry

    def prompt(
        self, tokens: Sequence[int], logprobs: Sequence[TokenLogprob], most: int
    ) -> tuple[list[dict[str, Any]], list[int]]:
        """Entries of a whole prompt, whose first token follows nothing, and where each one's text begins."""
        first = {**self._one(tokens[0], 0.0), "logprob": None, "top_logprobs": []}
        self.take(tokens[0])
        entries, starts = [first], [0]
        for one in logprobs:
            starts.append(self._length)
            entries.append(self.entry(one, most))
        return entries, starts

    def _one(self, token: int, logprob: float) -> dict[str, Any]:
        name = self.name(token)
        return {"token": name, "logprob": _number(logprob), "bytes": list(bytes_of(self.tokenizer, token, name))}


def _number(value: float) -> float:
    return value if math.isfinite(value) else LEAST_LOGPROB
