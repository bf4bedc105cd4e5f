"""The protocol that every drafter keeps.

A `Drafter` is a loaded model or rule; `begin` gives it a `DraftState` for a batch of rows. In every round that drafts
the state is told what was decided since (`Update`) and answers with a tree. It never sees the target's logits and never
decides what is kept.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from outdraft.core.coupling import Coupled
from outdraft.core.dice import Chance
from outdraft.core.sampling import Warper
from outdraft.core.shape import CPU_CHAIN, CPU_TREE, GPU_CHAIN, GPU_TREE, TreeShape
from outdraft.core.tensors import integers
from outdraft.core.tree import Tree
from outdraft.errors import UserError
from outdraft.target.cache import SlotCache
from outdraft.target.runner import ModelRunner
from outdraft.target.target import Target
from outdraft.target.views import Reads


@dataclass
class Update:
    """What was decided since the drafter was last asked, for every row.

    Attributes:
        tokens: `(rows, m)` newly decided tokens, the last one the root of the next tree; right-padded.
        taps: `(rows, m, hidden)` what the drafter reads of the target at the position before each of them: its feature,
            or what the run that its `start` makes gives instead.
        counts: how many are real.
    """

    tokens: Tensor
    taps: Tensor
    counts: list[int]

    @property
    def roots(self) -> Tensor:
        """`(rows,)` the last token of each."""
        last = integers(self.counts, self.tokens.device) - 1
        return self.tokens.gather(1, last[:, None])[:, 0]

    @classmethod
    def join(cls, updates: Sequence[Update]) -> Update:
        """Several, one after the other, as one."""
        if len(updates) == 1:
            return updates[0]
        rows = range(len(updates[0].counts))
        counts = [sum(update.counts[row] for update in updates) for row in rows]

        def joined(name: str) -> Tensor:
            whole = [
                torch.cat([getattr(update, name)[row, : update.counts[row]] for update in updates]) for row in rows
            ]
            return pad_sequence(whole, batch_first=True)

        return cls(joined("tokens"), joined("taps"), counts)

    @classmethod
    def beside(cls, first: Update, second: Update) -> Update:
        """Those of other rows after one's own."""

        def joined(name: str) -> Tensor:
            return pad_sequence([*getattr(first, name), *getattr(second, name)], batch_first=True)

        return cls(joined("tokens"), joined("taps"), first.counts + second.counts)

    def select_rows(self, rows: Sequence[int]) -> Update:
        """Only these rows, in this order."""
        index = torch.tensor(list(rows), device=self.tokens.device)
        return Update(self.tokens[index], self.taps[index], [self.counts[row] for row in rows])


class Budget(Protocol):
    """How far to draft, row by row: asked before anything of a level is drawn, told how sure the drafter is after."""

    going: list[bool]
    """Of every row, whether it drafts the present level; before the first one, whether it drafts at all."""

    def wants(self, nodes: int) -> list[bool]:
        """Of every row, whether it drafts the next level; a row that once did not gets no more in this round.

        Args:
            nodes: that verification will have to look at beyond the present ones of a row.
        """

    def drafted(self, confidences: Sequence[float | None]) -> None:
        """A level is there, and kept, in the rows that wanted it.

        Args:
            confidences: of every row; the probability of the level's candidates relative to that of the level above.
                None in a row that found nothing to draft. What stands at rows that did not want it is not read.
        """

    def sizes(self, gains: Sequence[Sequence[float]], levels: Sequence[Sequence[int]]) -> list[int]:
        """How many candidates of each row to verify, where they were chosen by rule.

        Args:
            gains: of every row, draft probabilities of its candidates' whole paths, largest first.
            levels: at which level each of them stands, the first being 0.
        """


@dataclass
class RowContext:
    """What a drafter may know of the sampling of each row, to draw its candidates from a distribution like the
    target's."""

    prefixes: Sequence[Tensor]
    """`(tokens,)` everything decided so far, the root's token last."""
    warpers: Sequence[Warper]
    chances: Sequence[Chance]
    budget: Budget | None = None
    """None: as far as the shape allows."""

    @property
    def greedy(self) -> bool:
        return all(warper.greedy for warper in self.warpers)

    def guided(self, device: torch.device) -> bool:
        """Whether drafts on this device are masked: masks are the host's, so that elsewhere they cost a transfer."""
        return device.type == "cpu" and any(warper.guides for warper in self.warpers)

    @property
    def coupled(self) -> bool:
        """Whether noise decides that drafter and target share, not dice (`coupling.py`)."""
        return bool(self.chances) and not self.greedy and all(isinstance(chance, Coupled) for chance in self.chances)


class DraftState(ABC):
    """A drafter's memory of the rows that it drafts for."""

    @abstractmethod
    def propose(self, update: Update, shape: TreeShape, rows: RowContext) -> Tree:
        """Take in what was decided since the last call and grow a tree of at most `shape` for every row."""

    @abstractmethod
    def select_rows(self, rows: Sequence[int]) -> None:
        """Keep only these rows, in this order."""

    def join(self, other: Any) -> None:
        """Take in the rows of another state of the same drafter after one's own, between rounds.

        Only serving needs it: rows join others that are being decoded.
        """
        raise UserError(f"{type(self).__name__} takes no further rows in, which serving needs; give it a `join`")


@dataclass(frozen=True)
class Limits:
    """What a drafter can do; a wrapper passes the whole of it on."""

    depth: int | None = None
    """Candidates that a path may have at most; None for any number."""
    stepwise: bool = True
    """Whether every level of a draft costs a step of its own."""
    probs: bool = True
    """Whether it has probabilities to sample candidates from."""
    looks_back: bool = False
    """Whether it drafts n-grams of the text by itself."""


class Drafter(ABC):
    """Something that proposes trees."""

    method: str
    """Its name on the command line and in reports."""

    reads = Reads()
    """What it reads of the target for every decided token."""

    limits = Limits()
    """What it can do."""

    def start(self, target: Target, cache: SlotCache) -> ModelRunner:
        """The target at work on a batch of rows, telling what is read."""
        return target.runner(cache, self.reads)

    @abstractmethod
    def begin(self, prompts: Sequence[Tensor], run: ModelRunner) -> DraftState:
        """A state for these `(tokens,)` prompts, over which `run` has gone; its cache says how many slots to expect."""

    def slots(self, shape: TreeShape) -> int:
        """Slots of the target's cache that a round takes."""
        return shape.size

    def default_shape(self, device: torch.device, sampling: bool = False) -> TreeShape:
        """The tree that suits it on this device: verifying is nearly free on a GPU, draft steps are not on a CPU."""
        if device.type != "cpu":
            return GPU_CHAIN if sampling else GPU_TREE
        return CPU_CHAIN if sampling else CPU_TREE

    @property
    def num_parameters(self) -> int:
        """Parameters of its own, those of the target not counted."""
        return 0
