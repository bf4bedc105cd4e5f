"""The results of `generate` and `stream`, and how they are printed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from outdraft.core.statistics import Statistics
from outdraft.errors import UserError
from outdraft.target.exact.target import Exactness

SHOWN_TEXT = 300
"""Largest number of characters of an answer that are printed."""


@dataclass(repr=False)
class GenerationOutput:
    """The result of `generate`, row by row in the order of the prompts.

    Attributes:
        tokens: new token ids, an end-of-sequence token included.
        texts: text of the new tokens after the prompt's text, without special tokens; None without a tokenizer.
        prompts: token ids of the prompts.
        finish_reasons: `eos`, `length` (max_new_tokens), `stop` (a stop string), `context` (the model's limit), or
            `error`.
        errors: for every row the error that ended it, or None; other rows went on.
        accepted: for every new token, True if a drafter had guessed it.
        statistics: statistics of all rows together.
        row_statistics: statistics of each row.
        seconds: wall-clock seconds of the whole call.
        exactness: with `exact=True`, why the tokens are those of plain decoding; None otherwise.
    """

    tokens: list[list[int]]
    texts: list[str] | None
    prompts: list[list[int]]
    finish_reasons: list[str]
    accepted: list[list[bool]]
    statistics: Statistics
    row_statistics: list[Statistics]
    seconds: float
    exactness: Exactness | None = None
    errors: list[str | None] = field(default_factory=list)

    @property
    def text(self) -> str:
        """The text of a single prompt's answer."""
        if self.texts is None or len(self.texts) != 1:
            raise UserError("`text` is for one prompt and a model with a tokenizer; use `texts` or `tokens`")
        return self.texts[0]

    @property
    def sequences(self) -> Tensor:
        """`(rows, tokens)` prompt and answer, right-padded with 0, as Hugging Face returns them."""
        return pad([prompt + new for prompt, new in zip(self.prompts, self.tokens, strict=True)], 0)

    @property
    def tau(self) -> float:
        """Tokens emitted per target forward, the bonus token included."""
        return self.statistics.tau

    @property
    def tokens_per_second(self) -> float:
        """New tokens of all rows per wall-clock second, prefill included."""
        return sum(len(row) for row in self.tokens) / self.seconds

    def __repr__(self) -> str:
        """Print the figures in one line, then each answer, long ones cut."""
        count, drafted = sum(map(len, self.tokens)), sum(map(sum, self.accepted))
        rows = "" if len(self.tokens) == 1 else f"{len(self.tokens)} answers, "
        share = f" ({drafted / count:.0%} from drafts)" if drafted else ""
        tau = f"tau {self.tau:.2f}, " if self.statistics.rounds else ""
        ends = ", ".join(dict.fromkeys(self.finish_reasons))
        figures = f"{tau}{self.tokens_per_second:.1f} tokens/s, ended by {ends}"
        answers: list[str] = self.texts if self.texts is not None else [str(row) for row in self.tokens]
        cut = (text if len(text) <= SHOWN_TEXT else f"{text[:SHOWN_TEXT]}..." for text in answers)
        return "\n".join([f"<GenerationOutput: {rows}{count} tokens{share}, {figures}>", *cut])


@dataclass
class Piece:
    """Streamed text of one decided token."""

    row: int
    token: int
    text: str
    accepted: bool
    """True if a drafter had guessed the token."""
    finish_reason: str | None


def pad(sequences: Sequence[Sequence[int]], value: int) -> Tensor:
    """Stack sequences to `(rows, longest)`, right-padded with `value`."""
    longest = max(len(sequence) for sequence in sequences)
    return torch.tensor([list(sequence) + [value] * (longest - len(sequence)) for sequence in sequences])


def short(count: int) -> str:
    """Format a count: `134515008` as `135M`."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count >= size:
            return f"{count / size:.3g}{letter}"
    return str(count)
