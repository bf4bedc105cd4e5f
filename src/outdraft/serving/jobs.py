"""A request as the engine sees it: a job with a row for every answer, the answers' text, and events for its client.

The engine's thread owns a job once it was submitted, and hands the job's events to `deliver` from that thread.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from outdraft.api.guided import Grammar
from outdraft.core.dice import Dice
from outdraft.core.sampling import Warper
from outdraft.core.sampling_settings import SamplingSettings
from outdraft.core.statistics import Statistics
from outdraft.data.text import Detokenizer, Stops
from outdraft.engine.rows import Row
from outdraft.output import number
from outdraft.serving.errors import ApiError
from outdraft.serving.tools import Tools
from outdraft.target.target import Target

CANCELLED = "cancelled"
"""Finish reason of a row whose client has gone."""


@dataclass(frozen=True)
class GenerationParams:
    """The checked parameters of a request.

    Attributes:
        prompts: token ids of every prompt.
        choices: answers to each prompt.
        sampling: temperature, filters, penalties and the like.
        max_new_tokens: tokens that every answer may have.
        stops: strings that end an answer.
        ends: tokens that end an answer.
        hidden: tokens that are no text; None for the special ones.
        seed: the first answer's seed, the i-th answer has `seed + i`; None draws fresh ones.
        logprobs: how many alternatives to report beside every chosen token's logprob; None reports no logprobs.
        speculative: False decodes without the drafter.
        prompt_logprobs: as `logprobs`, for the prompts' own tokens.
        echo: answers begin with their prompts, whose tokens are then among the `logprobs`.
        prompt_only: the client wants the prompt scored, and is not told the one token that is decided after it.
        grammar: of the answers' text; None leaves it free.
        tools: what the answers may call.
    """

    prompts: list[list[int]]
    choices: int
    sampling: SamplingSettings
    max_new_tokens: int
    stops: tuple[str, ...] = ()
    ends: frozenset[int] = frozenset()
    hidden: frozenset[int] | None = None
    seed: int | None = None
    logprobs: int | None = None
    speculative: bool = True
    prompt_logprobs: int | None = None
    echo: bool = False
    prompt_only: bool = False
    grammar: Grammar | None = None
    tools: Tools | None = None


class Piece(NamedTuple):
    """Some text, whether its token had been drafted, and whether it was an n-gram draft that held it."""

    text: str
    accepted: bool
    copied: bool = False

    @property
    def source(self) -> str | None:
        """What had drafted it: `drafter`, `ngram`, or None."""
        return ("ngram" if self.copied else "drafter") if self.accepted else None


class AnswerText:
    """An answer's text while its tokens come: it ends before a stop string and hands out only what is certain.

    Args:
        stops: strings that end the answer and are no part of it; a special token's string is found, too.
        prompt: tokens that the answer follows.
        hidden: tokens that are no text; None for the special ones.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stops: Sequence[str] = (),
        prompt: Sequence[int] = (),
        hidden: frozenset[int] | None = None,
    ):
        self._detokenizer = Detokenizer(tokenizer, prompt, hidden)
        self._stops = Stops(stops, tokenizer, hidden)
        self.text = ""
        self.starts: list[int] = []
        """Character at which every token's text begins."""
        self.stopped = False
        """A stop string was found: the text ends before it, and further tokens add nothing."""
        self._guesses: list[tuple[bool, bool]] = []  # accepted, copied
        self._seen = 0  # characters so far, certain or not
        self._released = 0  # characters handed out
        self._piece = 0  # index of the token whose text is handed out next

    def take(self, tokens: Sequence[int], accepted: Sequence[bool], copied: Sequence[bool] = ()) -> bool:
        """Add those of the answer's `tokens` that are new; returns whether a stop string is complete."""
        for index in range(len(self.starts), len(tokens)):
            self.starts.append(self._seen)
            self._guesses.append((accepted[index], bool(copied) and copied[index]))
            if not self.stopped:
                self._add(tokens[index])
        return self.stopped

    def finish(self) -> None:
        """Add what was held back of an unfinished character, as no further token comes."""
        if not self.stopped:
            self._end(self.text + self._detokenizer.finish())

    def release(self) -> list[Piece]:
        """The text that has become certain since the last call, a piece for every token."""
        certain = len(self.text) - (0 if self.stopped else self._stops.uncertain())
        pieces: list[Piece] = []
        while self._released < certain:
            last = self._piece + 1 == len(self.starts)
            end = certain if last else min(certain, self.starts[self._piece + 1])
            if end > self._released:
                pieces.append(Piece(self.text[self._released : end], *self._guesses[self._piece]))
                self._released = end
            if self._released < certain:
                self._piece += 1
        return pieces

    def _add(self, token: int) -> None:
        new, pending = self._detokenizer.add(token), self._detokenizer.pending
        self.text += new
        self._seen = max(self._seen, len(self.text) + len(pending))
        end = self._stops.add(token, new, pending)
        if end is not None:
            self._end((self.text + pending)[:end])

    def _end(self, text: str) -> None:
        self.text, self.stopped = text, True
        self.starts = [min(start, len(text)) for start in self.starts]
        self._seen = min(self._seen, len(text))


@dataclass
class TokenLogprob:
    """A token's logprob under the target alone, before temperature, penalties and filters."""

    token: int
    logprob: float
    top: list[tuple[int, float]]
    """The most probable tokens and their logprobs, best first."""
    rank: int = 1
    """1 for the most probable token."""


@dataclass
class Delta:
    """An answer has grown, or ended.

    Attributes:
        index: which answer of its request.
        pieces: text that has become certain.
        tokens: how many tokens were decided.
        logprobs: logprobs of those tokens, where they were asked for.
        starts: characters of the answer at which those tokens' text begins.
        tau: tau of the answer so far; None before its first round.
        finish_reason: `stop` or `length` once it has ended.
    """

    index: int
    pieces: list[Piece]
    tokens: int
    logprobs: list[TokenLogprob]
    starts: list[int]
    tau: float | None = None
    finish_reason: str | None = None

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)


@dataclass
class Failed:
    """The request is not answered, or not any further."""

    error: ApiError


Event = Delta | Failed


@dataclass
class Answer:
    """One answer of a job and the row that decodes it."""

    index: int
    row: Row
    text: AnswerText
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    """Logprobs of the prompt's tokens but its first; complete before the first event."""
    sent_tokens: int = 0

    def delta(self) -> Delta | None:
        """What was decided since the last call; None if nothing was."""
        self.text.take(self.row.tokens, self.row.accepted, self.row.copied)
        reason = self.row.finish_reason
        if reason is not None:
            self.text.finish()
        pieces, tokens = self.text.release(), len(self.row.tokens) - self.sent_tokens
        if not pieces and not tokens and reason is None:
            return None
        delta = Delta(
            self.index,
            pieces,
            tokens,
            self.logprobs[self.sent_tokens :],
            self.text.starts[self.sent_tokens :],
            self.row.statistics.tau if self.row.statistics.rounds else None,
            None if reason is None else _REASONS.get(reason, reason),
        )
        self.sent_tokens += tokens
        return delta


_REASONS = {"eos": "stop", "stop": "stop", "length": "length", "context": "length", CANCELLED: "stop"}


class Job:
    """A request to decode.

    Args:
        params: what the request asks for.
        deliver: takes events, in the engine's thread; must not block.
        id: the request's id, which its response bears.
    """

    def __init__(
        self,
        params: GenerationParams,
        target: Target,
        tokenizer: PreTrainedTokenizerBase,
        deliver: Callable[[Event], None],
        id: str,
    ):
        if params.seed is None and target.shared:  # the processes throw the same dice
            params = replace(params, seed=secrets.randbits(62))
        self.params, self.deliver, self.id = params, deliver, id
        self.arrived = time.perf_counter()
        self.answers: list[Answer] = []
        for index, prompt in enumerate(prompt for prompt in params.prompts for _ in range(params.choices)):
            text = AnswerText(tokenizer, params.stops, prompt, params.hidden)
            guided = [] if params.grammar is None else [params.grammar.processor(len(prompt))]
            warper = Warper(params.sampling, len(prompt), target.vocab_size, sorted(params.ends), guided, target.device)
            dice = Dice(None if params.seed is None else params.seed + index)
            row = Row(prompt, warper, dice, params.max_new_tokens, params.ends)
            if params.stops:
                row.should_stop = lambda tokens, row=row, text=text: text.take(tokens, row.accepted, row.copied)
            answer = Answer(index, row, text)
            if params.logprobs is not None:
                row.watch = _recording(answer.logprobs, row.tokens, params.logprobs)
            of_prompt = [params.prompt_logprobs, params.logprobs if params.echo else None]
            if wanted := [most for most in of_prompt if most is not None]:
                row.watch_prompt = _recording(answer.prompt_logprobs, prompt[1:], max(wanted))
            self.answers.append(answer)
        self.left = len(self.answers)
        """How many answers have not ended."""

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts; each is run once a choice but counted once, as in OpenAI's usage."""
        return sum(map(len, self.params.prompts))

    @property
    def completion_tokens(self) -> int:
        """Tokens of all answers so far; 0 where the client is told none."""
        return 0 if self.params.prompt_only else sum(len(answer.row.tokens) for answer in self.answers)

    @property
    def statistics(self) -> Statistics:
        return Statistics.sum(answer.row.statistics for answer in self.answers)

    def summary(self, reason: str | None) -> str:
        """The line to log as the job ends, with all its answers or for the reason given."""
        ends = {_REASONS.get(end, end) for answer in self.answers if (end := answer.row.finish_reason) is not None}
        did = self.statistics
        return (
            f"{self.id} prompt_tokens={self.prompt_tokens} completion_tokens={self.completion_tokens} "
            f"tau={number(did.tau if did.rounds else None)} seconds={time.perf_counter() - self.arrived:.3f} "
            f"finish_reason={reason or ','.join(sorted(ends))}"
        )


def _recording(known: list[TokenLogprob], tokens: Sequence[int], most: int) -> Callable[[Tensor], None]:
    """A callback that adds tokens' logprobs to `known`, from the `(tokens, vocab)` logits that decided them."""

    def record(logits: Tensor) -> None:
        logprobs = logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
        newest = list(tokens[len(known) : len(known) + len(logprobs)])
        best, which = logprobs.topk(min(most, logprobs.shape[-1]))
        own = logprobs.gather(1, torch.tensor(newest, device=logprobs.device)[:, None])
        ranks = ((logprobs > own).sum(1) + 1).tolist()
        for row in zip(newest, own[:, 0].tolist(), which.tolist(), best.tolist(), ranks, strict=True):
            token, chosen, ids, values, rank = row
            known.append(TokenLogprob(token, chosen, list(zip(ids, values, strict=True)), rank))

    return record
