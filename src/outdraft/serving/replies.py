"""What clients get back, in OpenAI's format: whole answers, and the chunks of streamed ones.

Knows events and tokens; nothing of how they came about, nor of the web.
"""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from outdraft.serving.jobs import Gained, Job, TokenLogprob
from outdraft.text import decode_text

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

    # --- whole -------------------------------------------------------------------------------------------------

    def add(self, news: Gained) -> None:
        """Keep it for the whole answer."""
        self._gains[news.index].append(news)

    def whole(self) -> dict[str, Any]:
        """Once all answers have ended."""
        choices = [self._whole_choice(index, gains) for index, gains in enumerate(self._gains)]
        return {**self._head(""), "choices": choices, "usage": self.usage()}

    def _whole_choice(self, index: int, gains: list[Gained]) -> dict[str, Any]:
        begin = self._beginning(index)
        text = begin + "".join(gain.text for gain in gains)
        logprobs = [one for gain in gains for one in gain.logprobs]
        starts = [start for gain in gains for start in gain.starts]
        said = {"message": {"role": "assistant", "content": text, "refusal": None}} if self.chat else {"text": text}
        choice: dict[str, Any] = {
            "index": index,
            **said,
            "logprobs": self._logprobs(logprobs, starts, len(begin)),
            "finish_reason": gains[-1].finish_reason,
        }
        if self.pieces:
            choice["pieces"] = [list(piece) for gain in gains for piece in gain.pieces]
        return choice

    # --- streamed ----------------------------------------------------------------------------------------------

    def chunks(self, news: Gained) -> list[dict[str, Any]]:
        """What to send of this; nothing where no text has become certain and nothing else is to be said."""
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
            logprobs = self._logprobs(news.logprobs, news.starts, len(self._beginning(news.index)))
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
        prompt, completion = self.job.prompt_tokens, self.job.completion_tokens
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

    def _logprobs(self, logprobs: list[TokenLogprob], starts: list[int], begin: int) -> dict[str, Any] | None:
        if self.job.ask.logprobs is None:
            return None
        if self.chat:
            return {
                "content": [
                    {**self._entry(one.token, one.logprob), "top_logprobs": [self._entry(*top) for top in one.top]}
                    for one in logprobs
                ],
                "refusal": None,
            }
        return {
            "tokens": [self._name(one.token) for one in logprobs],
            "token_logprobs": [_number(one.logprob) for one in logprobs],
            "top_logprobs": [
                # Names of different tokens may be the same text; the most probable one keeps it.
                {self._name(token): _number(value) for token, value in reversed(one.top)} if one.top else None
                for one in logprobs
            ],
            "text_offset": [begin + start for start in starts],
        }

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        name = self._name(token)
        return {"token": name, "logprob": _number(logprob), "bytes": list(name.encode("utf-8", "replace"))}

    def _name(self, token: int) -> str:
        return decode_text(self.tokenizer, [token], skip_special_tokens=False)


def _number(value: float) -> float:
    return value if math.isfinite(value) else LEAST_LOGPROB
