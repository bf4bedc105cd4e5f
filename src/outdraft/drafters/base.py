"""The protocol that every drafter keeps.

A `Drafter` is a loaded model or rule; `begin` gives it a `DraftState` for a batch of rows. Each round the state is told
what was decided (`Update`) and answers with a tree. It never sees the target's logits and never decides what is kept.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from outdraft.errors import UserError
from outdraft.sampling import Chance, Warper
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


CPU_TREE = TreeShape(depth=3, top_k=3, size=10)
"""Few draft steps, few nodes: measured on two cores (docs/architecture.md)."""

CPU_CHAIN = TreeShape.chain(4, candidates="sampled")
"""At temperature 1 a chain sampled from the drafter's law was accepted twice as far as a tree of its best guesses."""

GPU_TREE = TreeShape(depth=5, top_k=10, size=60)
"""EAGLE-2's tree for targets of 7B and 8B."""


@dataclass
class Update:
    """What the last verdict decided, for every row.

    Attributes:
        tokens: `(rows, m)` newly decided tokens, the last one the root of the next tree; right-padded.
        features: `(rows, m, hidden)` the target's feature at the position before each of them.
        counts: how many are real.
    """

    tokens: Tensor
    features: Tensor
    counts: list[int]


@dataclass
class RowContext:
    """What a drafter may know of the sampling of each row, to draw its candidates from a law like the target's."""

    prefixes: Sequence[Tensor]
    """`(tokens,)` everything decided so far, the root's token last."""
    warpers: Sequence[Warper]
    chances: Sequence[Chance]

    @property
    def greedy(self) -> bool:
        return all(warper.greedy for warper in self.warpers)


class DraftState(ABC):
    """A drafter's memory of the rows that it drafts for."""

    @abstractmethod
    def propose(self, update: Update, shape: TreeShape, rows: RowContext) -> Tree:
        """Take in what was decided and grow a tree of at most `shape` for every row."""

    def observe(self, update: Update) -> None:  # noqa: B027
        """Take in what was decided without drafting; called instead of `propose` in rounds that draft nothing."""

    @abstractmethod
    def select_rows(self, rows: Sequence[int]) -> None:
        """Keep only these rows, in this order."""


class Drafter(ABC):
    """Something that proposes trees."""

    method: str
    """Its name on the command line and in reports."""

    @abstractmethod
    def begin(self, prompts: Sequence[Tensor], capacity: int) -> DraftState:
        """A state for these `(tokens,)` prompts; `capacity` tokens a row are expected at most."""

    has_law = True
    """Whether it has probabilities to sample candidates from."""

    def default_shape(self, device: torch.device, sampling: bool = False) -> TreeShape:
        """The tree that suits it on this device: verifying is nearly free on a GPU, draft steps are not on a CPU."""
        if device.type != "cpu":
            return GPU_TREE
        return CPU_CHAIN if sampling else CPU_TREE

    @property
    def num_parameters(self) -> int:
        """Parameters of its own, those of the target not counted."""
        return 0
