"""What was decided of the rows of a batch, for those who read it: as tensors, and as texts that repeat themselves.

Grows with every round; rows go and come as in the batch. Decides nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from outdraft.drafting.repeats import Repeats


class Prefix:
    """Everything decided of one row; as a tensor once somebody asks, in a buffer that grows in place.

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
        """These were decided."""
        self.known += tokens
        if self._text is not None:
            self._text.extend(tokens)

    def repeated(self, limit: int) -> list[int]:
        """Candidates that the row's own text gives; at most `limit`, none where it repeats nothing."""
        if self.repeats is None or self._text is None:
            return []
        return self.repeats.candidates(self._text, limit)


class Prefixes(Sequence[Tensor]):
    """The rows' prefixes for those who read them, which most drafters and settings do not."""

    def __init__(self, prefixes: Sequence[Prefix]):
        self.prefixes = prefixes

    def __len__(self) -> int:
        return len(self.prefixes)

    def __getitem__(self, row: Any) -> Any:
        return self.prefixes[row].tokens
