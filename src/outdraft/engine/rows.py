"""A sequence that is being decoded: what was asked for, and what has been decided."""

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
from outdraft.drafting.repeats import Repeats
from outdraft.errors import first_line


@dataclass
class Row:
    """One sequence being decoded.

    Attributes:
        prompt: token ids.
        warper: logits to distribution.
        chance: its dice, which drafting and verification share.
        max_new_tokens: decided tokens at most.
        stop_token_ids: a token of these ends the row and is part of it.
        should_stop: called with the new tokens after each of them; True ends the row there (stop strings).
        tokens: decided so far, the prompt not included.
        finish_reason: `eos`, `length`, `stop`, `context` or `error`; None while the row is running.
        error: why it could not go on, where that is how it ended.
        accepted: for every decided token, whether it was drafted.
        controller: says how far to draft for it; None drafts as far as the shape allows.
        repeats: when what the text repeats is drafted in the drafter's place; None asks the drafter always.
        watch: called with the target's `(tokens, vocab)` logits of newly decided tokens, once those are in `tokens`.
        watch_prompt: called with those of the prompt's tokens but the first, some at a time.
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
    statistics: Statistics = field(default_factory=Statistics)
    controller: Controller | None = None
    repeats: Repeats | None = None
    watch: Callable[[Tensor], None] | None = None
    watch_prompt: Callable[[Tensor], None] | None = None

    def extend(self, tokens: Sequence[int], context_length: int, drafted: int) -> int:
        """Append decided tokens one by one, the first of them drafted, ending exactly where plain decoding would.

        Returns:
            How many were taken.
        """
        for taken, token in enumerate(tokens, start=1):
            self.tokens.append(token)
            self.accepted.append(taken <= drafted)
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
        """End here, alone: the row's logits are no numbers, or what was given to it raised an error."""
        self.finish_reason = "error"
        self.error = (
            f"after {len(self.tokens)} new tokens the logits are not finite (NaN, infinite, or every token ruled out): "
            "the model's weights are broken, its precision is too low (try float32), or a logits processor did it"
            if error is None
            else f"after {len(self.tokens)} new tokens {type(error).__name__} was raised: {first_line(error)}"
        )

    def tell(self, watch: Callable[[Tensor], None] | None, logits: Tensor) -> None:
        """Call one of those who watch the row; an error of theirs ends this row alone."""
        try:
            if watch is not None:
                watch(logits)
        except Exception as error:
            self.fail(error)

    def _stops(self) -> bool:
        try:
            return self.should_stop is not None and self.should_stop(self.tokens)
        except Exception as error:  # stopping criteria and tokenizers are the user's
            self.fail(error)
            return False


class History:
    """Everything decided of one row, prompt included; as a tensor once somebody asks, in a buffer that grows in place.

    Args:
        prompt: token ids.
        capacity: tokens to come, at most.
        device: of the tensor.
        repeats: when to draft what the row repeats; None never does.
    """

    def __init__(self, prompt: Sequence[int], capacity: int, device: torch.device, repeats: Repeats | None = None):
        self.known, self.size, self.device = list(prompt), capacity + len(prompt), device
        self.buffer: Tensor | None = None
        self.written = 0
        self.repeats = repeats
        self._text = None if repeats is None else repeats.text(prompt)

    @property
    def tokens(self) -> Tensor:
        """`(tokens,)` of the row."""
        if self.buffer is None:
            self.buffer = torch.zeros(self.size, dtype=torch.long, device=self.device)
        if self.written < len(self.known):
            self.buffer[self.written : len(self.known)] = torch.tensor(self.known[self.written :])
            self.written = len(self.known)
        return self.buffer[: self.written]

    def append(self, tokens: Sequence[int]) -> None:
        """Take in newly decided tokens."""
        self.known += tokens
        if self._text is not None:
            self._text.extend(tokens)

    def repeated(self, limit: int) -> list[int]:
        """Candidates that the row's own text gives; at most `limit`, none where it repeats nothing."""
        if self.repeats is None or self._text is None:
            return []
        return self.repeats.candidates(self._text, limit)


class Prefixes(Sequence[Tensor]):
    """The rows' histories as tensors for those who read them, which most drafters and settings do not."""

    def __init__(self, histories: Sequence[History]):
        self.histories = histories

    def __len__(self) -> int:
        return len(self.histories)

    def __getitem__(self, row: Any) -> Any:
        return self.histories[row].tokens


def compacted(staying: Sequence[bool]) -> list[int]:
    """The places of those that stay, the last ones in the gaps that others leave, so that few are moved."""
    order = list(range(sum(staying)))
    behind = [place for place in range(len(order), len(staying)) if staying[place]]
    for place in order:
        if not staying[place]:
            order[place] = behind.pop()
    return order
