"""A wrapper that records a drafter's random draws, its proposals, and the target's features of them.

The wrapper changes nothing, but for two options of the audit: another random generator for drafting, and one prefill
    for rows that share their prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from outdraft.core.dice import Chance
from outdraft.core.shape import TreeShape
from outdraft.core.tree import Tree
from outdraft.drafting.base import Drafter, DraftState, RowContext, Update
from outdraft.target.cache import SlotCache
from outdraft.target.runner import ModelRunner, Output
from outdraft.target.target import Target


@dataclass
class Drawn:
    """One draw: the probabilities that were sampled from, and the drawn token."""

    dist: Tensor
    token: int


class Recorder:
    """A `Chance` that records every draw of one proposal."""

    def __init__(self, inner: Chance):
        self.inner = inner
        self.draws: list[Drawn] = []

    def accept(self, probability: float) -> bool:
        return self.inner.accept(probability)

    def draw(self, dist: Tensor) -> int:
        handed = dist.clone()  # drafters go on working in theirs
        token = self.inner.draw(dist)
        self.draws.append(Drawn(handed, token))
        return token


@dataclass
class Round:
    """One proposal for a batch of rows.

    Attributes:
        tree: the proposed tree.
        prefixes: each row's decided tokens before the round.
        prompt_lengths: each row's number of prompt tokens.
        draws: each row's draws, in order; empty unless the chances are recorded.
        features: `(rows, nodes, hidden)` target features of the tree.
    """

    tree: Tree
    prefixes: list[Tensor]
    prompt_lengths: list[int]
    draws: list[list[Drawn]]
    features: Tensor = field(default_factory=lambda: torch.empty(0))


class Watch(Drafter):
    """A drafter whose rounds are reported to listeners.

    Args:
        listeners: called for every round that drafted, once the target has run over its tree.
        chance: makes a row's generator for drafting from the one that verification uses.
        prefill_once: run a prompt that all rows share as one row; the drafter still takes in every row.
    """

    def __init__(
        self,
        inner: Drafter,
        listeners: Sequence[Callable[[Round], None]] = (),
        chance: Callable[[Chance], Chance] | None = None,
        prefill_once: bool = False,
    ):
        self.inner, self.listeners, self.chance, self.prefill_once = inner, listeners, chance, prefill_once
        self.newest: Round | None = None

    def __getattribute__(self, name: str) -> Any:
        """Return the drafter's attribute unless the watch defines it: limits and defaults pass whole, so that the
        drafter is asked for the same trees as without a watch."""
        if name.startswith("__") or name in Watch.__dict__ or name in object.__getattribute__(self, "__dict__"):
            return object.__getattribute__(self, name)
        return getattr(self.inner, name)

    def start(self, target: Target, cache: SlotCache) -> ModelRunner:
        self.newest = None
        return _WatchedRun(self.inner.start(target, cache), self)

    def begin(self, prompts: Sequence[Tensor], run: ModelRunner) -> DraftState:
        assert isinstance(run, _WatchedRun)
        return _WatchedState(self.inner.begin(prompts, run.inner), self, [len(prompt) for prompt in prompts])


class _WatchedRun(ModelRunner):
    def __init__(self, inner: ModelRunner, watch: Watch):
        super().__init__(inner.target, inner.cache)
        self.inner, self.watch = inner, watch

    def prefill(self, prompts: Sequence[Tensor]) -> Output:
        rows = len(prompts)
        alike = all(torch.equal(prompt, prompts[0]) for prompt in prompts)
        if not (self.watch.prefill_once and alike and rows > 1):
            return self.inner.prefill(prompts)
        self.cache.select_rows([0])
        output = self.inner.prefill(prompts[:1])
        self.cache.select_rows([0] * rows)
        return Output(*(part.expand(rows, -1, -1) for part in output))

    def tree(self, tree: Tree) -> Output:
        output = self.inner.tree(tree)
        newest = self.watch.newest
        if newest is not None and newest.tree is tree:
            newest.features = output.features
            for listener in self.watch.listeners:
                listener(newest)
        return output


class _WatchedState(DraftState):
    def __init__(self, inner: DraftState, watch: Watch, prompt_lengths: list[int]):
        self.inner, self.watch, self.prompt_lengths = inner, watch, prompt_lengths

    def propose(self, update: Update, shape: TreeShape, rows: RowContext) -> Tree:
        if self.watch.chance is not None and not rows.coupled:
            rows = replace(rows, chances=[self.watch.chance(chance) for chance in rows.chances])
        tree = self.inner.propose(update, shape, rows)
        draws = [chance.draws if isinstance(chance, Recorder) else [] for chance in rows.chances]
        prefixes = [prefix.clone() for prefix in rows.prefixes]
        self.watch.newest = Round(tree, prefixes, list(self.prompt_lengths), draws)
        return tree

    def select_rows(self, rows: Sequence[int]) -> None:
        self.inner.select_rows(rows)
        self.prompt_lengths = [self.prompt_lengths[row] for row in rows]
