"""Decoders and drafters that are wrong in ways that have happened, for tests that they are found out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from outdraft.core.dice import Chance, Dice
from outdraft.core.sampling import Warper
from outdraft.core.shape import TreeShape
from outdraft.core.tree import Tree
from outdraft.core.verify import Verdict, acceptance
from outdraft.drafting.base import Drafter, DraftState, RowContext, Update
from outdraft.target.cache import SlotCache
from outdraft.target.runner import ModelRunner, Output
from outdraft.target.target import Target

# --- verification ----------------------------------------------------------------------------------------------------


def no_residual(p: Tensor, q: Tensor | None, x: int, without_replacement: bool) -> tuple[Tensor, Tensor | None]:
    """A rejected candidate leaves p as it was."""
    return p, q


def untempered(temperature: float) -> Callable[[Tensor, Tensor | None, Tensor], Tensor]:
    """Candidates accepted by the law before the temperature, corrected by the one after it."""

    def wrong(p: Tensor, q: Tensor | None, x: Tensor) -> Tensor:
        raw = p**temperature
        return acceptance(raw / raw.sum(-1, keepdim=True), q, x)

    return wrong


def bonus_from_the_parent(verify: Callable[..., list[Verdict]]) -> Callable[..., list[Verdict]]:
    """Where a whole chain was accepted the token after it is read one node too early."""

    def wrong(
        tree: Tree, logits: Tensor, warpers: Sequence[Warper], prefixes: Sequence[Tensor], chances: Sequence[Chance]
    ) -> list[Verdict]:
        verdicts = verify(tree, logits, warpers, prefixes, chances)
        for row, verdict in enumerate(verdicts):
            if len(verdict.path) == tree.counts[row] > 1:
                law = warpers[row].probs_after(logits[row, verdict.path[-2]], prefixes[row])
                verdict.tokens[-1] = chances[row].draw(law)
        return verdicts

    return wrong


# --- the target's forward over trees ---------------------------------------------------------------------------------


def late_positions(self: ModelRunner, tree: Tree) -> Tensor:
    """Candidates stand one position too far on."""
    lengths = torch.tensor(self.cache.lengths, device=self.target.device)
    return (lengths[:, None] + tree.depths + (tree.depths > 0)).clamp(max=self.target.context_length - 1)


def blind_tree(self: ModelRunner, tree: Tree) -> Output:
    """Candidates do not see the root."""
    slots = self.cache.reserve(tree.nodes, self.target.device)
    seen = tree.ancestors.clone()
    seen[:, 1:, 0] = False
    return self.forward(tree.tokens, self.positions(tree), seen, slots)


def shifted_features(run_tree: Callable[[ModelRunner, Tree], Output]) -> Callable[[ModelRunner, Tree], Output]:
    """The deepest candidate's features are those of the node before it."""

    def wrong(self: ModelRunner, tree: Tree) -> Output:
        output = run_tree(self, tree)
        if tree.nodes > 1:
            features = output.features.clone()
            features[:, -1] = features[:, -2]
            return Output(features, output.taps)
        return output

    return wrong


# --- drafters --------------------------------------------------------------------------------------------------------


class Wrong(Drafter):
    """A drafter whose proposals are tampered with."""

    def __init__(self, inner: Drafter):
        self.inner, self.method, self.limits = inner, inner.method, inner.limits

    def start(self, target: Target, cache: SlotCache) -> ModelRunner:
        return self.inner.start(target, cache)

    def slots(self, shape: TreeShape) -> int:
        return self.inner.slots(shape)

    def default_shape(self, device: torch.device, sampling: bool = False) -> TreeShape:
        return self.inner.default_shape(device, sampling)

    def begin(self, prompts: Sequence[Tensor], run: ModelRunner) -> DraftState:
        state = self.inner.begin(prompts, run)
        propose = state.propose

        def tampered(update: Update, shape: TreeShape, rows: RowContext) -> Tree:
            return self.after(propose(update, shape, self.before(rows)))

        state.propose = tampered  # type: ignore[method-assign]
        return state

    def before(self, rows: RowContext) -> RowContext:
        return rows

    def after(self, tree: Tree) -> Tree:
        return tree


class Peeking(Wrong):
    """Drops the end of a drawn chain where its tokens turned out improbable."""

    def __init__(self, inner: Drafter, least: float = 0.2):
        super().__init__(inner)
        self.least = least

    def after(self, tree: Tree) -> Tree:
        if tree.draft_probs is None:  # under shared noise nothing is drawn
            return tree
        counts = list(tree.counts)
        for row, tokens in enumerate(tree.tokens.tolist()):
            while counts[row] > 1 and tree.draft_probs[row, counts[row] - 2, tokens[counts[row] - 1]] < self.least:
                counts[row] -= 1
        return Tree(tree.tokens, tree.parents, counts, tree.candidates, tree.draft_probs)


class Sharpened(Chance):
    """Draws from the law at temperature 0.7."""

    def __init__(self, inner: Chance):
        self.inner = inner

    def accept(self, probability: float) -> bool:
        return self.inner.accept(probability)

    def draw(self, law: Tensor) -> int:
        return self.inner.draw(law ** (1 / 0.7))


class Undeclared(Wrong):
    """Declares its law at the asked temperature and draws from a sharper one; with dice of its own if `hidden`."""

    def __init__(self, inner: Drafter, hidden: bool = False):
        super().__init__(inner)
        self.own = Dice(0) if hidden else None

    def before(self, rows: RowContext) -> RowContext:
        return replace(rows, chances=[Sharpened(self.own or chance) for chance in rows.chances])


class RandomPoint(Wrong):
    """Draws its candidates and declares them chosen by rule."""

    def after(self, tree: Tree) -> Tree:
        return Tree(tree.tokens, tree.parents, tree.counts)
