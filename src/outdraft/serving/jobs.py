"""A request as the engine sees it: rows to decode, and who is told what becomes of them.

`Job` is made for one request and owned by the engine's thread once it was submitted. What it says to the outside are
events, handed to `deliver` from that thread. Knows rows and text; nothing of the web, of queues or of memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from outdraft.core.dice import Dice
from outdraft.core.sampling import Warper
from outdraft.core.sampling_settings import SamplingSettings
from outdraft.core.statistics import Statistics
from outdraft.engine.rows import Row
from outdraft.serving.answer_text import AnswerText, Piece
from outdraft.serving.faults import Fault
from outdraft.target.target import Target

CANCELLED = "cancelled"
"""Finish reason of a row whose client has gone."""


@dataclass(frozen=True)
class Ask:
    """What a request wants, checked.

    Attributes:
        prompts: token ids.
        choices: answers to each of them.
        sampling: how tokens are chosen.
        max_new_tokens: of every answer, at most.
        stops: strings that end an answer.
        ends: tokens that end an answer.
        seed: of the first answer, the next one has the next; None draws fresh ones.
        logprobs: how many most probable tokens to name beside the chosen one's own logarithm; None names nothing.
        speculative: False decodes without the drafter.
        prompt_logprobs: as `logprobs`, of the prompts' own tokens.
        echo: whether answers begin with their prompts, whose tokens are then among the `logprobs`.
        silent: whether only the prompt is wanted: of the one token that is decided after it nobody is told.
    """

    prompts: list[list[int]]
    choices: int
    sampling: SamplingSettings
    max_new_tokens: int
    stops: tuple[str, ...] = ()
    ends: frozenset[int] = frozenset()
    seed: int | None = None
    logprobs: int | None = None
    speculative: bool = True
    prompt_logprobs: int | None = None
    echo: bool = False
    silent: bool = False


@dataclass
class TokenLogprob:
    """How probable the target alone held a token, before temperature, penalties and filters."""

    token: int
    logprob: float
    top: list[tuple[int, float]]
    """The most probable tokens, best first."""
    rank: int = 1
    """1 for the most probable token."""


@dataclass
class Gained:
    """An answer has grown, or ended.

    Attributes:
        index: of the answer in its request.
        pieces: text that has become certain.
        tokens: how many were decided.
        start: characters of the answer before `pieces`.
        logprobs: of those tokens, where they were asked for.
        starts: of those tokens, where their text begins in the answer.
        tau: of the answer so far; None before its first round.
        finish_reason: `stop` or `length` once it has ended.
    """

    index: int
    pieces: list[Piece]
    tokens: int
    start: int
    logprobs: list[TokenLogprob]
    starts: list[int]
    tau: float | None = None
    finish_reason: str | None = None

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)


@dataclass
class Failed:
    """The request is not answered (any further)."""

    fault: Fault


Event = Gained | Failed


@dataclass
class Answer:
    """One row of a job, before, while and after it is decoded."""

    index: int
    row: Row
    text: AnswerText
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    """Of the prompt's tokens but its first; complete before the first event."""
    told: int = 0
    """Tokens that an event has told of."""
    characters: int = 0
    """Characters likewise."""

    def news(self) -> Gained | None:
        """What was decided since the last call."""
        self.text.take(self.row.tokens, self.row.accepted)
        reason = self.row.finish_reason
        if reason is not None:
            self.text.finish()
        pieces, tokens = self.text.release(), len(self.row.tokens) - self.told
        if not pieces and not tokens and reason is None:
            return None
        gained = Gained(
            self.index,
            pieces,
            tokens,
            self.characters,
            self.logprobs[self.told :],
            self.text.starts[self.told :],
            self.row.statistics.tau if self.row.statistics.rounds else None,
            None if reason is None else _REASONS.get(reason, reason),
        )
        self.told += tokens
        self.characters += len(gained.text)
        return gained


_REASONS = {"eos": "stop", "stop": "stop", "length": "length", "context": "length", CANCELLED: "stop"}


class Job:
    """One request's answers.

    Args:
        ask: what is wanted.
        target: the model.
        tokenizer: of the model.
        deliver: takes events, in the engine's thread; must not block.
    """

    def __init__(self, ask: Ask, target: Target, tokenizer: PreTrainedTokenizerBase, deliver: Callable[[Event], None]):
        self.ask, self.deliver = ask, deliver
        self.arrived = time.perf_counter()
        self.answers: list[Answer] = []
        for place, prompt in enumerate(prompt for prompt in ask.prompts for _ in range(ask.choices)):
            text = AnswerText(tokenizer, ask.stops, prompt)
            warper = Warper(ask.sampling, len(prompt), target.vocab_size, sorted(ask.ends), (), target.device)
            dice = Dice(None if ask.seed is None else ask.seed + place)
            row = Row(prompt, warper, dice, ask.max_new_tokens, ask.ends)
            if ask.stops:
                row.should_stop = _stopping(row, text)
            answer = Answer(place, row, text)
            if ask.logprobs is not None:
                row.watch = _recording(answer.logprobs, row.tokens, ask.logprobs)
            of_prompt = [ask.prompt_logprobs, ask.logprobs if ask.echo else None]
            if wanted := [most for most in of_prompt if most is not None]:
                row.watch_prompt = _recording(answer.prompt_logprobs, prompt[1:], max(wanted))
            self.answers.append(answer)
        self.left = len(self.answers)
        """Answers that have not ended."""

    @property
    def prompt_tokens(self) -> int:
        """Of all prompts; each is run once a choice but counted once, as in OpenAI's usage."""
        return sum(map(len, self.ask.prompts))

    @property
    def completion_tokens(self) -> int:
        return sum(len(answer.row.tokens) for answer in self.answers)

    @property
    def statistics(self) -> Statistics:
        """Of all answers together."""
        return Statistics.sum(answer.row.statistics for answer in self.answers)


def _stopping(row: Row, text: AnswerText) -> Callable[[list[int]], bool]:
    return lambda tokens: text.take(tokens, row.accepted)


def _recording(known: list[TokenLogprob], tokens: Sequence[int], most: int) -> Callable[[Tensor], None]:
    """Notes how probable tokens were, from the `(tokens, vocab)` logits they were decided on, some at a time."""

    def record(logits: Tensor) -> None:
        laws = logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
        newest = list(tokens[len(known) : len(known) + len(laws)])
        best, which = laws.topk(min(most, laws.shape[-1]))
        own = laws.gather(1, torch.tensor(newest, device=laws.device)[:, None])
        ranks = ((laws > own).sum(1) + 1).tolist()
        for row in zip(newest, own[:, 0].tolist(), which.tolist(), best.tolist(), ranks, strict=True):
            token, chosen, ids, values, rank = row
            known.append(TokenLogprob(token, chosen, list(zip(ids, values, strict=True)), rank))

    return record
