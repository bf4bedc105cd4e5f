"""Continuous batching: rows enter and leave while others are being decoded.

Admitted rows run their prompts piece by piece in a batch of their own, and their drafter reads them there; one that
cannot do so without drafting makes a round. Then they join the running batch, without either if its drafter rests. So a
running row never waits for more than one piece, and no row is padded to another row's prompt. This module decodes rows;
it does not decide which requests are admitted.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

import torch

from outdraft.control.costs import Costs
from outdraft.core.shape import TreeShape
from outdraft.drafting.base import Drafter
from outdraft.engine.round import Batch
from outdraft.engine.rows import Row
from outdraft.target.target import Target


class Decoder:
    """Decodes rows that may be added at any time.

    Args:
        drafter: the model that proposes tokens; None is plain decoding.
        shape: the tree that takes the most slots of all that will be asked for.
        costs: records what rounds cost; used where rows have controllers (then all rows have one).
    """

    def __init__(self, target: Target, drafter: Drafter | None, shape: TreeShape, costs: Costs | None = None):
        self.target, self.drafter, self.costs = target, drafter, costs or Costs()
        self.shape = shape
        """The shape of the next rounds' trees."""
        self._largest = shape
        self._running: Batch | None = None
        self._coming: deque[_Newcomers] = deque()

    @property
    def rows(self) -> list[Row]:
        """All rows in decoding, including those that still run their prompts."""
        running = self._running.rows if self._running is not None else []
        return [*running, *(row for newcomers in self._coming for row in newcomers.batch.rows)]

    @property
    def prefilling(self) -> bool:
        """True while some rows have not joined the running batch."""
        return bool(self._coming)

    @property
    def newcomers(self) -> list[Row]:
        """The rows whose prompts run next."""
        return list(self._coming[0].batch.rows) if self._coming else []

    def withdraw(self) -> None:
        """Forget `newcomers`, as after an error in their prompts; the running batch is not touched."""
        self._coming.popleft()

    def add(self, rows: Sequence[Row]) -> None:
        """Admit rows together; each wants at least one new token, and their prompts run side by side."""
        batch = Batch(self.target, self.drafter, rows, self._largest, self.costs)
        self._coming.append(_Newcomers(batch))

    @torch.inference_mode()
    def prefill(self, tokens: int) -> list[Row]:
        """Run about `tokens` prompt tokens of the rows admitted first, or the first round of those rows.

        Returns:
            The rows that gained tokens.
        """
        if not self._coming:
            return []
        newcomers = self._coming[0]
        newcomers.batch.shape = self.shape
        gained = newcomers.step(tokens, self._running)
        if newcomers.ready:
            self._coming.popleft()
            if self._running is None:
                self._running = newcomers.batch
                self._let_go()
            elif newcomers.batch.rows:
                self._running.join(newcomers.batch)
        return gained

    @torch.inference_mode()
    def round(self) -> list[Row]:
        """Run one round of the running batch and return the rows that gained tokens."""
        if self._running is None:
            return []
        self._running.shape = self.shape
        gained = self._running.round()
        self._let_go()
        return gained

    def _let_go(self) -> None:
        """Drop the running batch and its cache if it has no rows left."""
        if self._running is not None and not self._running.rows:
            self._running = None

    @torch.inference_mode()
    def remove(self, row: Row, reason: str) -> None:
        """Take a row out before the next round, whatever state it is in."""
        row.finish_reason = reason
        if self._running is not None and any(one is row for one in self._running.rows):
            self._running.leave()
            self._let_go()
            return
        for newcomers in self._coming:
            if any(one is row for one in newcomers.batch.rows):
                newcomers.leave()
        self._coming = deque(newcomers for newcomers in self._coming if newcomers.batch.rows)


class _Newcomers:
    """An admitted batch that has not joined the running one."""

    def __init__(self, batch: Batch):
        self.batch = batch
        self.ready = False
        self._pieces: Iterator[list[Row]] | None = None
        self._begun = False

    def step(self, tokens: int, running: Batch | None) -> list[Row]:
        """Run the next prompt piece, or the round that follows the last piece.

        Args:
            tokens: prompt tokens of the piece, of all rows.
            running: the batch that the rows are to join.
        """
        if self._begun:
            self.ready = True
            return self.batch.round()
        if self._pieces is None:
            self._pieces = self.batch.prefill_in_pieces(max(1, tokens // len(self.batch.rows)))
        gained = next(self._pieces)
        if gained:
            self._begun = True
            unread = running is not None and running.rests(self.batch)
            self.ready = not self.batch.rows or unread or self.batch.read()
        return gained

    def leave(self) -> None:
        """Remove finished rows; during the prompts, rows stay until the last piece unless all have finished."""
        if self._begun or all(row.finish_reason is not None for row in self.batch.rows):
            self.batch.leave()
