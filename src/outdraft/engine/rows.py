"""The sequences being decoded: what each was asked for, and what was decided for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from outdraft.control.base import Controller
from outdraft.core.dice import Chance
from outdraft.core.sampling import Warper
from outdraft.core.statistics import Statistics
from outdraft.drafting.ngrams import Luck, NgramSettings
from outdraft.errors import first_line
from outdraft.target.ranks import said_by_first


@dataclass
class Row:
    """One sequence being decoded.

    Attributes:
        prompt: token ids.
        warper: turns logits into the distribution of the next token.
        chance: source of random numbers, shared by drafting and verification.
        max_new_tokens: largest number of decided tokens.
        stop_token_ids: tokens that end the row; the row keeps the one that ended it.
        should_stop: called with the new tokens after each of them; True ends the row there (stop strings).
        tokens: tokens decided so far, without the prompt.
        finish_reason: `eos`, `length`, `stop`, `context` or `error`; None while the row is running.
        error: message, if the row ended with an error.
        accepted: for every decided token, True if it was drafted.
        copied: for every decided token, True if an n-gram draft that overrode the drafter held it.
        controller: decides how far to draft for the row; None drafts as far as the shape allows.
        ngrams: when n-gram drafts override the drafter; None always asks the drafter.
        watch: called with the target's `(tokens, vocab)` logits of newly decided tokens, once those are in `tokens`.
        watch_prompt: called with the logits of the prompt's tokens but the first, a piece at a time.
        shared: True if several processes decode the row together, so that the first one's `should_stop` ends it.
    """

    prompt: list[int]
    warper: Warper
    chance: Chance
    max_new_tokens: int
    stop_token_ids: frozenset[int] = frozenset()
    should_stop: Callable[[list[int]], bool] | None = None
    tokens: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    error: str | None = None
    accepted: list[bool] = field(default_factory=list)
    copied: list[bool] = field(default_factory=list)
    statistics: Statistics = field(default_factory=Statistics)
    controller: Controller | None = None
    ngrams: NgramSettings | None = None
    watch: Callable[[Tensor], None] | None = None
    watch_prompt: Callable[[Tensor], None] | None = None
    shared: bool = False

    def extend(self, tokens: Sequence[int], context_length: int, drafted: int, copied: bool = False) -> int:
        """Append decided tokens one by one, the first `drafted` of them drafted (by an n-gram draft, if `copied`), and
        end exactly where plain decoding would.

        Returns:
            The number of tokens that were appended.
        """
        for taken, token in enumerate(tokens, start=1):
            self.tokens.append(token)
            self.accepted.append(taken <= drafted)
            self.copied.append(copied and taken <= drafted)
            if token in self.stop_token_ids:
                self.finish_reason = "eos"
            elif self._stops():
                self.finish_reason = "stop"
            elif self.error is not None:
                pass
            elif len(self.tokens) >= self.max_new_tokens:
                self.finish_reason = "length"
            elif len(self.prompt) + len(self.tokens) >= context_length:
                self.finish_reason = "context"
            if self.finish_reason is not None:
                return taken
        return len(tokens)

    def fail(self, error: Exception | None = None) -> None:
        """End this row only: its logits are not finite, or a callback of the user's raised `error`."""
        self.finish_reason = "error"
        self.error = (
            f"after {len(self.tokens)} new tokens the logits are not finite (NaN, infinite, or every token ruled out): "
            "the model's weights are broken, its precision is too low (try float32), or a logits processor did it"
            if error is None
            else f"after {len(self.tokens)} new tokens {type(error).__name__} was raised: {first_line(error)}"
        )

    def tell(self, watch: Callable[[Tensor], None] | None, logits: Tensor) -> None:
        """Call a watcher of the row with logits; an error of the watcher's ends this row only."""
        try:
            if watch is not None:
                watch(logits)
        except Exception as error:
            self.fail(error)

    def _stops(self) -> bool:
        if self.should_stop is None:
            return False
        stops = False
        try:
            stops = self.should_stop(self.tokens)
        except Exception as error:  # stopping criteria and tokenizers are the user's
            self.fail(error)
        if self.shared:
            stops, self.error, self.finish_reason = said_by_first((stops, self.error, self.finish_reason))
        return stops


class History:
    """The tokens of one row, prompt included. A tensor of them is made on request, in a buffer that grows in place.

    Args:
        capacity: largest number of tokens to come.
        ngrams: when to draft n-grams of the row; None never does.
    """

    def __init__(self, prompt: Sequence[int], capacity: int, device: torch.device, ngrams: NgramSettings | None = None):
        self.known, self.size, self.device = list(prompt), capacity + len(prompt), device
        self.buffer: Tensor | None = None
        self.written = 0
        self.ngrams = ngrams
        self._text = None if ngrams is None else ngrams.text(prompt)
        self.luck = Luck()

    @property
    def tokens(self) -> Tensor:
        """`(tokens,)` all tokens of the row so far."""
        if self.buffer is None:
            self.buffer = torch.zeros(self.size, dtype=torch.long, device=self.device)
        if self.written < len(self.known):
            self.buffer[self.written : len(self.known)] = torch.tensor(self.known[self.written :])
            self.written = len(self.known)
        return self.buffer[: self.written]

    def append(self, tokens: Sequence[int]) -> None:
        self.known += tokens
        if self._text is not None:
            self._text.extend(tokens)

    def repeated(self, limit: int, idle: bool = False) -> list[int]:
        """Return at most `limit` n-gram candidates from the row's own text; none if it repeats nothing.

        Args:
            idle: as in `NgramSettings.candidates`.
        """
        if self.ngrams is None or self._text is None:
            return []
        return self.ngrams.candidates(self._text, limit, idle)


class Prefixes(Sequence[Tensor]):
    """The rows' histories as tensors, made only when read, which most drafters and settings never do."""

    def __init__(self, histories: Sequence[History]):
        self.histories = histories

    def __len__(self) -> int:
        return len(self.histories)

    def __getitem__(self, row: Any) -> Any:
        return self.histories[row].tokens


def compacted(staying: Sequence[bool]) -> list[int]:
    """Return the indices of the rows that stay; the last ones fill the gaps, so that few rows are moved."""
    order = list(range(sum(staying)))
    behind = [place for place in range(len(order), len(staying)) if staying[place]]
    for place in order:
        if not staying[place]:
            order[place] = behind.pop()
    return order
