"""A drafter whose rounds are recorded, and the target's forward over their trees, node by node.

The wrapper changes nothing, but for two options of the audit: another random generator for drafting, and one prefill
for rows that share their prompt.

Texts show only errors that change a token. The check of trees compares the whole output distribution after every node
with one-token forwards of the stock model on the same path, so that a position off by one, a wrong mask or a wrong
cache slot shows where it happens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from outdraft.core.dice import Chance
from outdraft.core.shape import TreeShape
from outdraft.core.tree import Tree
from outdraft.drafting.base import Drafter, DraftState, RowContext, Update
from outdraft.evaluation.audit.findings import Finding
from outdraft.evaluation.audit.progress import Stage
from outdraft.evaluation.audit.stock import Noise, StockProbs, total_variation
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


LARGEST, MEAN = 3.0, 3.0
"""The largest ratios of the trees' differences from one-token forwards to those of the stock model's many-token
forwards, whose kernels differ. A wrong position or mask is off by orders of magnitude in single precision, by ten times
and more in bfloat16."""

FLOOR = 1e-6
"""The total variation of float32 probabilities from summation alone."""


@dataclass
class SeenTree:
    """One row's tree with the target's features of it.

    Attributes:
        prompt, text: token ids before the root and up to it.
        paths: for every node, the tokens from below the root to it.
        features: `(nodes, hidden)` target features.
    """

    prompt: list[int]
    text: list[int]
    paths: list[list[int]]
    features: Tensor


class Trees:
    """A random sample of all observed trees (reservoir sampling)."""

    def __init__(self, most: int, context_length: int, seed: int):
        self.most, self.context_length, self.passed = most, context_length, 0
        self.kept: list[SeenTree] = []
        self._generator = torch.Generator().manual_seed(seed)

    def state(self) -> dict[str, Any]:
        kept = [{**vars(tree), "features": tree.features.cpu()} for tree in self.kept]
        return {"passed": self.passed, "kept": kept, "generator": self._generator.get_state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.passed, self.kept = state["passed"], [SeenTree(**tree) for tree in state["kept"]]
        self._generator.set_state(state["generator"])

    def __call__(self, seen: Round) -> None:
        for row in range(seen.tree.rows):
            depth = int(seen.tree.depths[row, : seen.tree.counts[row]].max())
            if depth == 0 or len(seen.prefixes[row]) + depth >= self.context_length:
                continue
            self.passed += 1
            if len(self.kept) < self.most:
                self.kept.append(seen_tree(seen, row))
            elif (place := int(torch.randint(self.passed, (), generator=self._generator))) < self.most:
                self.kept[place] = seen_tree(seen, row)


def seen_tree(seen: Round, row: int) -> SeenTree:
    count = seen.tree.counts[row]
    tokens, parents = seen.tree.tokens[row].tolist(), seen.tree.parents[row].tolist()
    paths: list[list[int]] = [[]]
    for node in range(1, count):
        paths.append([*paths[parents[node]], tokens[node]])
    prefix, length = seen.prefixes[row].tolist(), seen.prompt_lengths[row]
    return SeenTree(prefix[:length], prefix[length:], paths, seen.features[row, :count].clone())


@torch.inference_mode()
def node_variations(probs: StockProbs, tree: SeenTree) -> list[float]:
    """Return, for every node, the total variation between the tree forward's distribution and one-token forwards'."""
    leaves = [path for path in tree.paths if not any(other[: len(path)] == path != other for other in tree.paths)]
    texts = [[*tree.text, *path] for path in leaves]
    prefix = torch.tensor([*tree.prompt, *tree.text], device=probs.target.device)
    warper = probs.warper(tree.prompt)
    found: dict[tuple[int, ...], Tensor] = {}
    # One token more than the longest, so that every node has a next one.
    for place, step in enumerate(probs.along(tree.prompt, [[*text, 0] for text in texts])):
        depth = place - len(tree.text)
        if depth >= 0:
            for leaf, dist in zip(leaves, step, strict=True):
                if dist is not None:
                    found.setdefault(tuple(leaf[:depth]), dist)
    logits = probs.target.head(tree.features.to(probs.target.device))  # read back, they lie on the CPU
    return [
        total_variation(found[tuple(path)], warper.probs_after(row, torch.cat([prefix, prefix.new_tensor(path)])))
        for path, row in zip(tree.paths, logits, strict=True)
    ]


def forwards_finding(probs: StockProbs, trees: Trees, noise: Noise, stage: Stage) -> Finding:
    variations: list[float] = []
    worst = (0.0, "")
    for number, tree in enumerate(trees.kept):
        own = stage.part(number, partial(node_variations, probs, tree), 1)
        place = max(range(len(own)), key=own.__getitem__)
        if own[place] >= worst[0]:
            where = f"after {len(tree.text)} new tokens and the candidates {tree.paths[place]}"
            worst = (own[place], where)
        variations += own
    largest, mean = LARGEST * noise.variation + FLOOR, MEAN * noise.variation_mean + FLOOR
    found_mean = sum(variations) / max(1, len(variations))
    passed = worst[0] <= largest and found_mean <= mean
    return Finding(
        "forwards",
        "Does the target give a candidate tree the distributions that it gives one token at a time?",
        passed,
        f"{len(variations)} nodes of {len(trees.kept)} trees: the output distributions differ by a total variation of "
        f"{found_mean:.2g} on average and {worst[0]:.2g} at most; the stock model's own many-token forwards by "
        f"{noise.variation_mean:.2g} and {noise.variation:.2g}.",
        figures={
            "trees": len(trees.kept),
            "nodes": len(variations),
            "variation_mean": found_mean,
            "variation_max": worst[0],
            "allowed_mean": mean,
            "allowed_max": largest,
        },
        lines=[] if passed else [f"largest {worst[1]}"],
    )
