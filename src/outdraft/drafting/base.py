"""The protocol that every drafter implements.

A `Drafter` is a loaded model or rule; `begin` gives it a `DraftState` for a batch of rows. In every round that drafts,
the state gets the tokens decided since (`Update`) and returns a tree. It never sees the target's logits and never
decides what is kept.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from outdraft.core.coupling import Coupled
from outdraft.core.dice import Chance
from outdraft.core.sampling import Warper
from outdraft.core.shape import CPU_CHAIN, CPU_TREE, GPU_CHAIN, GPU_TREE, TreeShape
from outdraft.core.tensors import chosen, integers, sent
from outdraft.core.tree import Tree
from outdraft.errors import UserError
from outdraft.target.cache import SlotCache
from outdraft.target.runner import ModelRunner
from outdraft.target.target import Target
from outdraft.target.views import Reads


@dataclass
class Update:
    """The tokens decided since the drafter was last asked, for every row.

    Attributes:
        tokens: `(rows, m)` newly decided tokens, the last one the root of the next tree; right-padded.
        taps: `(rows, m, hidden)` what the drafter reads of the target at the position before each token: the target's
            hidden states, or what the runner made by `start` gives instead.
        counts: number of real tokens per row.
        lists: the real tokens of every row on the host; None where only the device has them.
    """

    tokens: Tensor
    taps: Tensor
    counts: list[int]
    lists: list[list[int]] | None = None

    @property
    def on_host(self) -> list[list[int]]:
        """The real tokens of every row; the device is asked only where the host does not have them."""
        if self.lists is None:
            self.lists = [row[:count] for row, count in zip(self.tokens.tolist(), self.counts, strict=True)]
        return self.lists

    @property
    def roots(self) -> Tensor:
        """`(rows,)` the last token of each row."""
        last = integers(self.counts, self.tokens.device) - 1
        return self.tokens.gather(1, last[:, None])[:, 0]

    @classmethod
    def join(cls, updates: Sequence[Update]) -> Update:
        """Concatenate updates of the same rows, in order of time."""
        if len(updates) == 1:
            return updates[0]
        rows = range(len(updates[0].counts))
        counts = [sum(update.counts[row] for update in updates) for row in rows]

        def joined(name: str) -> Tensor:
            whole = [
                torch.cat([getattr(update, name)[row, : update.counts[row]] for update in updates]) for row in rows
            ]
            return pad_sequence(whole, batch_first=True)

        known = [update.lists for update in updates if update.lists is not None]
        lists = [[token for one in known for token in one[row]] for row in rows] if len(known) == len(updates) else None
        return cls(joined("tokens"), joined("taps"), counts, lists)

    @classmethod
    def beside(cls, first: Update, second: Update) -> Update:
        """Append the rows of `second` to those of `first`."""

        def joined(name: str) -> Tensor:
            return pad_sequence([*getattr(first, name), *getattr(second, name)], batch_first=True)

        lists = None if first.lists is None or second.lists is None else first.lists + second.lists
        return cls(joined("tokens"), joined("taps"), first.counts + second.counts, lists)

    def select_rows(self, rows: Sequence[int]) -> Update:
        """Keep only these rows, in this order."""
        index = sent(list(rows), self.tokens.device)
        lists = None if self.lists is None else [self.lists[row] for row in rows]
        return Update(self.tokens[index], self.taps[index], [self.counts[row] for row in rows], lists)

    def newest(self) -> Update:
        """Return each row's last token alone."""
        last = integers(self.counts, self.tokens.device)[:, None] - 1
        lists = None if self.lists is None else [row[-1:] for row in self.lists]
        return Update(self.tokens.gather(1, last), chosen(self.taps, last), [1] * len(self.counts), lists)


class Budget(Protocol):
    """Decides how far each row drafts. Drafters ask before a level is drawn, and report their confidence after it."""

    going: list[bool]
    """For every row, True if it drafts the current level; before the first level, True if it drafts at all."""

    def wants(self, nodes: int) -> list[bool]:
        """Return for every row whether it drafts the next level; a row that stopped stays stopped for the round.

        Args:
            nodes: nodes per row that the level adds to verification; 0 if all levels came at once and `sizes` weighs
                the nodes of all.
        """

    def drafted(self, confidences: Sequence[float | None]) -> None:
        """Report that the rows that wanted a level have drafted it.

        Args:
            confidences: one per row: probability of the level's candidates relative to that of the level above. None
                means that the row found nothing to draft. Entries of rows that did not want the level are not read.
        """

    def sizes(self, gains: Sequence[Sequence[float]], levels: Sequence[Sequence[int]]) -> list[int]:
        """Return how many candidates of each row to verify, for deterministic candidates.

        Args:
            gains: for every row, the draft probabilities of its candidates' whole paths, largest first.
            levels: for every row, the level of each of these candidates, from 0.
        """


@dataclass
class RowContext:
    """Sampling settings and random numbers of each row, so that candidates come from a distribution like the
    target's."""

    prefixes: Sequence[Tensor]
    """`(tokens,)` everything decided so far, the root's token last."""
    warpers: Sequence[Warper]
    chances: Sequence[Chance]
    budget: Budget | None = None
    """None drafts as far as the shape allows."""

    @property
    def pace(self) -> Budget | None:
        """The budget by its old name, for one release."""
        return self.budget

    @property
    def greedy(self) -> bool:
        return all(warper.greedy for warper in self.warpers)

    def guided(self, device: torch.device) -> bool:
        """Whether drafts on this device are masked: masks are the host's, so that elsewhere they cost a transfer."""
        return device.type == "cpu" and any(warper.guides for warper in self.warpers)

    def named(self, device: torch.device) -> bool:
        """Whether warpers look up candidates on this device by their ids among all tokens."""
        return self.guided(device) or (self.coupled and any(warper.names_tokens for warper in self.warpers))

    @property
    def coupled(self) -> bool:
        """True if rows draw by noise shared with the target (`coupling.py`) rather than by dice."""
        return bool(self.chances) and not self.greedy and all(isinstance(chance, Coupled) for chance in self.chances)


class DraftState(ABC):
    """A drafter's state for the rows that it drafts for."""

    @abstractmethod
    def propose(self, update: Update, shape: TreeShape, rows: RowContext) -> Tree:
        """Take in the tokens decided since the last call, and build a tree of at most `shape` for every row."""

    @abstractmethod
    def select_rows(self, rows: Sequence[int]) -> None:
        """Keep only these rows, in this order."""

    def read(self, update: Update) -> Update:
        """Take in decided tokens without drafting, as far as the state can, and return those that are left.

        Rows read their prompts so before they join others, to which they would be padded. By default nothing is read,
        and rows draft once before they join.
        """
        return update

    def join(self, other: Any) -> None:
        """Append the rows of another state of the same drafter, between rounds.

        Only serving needs this: rows join others that are being decoded.
        """
        raise UserError(f"{type(self).__name__} takes no further rows in, which serving needs; give it a `join`")


@dataclass(frozen=True)
class Limits:
    """The abilities of a drafter; a wrapper passes them on unchanged."""

    depth: int | None = None
    """Largest number of candidates on a path; None for any number."""
    stepwise: bool = True
    """True if every level of a draft costs a step of its own."""
    probs: bool = True
    """True if the drafter has probabilities to sample candidates from."""
    looks_back: bool = False
    """True if the drafter itself drafts n-grams of the text."""


class Drafter(ABC):
    """A model or rule that proposes trees."""

    method: str
    """Name of the method on the command line and in reports."""

    reads = Reads()
    """Hidden states that the drafter reads of the target for every decided token."""

    limits = Limits()
    """The drafter's abilities."""

    first_drafts = first_right = 0
    """The number of the drafter's first drafts, and of those whose first candidate was accepted; both are counted."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        before = {"has_law": "probs", "stepwise": "stepwise", "looks_back": "looks_back"}
        if said := {new: cls.__dict__[old] for old, new in before.items() if old in cls.__dict__}:
            warnings.warn(
                f"{cls.__name__}: say {', '.join(said)} in `limits = Limits(...)`", FutureWarning, stacklevel=2
            )
            cls.limits = replace(cls.limits, **said)

    def start(self, target: Target, cache: SlotCache) -> ModelRunner:
        """Return a runner of the target for a batch of rows, which gives what the drafter reads."""
        return target.runner(cache, self.reads)

    @abstractmethod
    def begin(self, prompts: Sequence[Tensor], run: ModelRunner) -> DraftState:
        """Start a state for `(tokens,)` prompts that `run` has run; its cache says how many slots to expect."""

    def slots(self, shape: TreeShape) -> int:
        """Return the slots of the target's cache that a round takes."""
        return shape.size

    def default_shape(self, device: torch.device, sampling: bool = False) -> TreeShape:
        """Return the default tree for a device: verifying is nearly free on a GPU, draft steps are not on a CPU."""
        if device.type != "cpu":
            return GPU_CHAIN if sampling else GPU_TREE
        return CPU_CHAIN if sampling else CPU_TREE

    @property
    def num_parameters(self) -> int:
        """Number of the drafter's own parameters, without those of the target."""
        return 0
