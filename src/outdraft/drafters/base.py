"""The protocol that every drafter keeps.

A `Drafter` is a loaded model or rule; `begin` gives it a `DraftState` for a batch of rows. In every round that drafts
the state is told what was decided since (`Update`) and answers with a tree. It never sees the target's logits and never
decides what is kept.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from outdraft.cache import SlotCache
from outdraft.coupling import Coupled
from outdraft.errors import UserError
from outdraft.places import integers
from outdraft.run import TargetRun
from outdraft.sampling import Chance, Warper
from outdraft.target import Target
from outdraft.tree import Tree

Choice = Literal["top-k", "sampled", "sampled-with-replacement"]


@dataclass(frozen=True)
class TreeShape:
    """How large a tree may get; EAGLE's depth, top_k and total_token."""

    depth: int
    """Draft steps after the root's own expansion; paths are at most depth + 1 candidates long."""
    top_k: int
    """Nodes expanded a level, and children considered of each; 1 is a chain."""
    size: int
    """Nodes that the target verifies, the root included."""
    candidates: Choice = "top-k"
    """Most probable candidates in EAGLE-2's dynamic tree, or `top_k` chains sampled from the drafter's law."""

    def __post_init__(self) -> None:
        for name, least in (("depth", 0), ("top_k", 1), ("size", 1)):
            if getattr(self, name) < least:
                raise UserError(f"tree_{name} must be at least {least}, not {getattr(self, name)}")
        if self.candidates not in get_args(Choice):
            raise UserError(f"candidates must be one of {', '.join(get_args(Choice))}, not '{self.candidates}'")

    @classmethod
    def chain(cls, num_speculative_tokens: int, **settings: object) -> TreeShape:
        """A chain of so many candidates."""
        if num_speculative_tokens < 1:
            raise UserError(
                f"num_speculative_tokens must be at least 1, not {num_speculative_tokens}; --method none drafts nothing"
            )
        return cls(num_speculative_tokens - 1, 1, num_speculative_tokens + 1, **settings)  # type: ignore[arg-type]

    def at_most(self, path: int, size: int) -> TreeShape:
        """The same shape with paths of at most `path` candidates and at most `size` nodes (both at least 1)."""
        return replace(self, depth=min(self.depth, path - 1), size=min(self.size, size))

    def doubled(self) -> TreeShape:
        """Paths twice as long: where a controller decides how far, this is how far it may go."""
        longer = 2 * self.depth + 1
        return replace(self, depth=longer, size=longer + 2 if self.top_k == 1 else 2 * self.size)


CPU_TREE = TreeShape(depth=3, top_k=3, size=10)
"""Few draft steps, few nodes: measured on two cores (docs/architecture.md)."""

GREEDY_CHAIN, BATCH_CHAIN, BATCH = TreeShape.chain(4), TreeShape.chain(3), 4
"""In place of that tree where nobody asks for one and every level costs a step; the second from `BATCH` rows on. All
shipped drafters were faster with chains once the target's layers took less time (docs/trees.md)."""

CPU_CHAIN = TreeShape.chain(4, candidates="sampled")
"""At temperature 1 a chain sampled from the drafter's law was accepted twice as far as a tree of its best guesses."""

GPU_TREE = TreeShape(depth=5, top_k=10, size=60)
"""EAGLE-2's tree for targets of 7B and 8B."""

GPU_CHAIN = TreeShape.chain(5, candidates="sampled")
"""At temperature 1, as on a CPU."""

GPU_NODES = 128
"""Nodes of all rows that a GPU verifies in little more time than one token: an 8B target took 5.3 ms over one, 6.7 over
60 and 8.3 over 128 on an H200, and from there on in proportion (docs/measurements/gpu.md)."""


def gpu_tree(rows: int) -> TreeShape:
    """`GPU_TREE`, or as much of it as so many rows decoded together can verify at that price."""
    size = min(GPU_TREE.size, GPU_NODES // rows)
    if size > GPU_TREE.top_k:
        return replace(GPU_TREE, size=size)
    return TreeShape.chain(max(1, min(GPU_TREE.depth, size - 1)))


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


class Pace(Protocol):
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
    """What a drafter may know of the sampling of each row, to draw its candidates from a law like the target's."""

    prefixes: Sequence[Tensor]
    """`(tokens,)` everything decided so far, the root's token last."""
    warpers: Sequence[Warper]
    chances: Sequence[Chance]
    pace: Pace | None = None
    """None: as far as the shape allows."""

    @property
    def greedy(self) -> bool:
        return all(warper.greedy for warper in self.warpers)

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


class Drafter(ABC):
    """Something that proposes trees."""

    method: str
    """Its name on the command line and in reports."""

    def start(self, target: Target, cache: SlotCache) -> TargetRun:
        """The target at work on a batch of rows; a drafter made of the target's own layers runs it in parts."""
        return TargetRun(target, cache)

    @abstractmethod
    def begin(self, prompts: Sequence[Tensor], run: TargetRun) -> DraftState:
        """A state for these `(tokens,)` prompts, over which `run` has gone; its cache says how many slots to expect."""

    def slots(self, shape: TreeShape) -> int:
        """Slots of the target's cache that a round takes."""
        return shape.size

    has_law = True
    """Whether it has probabilities to sample candidates from."""

    stepwise = True
    """Whether every level of a draft costs a step of its own."""

    looks_back = False
    """Whether it drafts from what the text repeats, by itself."""

    def default_shape(self, device: torch.device, sampling: bool = False) -> TreeShape:
        """The tree that suits it on this device: verifying is nearly free on a GPU, draft steps are not on a CPU."""
        if device.type != "cpu":
            return GPU_CHAIN if sampling else GPU_TREE
        return CPU_CHAIN if sampling else CPU_TREE

    @property
    def num_parameters(self) -> int:
        """Parameters of its own, those of the target not counted."""
        return 0
