"""Many rows decoded at once, whose places are filled again as they end.

Newcomers wait until a few places are free, so that their prompts run together, next to prompts of like length. Knows
rows; nothing of what they are for.
"""

from __future__ import annotations

from collections.abc import Sequence

from outdraft.core.shape import TreeShape
from outdraft.drafting.base import Drafter
from outdraft.engine.continuous import Decoder
from outdraft.engine.rows import Row
from outdraft.target.memory import SHARE, free_bytes, slot_bytes
from outdraft.target.target import Target

PREFILL_TOKENS = 1024
"""Of prompts that run at once."""

PADDING = 1.25
"""The longest prompt of those that run side by side, over the shortest."""

TOGETHER = 12
"""Newcomers wait until one of so many places is free: alone each would read all weights once more."""


class Crowd:
    """Up to so many rows being decoded.

    Args:
        target: decides.
        drafter: proposes; None is plain decoding.
        shape: of all trees, so that a row's draws do not follow from its company.
        most: rows at once; fewer where the memory does not hold the cache of so many.
    """

    def __init__(self, target: Target, drafter: Drafter | None, shape: TreeShape, most: int):
        self.most = most
        self._decoder = Decoder(target, drafter, shape)
        self._context = target.context_length
        self._spare = shape.size if drafter is None else drafter.slots(shape)
        self._slots = int(SHARE * free_bytes(target.device)) // slot_bytes(target)

    @property
    def rows(self) -> list[Row]:
        """All that are here."""
        return self._decoder.rows

    @property
    def places(self) -> int:
        """For rows that may come in now; none while it is worth waiting for more of them."""
        free = self.most - len(self.rows)
        return free if free >= max(1, self.most // TOGETHER) else 0

    def fits(self, row: Row, coming: Sequence[Row]) -> bool:
        """Whether the cache has room for it, beside the rows that are here and those that come in with it."""
        rows = [*self.rows, *coming, row]
        return len(rows) == 1 or len(rows) * max(map(self._width, rows)) <= self._slots

    def admit(self, rows: Sequence[Row]) -> None:
        """These come in."""
        group: list[Row] = []
        for row in sorted(rows, key=lambda row: len(row.prompt), reverse=True):
            longest = len(group[0].prompt) if group else 0
            if group and (longest > PADDING * len(row.prompt) or (len(group) + 1) * longest > PREFILL_TOKENS):
                self._decoder.add(group)
                group = []
            group.append(row)
        if group:
            self._decoder.add(group)

    def step(self) -> list[Row]:
        """A piece of the newcomers' prompts, else a round of all rows; those that have ended by it."""
        decoder = self._decoder
        gained = decoder.prefill(PREFILL_TOKENS) if decoder.prefilling else decoder.round()
        return [row for row in gained if row.finish_reason is not None]

    def _width(self, row: Row) -> int:
        """Slots of the cache that it takes at most."""
        repeated = 0 if row.repeats is None else row.repeats.most
        return min(len(row.prompt) + row.max_new_tokens, self._context) + self._spare + repeated
