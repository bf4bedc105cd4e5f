"""Lookahead decoding (arXiv 2402.02057): the target drafts for itself, by Jacobi iteration beside its verification.

No model and no training. Every target forward that verifies candidates also runs a window below the same root: the
last N-1 Jacobi steps, W guesses each. Its newest guesses and the steps before them make W n-grams of N tokens, which a
pool keeps by their first token; the n-grams that begin with the row's last token are its next candidates, a tree of
point masses. The window's nodes are never candidates and never kept: verification does not see them.

    step     guesses              guess i of step j stands i + j + 1 places after the root, and sees the root, the
    oldest   o0 o1 o2 o3          oldest step up to place i, and guess i of every step up to its own:
    middle   m0 m1 m2 m3          n2 sees o0 o1 o2 m2 n2, and what the target says there is guess 2 of the next step.
    newest   n0 n1 n2 n3          Its n-gram is o2 m2 n2 and that guess (N = 4).

Guesses are the target's most probable tokens at any temperature, as in the paper; they depend on decided tokens alone.
When several tokens are accepted at once the window moves with the root as it stands, so its guesses are then some
places off, which costs a few good n-grams; the paper leaves this open. It starts with one step, tokens of the prompt in
turn where the paper draws at random. Not here: the paper's option to fill the pool from the prompt (that is
`methods/prompt_lookup/`) and its parallelism over devices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from outdraft.core.shape import TreeShape
from outdraft.core.tree import Tree
from outdraft.drafting.base import Budget, Drafter, DraftState, Limits, RowContext, Update
from outdraft.errors import UserError
from outdraft.target.cache import SlotCache
from outdraft.target.runner import ModelRunner, Output
from outdraft.target.target import Target


class Lookahead(Drafter):
    """Lookahead decoding with one window for all rows' sizes.

    Args:
        window: W, guesses of a Jacobi step.
        ngram: N, tokens of an n-gram: a candidate path has N-1.
        pool: G, n-grams kept, and verified at most, of one first token.

    Raises:
        UserError: a size that cannot be.
    """

    method = "lookahead"
    limits = Limits(probs=False, looks_back=True)

    def __init__(self, window: int = 15, ngram: int = 5, pool: int = 15):
        for name, value, least in (("window", window, 1), ("ngram", ngram, 2), ("pool", pool, 1)):
            if value < least:
                raise UserError(f"lookahead's {name} must be at least {least}, not {value}")
        self.window, self.ngram, self.pool = window, ngram, pool

    @classmethod
    def for_device(cls, device: torch.device) -> Lookahead:
        """The paper's sizes for 7B on a GPU; on a CPU, where its 121 tokens a forward cost more than they win, 25."""
        return cls() if device.type != "cpu" else cls(window=5, ngram=4, pool=3)

    def start(self, target: Target, cache: SlotCache) -> WindowRun:
        return WindowRun(target, cache)

    def begin(self, prompts: Sequence[Tensor], run: ModelRunner) -> LookaheadState:
        assert isinstance(run, WindowRun)  # `start` made it
        return LookaheadState(self, prompts, run)

    def slots(self, shape: TreeShape) -> int:
        """The tree, and the window beside it in rounds that draft."""
        return shape.size + (self.window * (self.ngram - 1) if shape.size > 1 else 0)

    def default_shape(self, device: torch.device, sampling: bool = False) -> TreeShape:
        length = self.ngram - 1
        return TreeShape(length - 1, self.pool, 1 + self.pool * length)


class WindowRun(ModelRunner):
    """The target, whose next tree may have windows beside it.

    A caller sets `windows` before a tree and finds in `said`, until it takes it, what the target says after each newest
    guess.
    """

    windows: Sequence[Sequence[Sequence[int]]] | None = None
    """For every row, its Jacobi steps, oldest first; rows may have less steps than others, or none."""
    said: list[list[int]] | None = None
    """For every row, one guess more a column; nothing of meaning where a row had no window."""

    def tree(self, tree: Tree) -> Output:
        """As `ModelRunner.tree`; the windows run in the same forward and are pending only as long as the tree is."""
        windows, self.windows = self.windows, None
        steps = max(map(len, windows)) if windows else 0
        if windows is None or steps == 0:
            return super().tree(tree)
        device, nodes = tree.tokens.device, tree.nodes
        width = max(len(step) for window in windows for step in window)
        padding = [[0] * width]
        tokens = torch.tensor([[*window, *padding * (steps - len(window))] for window in windows], device=device)
        seen, depths = window_sight(steps, width, device)
        slots = self.cache.reserve(nodes + steps * width, device)
        lengths = torch.tensor(self.cache.lengths, device=device)[:, None]
        places = (lengths + depths).clamp(max=self.target.context_length - 1)
        sight = F.pad(tree.ancestors, (0, steps * width, 0, steps * width))
        sight[:, nodes:, 0] = True  # all of the window is below the root
        sight[:, nodes:, nodes:] = seen
        out = self.forward(
            torch.cat([tree.tokens, tokens.flatten(1)], dim=1),
            torch.cat([self.positions(tree), places], dim=1),
            sight,
            slots,
        )
        newest = torch.tensor([max(0, len(window) - 1) for window in windows], device=device)
        columns = nodes + newest[:, None] * width + torch.arange(width, device=device)
        rows = torch.arange(len(windows), device=device)[:, None]
        self.said = self.target.head(out.features[rows, columns]).argmax(-1).tolist()
        return Output(out.features[:, :nodes], out.taps[:, :nodes])


def window_sight(steps: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """What the guesses of a window see of each other, and how far after the root they stand; step by step.

    Returns:
        `(steps * width, steps * width)` bool and `(steps * width,)`.
    """
    step = torch.arange(steps, device=device).repeat_interleave(width)
    column = torch.arange(width, device=device).repeat(steps)
    oldest = (step == 0) & (column <= column[:, None])
    own = (column == column[:, None]) & (step <= step[:, None])
    return oldest | own, step + column + 1


@dataclass
class _Row:
    """The window of one row, and the n-grams that it has found so far."""

    steps: list[list[int]]
    pool: dict[int, list[tuple[int, ...]]] = field(default_factory=dict)
    """Of every first token, what may follow it, oldest first."""

    def add(self, guesses: list[int], ngram: int, most: int) -> None:
        """Take in the next Jacobi step; once there are enough of them its n-grams, and the oldest step is gone."""
        self.steps.append(guesses)
        if len(self.steps) < ngram:
            return
        for first, *rest in zip(*self.steps, strict=True):
            kept, found = self.pool.setdefault(first, []), tuple(rest)
            if found in kept:
                kept.remove(found)
            kept.append(found)
            del kept[:-most]
        del self.steps[0]

    def candidates(self, token: int, shape: TreeShape) -> list[tuple[int, ...]]:
        """Paths after the token, newest first, as many and as long as the tree may have."""
        newest = self.pool.get(token, [])[: -shape.top_k - 1 : -1]
        return [path[: shape.depth + 1] for path in newest]


class LookaheadState(DraftState):
    """Windows and pools of the rows."""

    def __init__(self, drafter: Lookahead, prompts: Sequence[Tensor], run: WindowRun):
        self.drafter, self.run = drafter, run
        self.rows = [_Row([cycled(prompt.tolist(), drafter.window)]) for prompt in prompts]
        self.waiting: list[bool] = []  # rows whose window ran with the last tree

    def propose(self, update: Update, shape: TreeShape, rows: RowContext) -> Tree:
        self._take_in()
        budget = rows.budget
        self.waiting = list(budget.going) if budget is not None else [True] * len(self.rows)
        roots = update.roots
        paths = [row.candidates(root, shape) for row, root in zip(self.rows, roots.tolist(), strict=True)]
        if budget is not None:
            paths = paced(paths, min(shape.top_k, self.drafter.pool), budget)
        self.run.windows = [row.steps if runs else [] for row, runs in zip(self.rows, self.waiting, strict=True)]
        return merged(roots, paths, shape.size)

    def select_rows(self, rows: Sequence[int]) -> None:
        self._take_in()
        self.rows = [self.rows[row] for row in rows]

    def join(self, other: LookaheadState) -> None:
        self._take_in()
        other._take_in()
        self.rows += other.rows

    def _take_in(self) -> None:
        """What the target said at the ends of the windows that ran."""
        said, self.run.said = self.run.said, None
        if said is not None:
            for row, guesses, ran in zip(self.rows, said, self.waiting, strict=True):
                if ran:
                    row.add(guesses, self.drafter.ngram, self.drafter.pool)


def cycled(prompt: list[int], count: int) -> list[int]:
    """So many tokens of the prompt in turn, from its first one on."""
    return [prompt[place % len(prompt)] for place in range(count)]


def paced(paths: list[list[tuple[int, ...]]], width: int, budget: Budget) -> list[list[tuple[int, ...]]]:
    """What the pace wants of paths that are there already; the more n-grams a row has, the surer is one of them.

    `width` is what a level may have, whatever other rows of the batch find.
    """
    sure = [len(row) / (len(row) + 1) for row in paths]
    lengths, wanted, level = [0] * len(paths), budget.going, 0
    while any(wanted):
        level += 1
        there = [going and any(len(path) >= level for path in row) for going, row in zip(wanted, paths, strict=True)]
        lengths = [level if grown else length for length, grown in zip(lengths, there, strict=True)]
        budget.drafted([one if grown else None for one, grown in zip(sure, there, strict=True)])
        if not any(there):
            break
        wanted = budget.wants(width)
    return [[path[:length] for path in row] for row, length in zip(paths, lengths, strict=True)]


def merged(roots: Tensor, paths: Sequence[Sequence[Sequence[int]]], size: int) -> Tree:
    """Trees of at most `size` nodes whose paths share what they begin with; earlier paths come first."""
    rows: list[tuple[list[int], list[int]]] = []
    for root, own in zip(roots.tolist(), paths, strict=True):
        tokens, parents, known = [root], [-1], dict[tuple[int, int], int]()
        for path in own:
            node = 0
            for token in path:
                if (node, token) not in known:
                    if len(tokens) == size:
                        break
                    known[node, token] = len(tokens)
                    tokens.append(token)
                    parents.append(node)
                node = known[node, token]
        rows.append((tokens, parents))
    nodes = max(len(tokens) for tokens, _ in rows)
    padded = [
        (tokens + [0] * (nodes - len(tokens)), parents + [0] * (nodes - len(parents))) for tokens, parents in rows
    ]
    both = torch.tensor(padded, device=roots.device)
    return Tree(both[:, 0], both[:, 1], [len(tokens) for tokens, _ in rows])
