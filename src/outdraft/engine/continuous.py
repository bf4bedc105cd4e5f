"""Rows that come while others are being decoded, and go when they like: one running batch, newcomers beside it.

Newcomers run their prompts piece by piece in a batch of their own, make one round there, in which the drafter reads the
prompt, and then join the running rows. So a running row never waits for more than a piece, and no row is ever padded to
another one's prompt. Knows rows and batches; nothing of requests or of who may come in.
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
    """Decodes rows that are added at any time.

    Args:
        target: decides.
        drafter: proposes; None is plain decoding.
        shape: the tree that takes the most slots of all that will be asked for.
        costs: told what rounds cost, where rows have controllers (all of them, then).
    """

    def __init__(self, target: Target, drafter: Drafter | None, shape: TreeShape, costs: Costs | None = None):
        self.target, self.drafter, self.costs = target, drafter, costs or Costs()
        self.shape = shape
        """Of the next rounds' trees."""
        self._largest = shape
        self._running: Batch | None = None
        self._coming: deque[_Newcomers] = deque()

    @property
    def rows(self) -> list[Row]:
        """All that are here, newcomers included."""
        running = self._running.rows if self._running is not None else []
        return [*running, *(row for newcomers in self._coming for row in newcomers.batch.rows)]

    @property
    def prefilling(self) -> bool:
        """Whether newcomers have not joined yet."""
        return bool(self._coming)

    def add(self, rows: Sequence[Row]) -> None:
        """These come in together, each of at least one new token; their prompts run side by side."""
        batch = Batch(self.target, self.drafter, rows, self._largest, self.costs)
        self._coming.append(_Newcomers(batch))

    @torch.inference_mode()
    def prefill(self, tokens: int) -> list[Row]:
        """A piece of about so many tokens of the first newcomers' prompts, or their own first round.

        Returns:
            The rows that gained tokens by it.
        """
        if not self._coming:
            return []
        newcomers = self._coming[0]
        newcomers.batch.shape = self.shape
        gained = newcomers.step(tokens)
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
        """One round of the running rows; those that gained tokens."""
        if self._running is None:
            return []
        self._running.shape = self.shape
        gained = self._running.round()
        self._let_go()
        return gained

    def _let_go(self) -> None:
        """Of an empty batch and its cache."""
        if self._running is not None and not self._running.rows:
            self._running = None

    @torch.inference_mode()
    def remove(self, row: Row, reason: str) -> None:
        """Take a row out before the next round, whatever it has got to."""
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
    """A batch on its way in."""

    def __init__(self, batch: Batch):
        self.batch = batch
        self.ready = False
        self._pieces: Iterator[list[Row]] | None = None
        self._begun = False

    def step(self, tokens: int) -> list[Row]:
        """The next piece, or the round that follows the last one."""
        if self._begun:
            self.ready = True
            return self.batch.round()
        if self._pieces is None:
            self._pieces = self.batch.prefill_in_pieces(max(1, tokens // len(self.batch.rows)))
        gained = next(self._pieces)
        if gained:
            self._begun = True
            self.ready = self.batch.drafts.drafter is None or not self.batch.rows
        return gained

    def leave(self) -> None:
        """Let finished rows go; amid their prompts rows stay until the last piece, unless all of them have finished."""
        if self._begun or all(row.finish_reason is not None for row in self.batch.rows):
            self.batch.leave()
