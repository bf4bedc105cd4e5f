"""Whole drafts on a GPU, each kind recorded once as a CUDA graph.

A recorded draft needs no decision of the host. The usual functions (`expand.py` and `sample.py` of `drafting/`) take
pairs in, grow levels and choose candidates, over lengths on the device and random numbers drawn ahead. A draft of six
levels is some 300 launches, which a host takes as long to issue as a target of 8B takes to run. Prompts, budgets and
distributions that depend on the prefix are drafted unrecorded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from outdraft.core.coupling import Shown, noise_of
from outdraft.core.dice import Chance, Dice, Thrown
from outdraft.core.sampling import UNREAD, Warper
from outdraft.core.sampling_settings import SamplingSettings
from outdraft.core.shape import TreeShape
from outdraft.core.tensors import chosen, itself
from outdraft.core.tree import Tree
from outdraft.drafting.base import RowContext, Update
from outdraft.target.backends.graphs import SIZES, Recordings, Replayed, put
from outdraft.target.backends.tree_attention import Pending
from outdraft.target.buffers import rounded_rows
from outdraft.target.target import Target

GREEDY = Warper(SamplingSettings(), 0, 1)
"""The warper that stands for rows whose candidates are chosen, not drawn."""

MOST_NEW = 64
"""The most decided tokens of a row that a recorded draft takes in; a prompt has more."""


class Recordable(Protocol):
    """A drafter whose drafts can be recorded."""

    target: Target

    def unasked(self, given: Given, cache: Any, shape: TreeShape, rows: RowContext) -> Tree:
        """Take decided tokens in and grow trees, without a question of the host."""


class NoCache:
    """The rows of a drafter without keys and values, as a cache that holds nothing."""

    def __init__(self, rows: int):
        self.lengths, self.room = [1] * rows, rounded_rows(rows)
        self.addresses = (self.room,)

    def room_for(self, pending: int) -> None:
        pass

    def advance(self, counts: Sequence[int]) -> None:
        pass


class RecordedDrafts(Recordings):
    """The recorded drafts of one drafter.

    Args:
        drafter: the drafter, with a target on backend `graphs`.
    """

    def __init__(self, drafter: Recordable):
        super().__init__("drafts cannot be recorded ({}); they run unrecorded")
        self.drafter = drafter

    def serves(self, update: Update, shape: TreeShape, rows: RowContext, cache: Any) -> bool:
        """Return True if a recording can make this draft."""
        scorings, kinds = {warper.scoring for warper in rows.warpers}, {warper.kind for warper in rows.warpers}
        drawn = shape.candidates != "top-k" and not rows.greedy and not rows.coupled
        return (
            self.records
            and shape.size > 1
            and rows.budget is None
            and max(update.counts) <= MOST_NEW
            and min(cache.lengths) > 0
            and (not rows.coupled or len(scorings) == 1)
            and (not drawn or (len(kinds) == 1 and None not in kinds))
            # Chains without replacement are as many as the distribution has tokens, which the host would have to ask.
            and (not drawn or shape.top_k == 1 or shape.candidates == "sampled-with-replacement")
            and (not drawn or all(isinstance(chance, Dice) for chance in rows.chances))
            and (not drawn or shape.candidates != "spine")  # the host puts chosen candidates beside a drawn chain
        )

    def __call__(self, update: Update, shape: TreeShape, rows: RowContext, cache: Any) -> Tree | None:
        """Take in the update and grow trees, as `DraftState.propose` does; return None without effect where
        recording fails."""
        count, new = len(update.counts), max(update.counts)
        new = next(size for size in SIZES if size >= new)
        cache.room_for(new + shape.top_k * (shape.depth + 1))
        coupled = rows.coupled and not rows.greedy
        drawn = shape.candidates != "top-k" and not rows.greedy and not coupled
        kind = rows.warpers[0].scoring if drawn or coupled else None
        key = (cache.addresses, new, shape, kind, coupled, update.taps.shape[2])
        draft: _Draft | None = self.filled(
            key,
            lambda: _Draft(self.drafter, cache.room, new, shape, rows if drawn or coupled else None, update.taps),
            lambda found: found.fill(update, cache, rows.chances),
            update.taps.device,
        )
        if draft is None:
            return None
        cache.advance(update.counts)
        return draft.tree(count)


@dataclass
class Given:
    """The inputs of a recorded draft, on the device, with rows and tokens padded."""

    tokens: Tensor
    taps: Tensor
    counts: Tensor
    lengths: Tensor
    shares: Tensor
    noise: Tensor

    @property
    def roots(self) -> Tensor:
        """`(rows,)` the last token of each row."""
        return self.tokens.gather(1, self.counts[:, None] - 1)[:, 0]


class _Draft:
    """The recording of one kind of draft.

    Args:
        room: rows of the drafter's buffers, to which a batch is padded.
        new: decided tokens of a row, padded.
        rows: the rows whose settings draw candidates; None where candidates are chosen.
        taps: a tensor of taps, for width, precision and device.
    """

    def __init__(
        self,
        drafter: Recordable,
        room: int,
        new: int,
        shape: TreeShape,
        rows: RowContext | None,
        taps: Tensor,
    ):
        self.drafter, self.shape, device = drafter, shape, taps.device
        self.cache: Any = None
        self.warper = None if rows is None else rows.warpers[0]
        self.coupled = rows is not None and rows.coupled
        drawn, width = rows is not None and not self.coupled, min(shape.top_k, shape.size - 1)
        self.throws = width * min(shape.depth + 1, (shape.size - 1) // width) if drawn else 0
        self.given = Given(
            torch.zeros(room, new, dtype=torch.long, device=device),
            torch.zeros(room, new, taps.shape[2], dtype=taps.dtype, device=device),
            torch.ones(room, dtype=torch.long, device=device),
            torch.zeros(room, dtype=torch.int32, device=device),
            torch.zeros(room, self.throws, dtype=torch.float64, device=device),
            torch.ones(room, self.depths, drafter.target.vocab_size if self.coupled else 0, device=device),
        )
        self._rows = 0

    def fill(self, update: Update, cache: Any, chances: Sequence[Chance]) -> None:
        """Copy the decided tokens and the rows' lengths to the device, once; draw the random numbers."""
        given, (rows, new) = self.given, update.tokens.shape
        if rows != self._rows:
            given.lengths.zero_()
            given.counts.fill_(1)
            self._rows = rows
        width = min(new, given.tokens.shape[1])
        given.tokens[:rows, :width] = update.tokens[:, :width]
        given.taps[:rows, :width] = update.taps[:, :width]
        put(given.counts, update.counts)
        put(given.lengths, cache.lengths)
        self.cache = cache
        if self.coupled:
            given.noise[:rows] = noise_of(chances, self.depths)  # type: ignore[arg-type]
        if self.throws:
            put(given.shares, [[dice.uniform() for _ in range(self.throws)] for dice in chances])  # type: ignore[attr-defined]

    def record(self, memory: Any) -> None:
        self._replayed = Replayed(self._run, self.given.tokens.device, memory)

    def tree(self, rows: int) -> Tree:
        """Replay the draft and return the trees of the first `rows` rows."""
        tokens, *rest = (part[:rows] for part in self._replayed())
        self.cache = None  # it may end, and a recording knows its buffers
        candidates, count, levels = self._made
        if self.chains is not None:
            return Tree.chains(tokens, self.chains, candidates, rest[0] if rest else None)
        parents, depths, ancestors = rest
        tree = Tree(tokens, parents, [count] * rows, levels=levels)
        tree.depths, tree.ancestors = depths, ancestors
        return tree

    @property
    def depths(self) -> int:
        """The number of levels of the deepest tree."""
        return self.shape.depth + 1

    @property
    def chains(self) -> int | None:
        """The number of chains, for a tree of chains; None for others."""
        if not self.throws and self.shape.top_k > 1:
            return None
        return min(self.shape.top_k, self.shape.size - 1)

    def _context(self) -> RowContext:
        if self.warper is None:
            return RowContext([], [GREEDY], [])
        if self.coupled:
            noise = self.given.noise
            return RowContext([UNREAD] * len(noise), [self.warper] * len(noise), [Shown(own) for own in noise])
        shares = self.given.shares
        return RowContext([UNREAD] * len(shares), [self.warper] * len(shares), [Thrown(own) for own in shares])

    def _run(self) -> tuple[Tensor, ...]:
        tree = self.drafter.unasked(self.given, self.cache, self.shape, self._context())
        self._made = (tree.candidates, tree.counts[0], tree.levels)
        if self.chains is None:
            return tree.tokens, tree.parents, tree.depths, tree.ancestors
        return (tree.tokens,) if tree.draft_probs is None else (tree.tokens, tree.draft_probs)


class PendingLevels:
    """The pending tokens of a tree's levels, over lengths on the device.

    Args:
        base: `(rows,)` committed tokens of every row, on the device.
        cache: a cache that has `whole`.
        last: largest position; None for no bound.
        windows: as in `Pending`.
    """

    def __init__(self, base: Tensor, cache: Any, last: int | None = None, windows: tuple[int | None, ...] = (None,)):
        self.base, self.cache, self.last, self.windows = base, cache, last, windows
        self._mask = torch.empty(0)
        self._positions: list[Tensor] = []

    def below(self, parents: Tensor) -> Pending:
        """Add a level of nodes, whose `(rows, nodes)` parents index the level before."""
        (rows, nodes), device = parents.shape, parents.device
        own = itself(rows, nodes, device)
        self._mask = torch.cat([chosen(self._mask, parents), own], dim=2) if self._positions else own
        positions = self.base.long() + len(self._positions)
        if self.last is not None:
            positions = positions.clamp(max=self.last)
        self._positions.append(positions[:, None].expand(rows, nodes))
        return Pending(self.base, self._mask, torch.cat(self._positions, dim=1), self.windows, self.cache)
