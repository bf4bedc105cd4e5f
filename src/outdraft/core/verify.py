"""The lossless rule: a tree of guesses, the target's logits, and what may be kept.

For every row: stand at the root, with p the target's distribution of the next token there. Try the node's children
x_1, x_2, ... in order, where q is the distribution that the child was drawn from (a point mass for deterministic
candidates):

    accept x with probability min(1, p(x) / q(x));
    if rejected, what is left of p:  p <- (p - q)+ / |(p - q)+|       the residual,
    and, for candidates without replacement, of q:  q(x) <- 0, renormalised.

Accepted: step down to x and go on. None accepted: the next token is drawn from what is left of p. By induction over
the children the token after the node has exactly the target's distribution, whatever q is:

    P(x) = q(x) min(1, p(x)/q(x)) + P(reject) residual(x) = p(x)

(Leviathan et al. 2023, theorem 1, applied once a child; SpecInfer's multi-round rule). For a point mass on x this
reads: accept with probability p(x), else p(x) <- 0. Greedy decoding is the same rule, with p a point mass: accept x
where it is the target's most probable token. Nothing is left to chance then, so `verify_greedy` compares all nodes of
all rows at once; a test holds it against `decide`.

Knows nothing of models, caches or how the guesses were made. No randomness but the dice that it is handed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import compress

import torch
from torch import Tensor

from outdraft.core.coupling import Coupled, under
from outdraft.core.dice import Chance, draw_each
from outdraft.core.sampling import Warper, probs_of
from outdraft.core.tensors import sent
from outdraft.core.tree import Tree

AT_ONCE = 2**25
"""Probabilities, of all nodes of all rows, up to which the distributions of chains are made at once."""


WALKING = ("cpu",)
"""Devices on which distributions are made level by level, of the nodes that are reached only: asking costs nothing
there."""


@dataclass
class Verdict:
    """What one row keeps of its tree.

    Attributes:
        path: node indices from the root to the last accepted node, the root included.
        tokens: tokens decided: those of the accepted nodes and the bonus token after them.
    """

    path: list[int]
    tokens: list[int]


def verify(
    tree: Tree, logits: Tensor, warpers: Sequence[Warper], prefixes: Sequence[Tensor], chances: Sequence[Chance]
) -> list[Verdict]:
    """Accept a path of every row's tree and draw the token after it, with exactly the target's distribution.

    Args:
        tree: the guesses.
        logits: `(rows, nodes, vocab)` of the target after every node; those after padding are not looked at.
        warpers: for every row, logits and prefix to distribution.
        prefixes: for every row, `(tokens,)` everything decided so far, the root's token last; only looked at where
            a warper reads them.
        chances: for every row, its dice.
    """
    kind = warpers[0].kind
    if tree.draft_probs is None and warpers[0].greedy and kind and all(warper.kind == kind for warper in warpers):
        return verify_greedy(tree, warpers[0].choices(logits))
    coupled = [chance for chance in chances if isinstance(chance, Coupled)]
    if len(coupled) == len(chances):
        return verify_coupled(tree, logits, warpers, prefixes, coupled)
    alike = kind and not warpers[0].sorts and all(warper.kind == kind for warper in warpers)
    if alike and logits.numel() <= AT_ONCE and _is_chains(tree):
        return verify_chains(tree, warpers[0].probs(logits), chances)
    return verify_sampled(tree, logits, warpers, prefixes, chances)


Choose = Callable[[list[int], list[int], int, Tensor], list[tuple[int | None, int]]]
"""(rows, the node at which each stands, its depth, `(rows, vocab)` probabilities after it) -> of every row the child
that is accepted, None for none, and the token after the node."""


def walk(
    tree: Tree, logits: Tensor, warpers: Sequence[Warper], prefixes: Sequence[Tensor], choose: Choose
) -> list[Verdict]:
    """Step down the trees of all rows together, so that the target's probabilities are made together."""
    verdicts = [Verdict([0], []) for _ in range(tree.rows)]
    walking, depth = list(range(tree.rows)), 0
    while walking:
        nodes = [verdicts[row].path[-1] for row in walking]
        own = [_after(warpers[row], prefixes, row, verdicts[row].tokens) for row in walking]
        probs = probs_of([warpers[row] for row in walking], logits[walking, nodes], own)
        accepted = []
        for row, (child, token) in zip(walking, choose(walking, nodes, depth, probs), strict=True):
            verdicts[row].tokens.append(token)
            if child is not None:
                verdicts[row].path.append(child)
                accepted.append(row)
        walking, depth = accepted, depth + 1
    return verdicts


def verify_sampled(
    tree: Tree, logits: Tensor, warpers: Sequence[Warper], prefixes: Sequence[Tensor], chances: Sequence[Chance]
) -> list[Verdict]:
    """`verify` by the rule, node by node."""
    tokens, children = tree.lists[0], [tree.children(row) for row in range(tree.rows)]

    def choose(rows: list[int], nodes: list[int], depth: int, probs: Tensor) -> list[tuple[int | None, int]]:
        chosen: list[tuple[int | None, int]] = [(None, 0)] * len(rows)
        ended, left = [], []
        for i, (row, node, p) in enumerate(zip(rows, nodes, probs, strict=True)):
            guesses = children[row].get(node, [])
            q = tree.draft_probs[row, node].to(p.dtype) if tree.draft_probs is not None else None
            without_replacement = tree.candidates == "without_replacement"
            place, p = decide(p, q, [tokens[row][child] for child in guesses], without_replacement, chances[row])
            if place is None:
                ended.append(i)
                left.append(p)
            else:
                chosen[i] = guesses[place], tokens[row][guesses[place]]
        if ended:
            drawn = draw_each([chances[rows[i]] for i in ended], torch.stack(left)).tolist()
            for i, token in zip(ended, drawn, strict=True):
                chosen[i] = None, token
        return chosen

    return walk(tree, logits, warpers, prefixes, choose)


def decide(
    p: Tensor, q: Tensor | None, guesses: Sequence[int], without_replacement: bool, chance: Chance
) -> tuple[int | None, Tensor]:
    """The token after one node: one of the guesses, or else to be drawn from what is left of the target's distribution.

    Args:
        p: `(vocab,)` the target's distribution after the node.
        q: `(vocab,)` the distribution that the guesses were drawn from, None where they were chosen by rule.
        guesses: tokens of the node's children, in their order.
        without_replacement: whether no guess could be drawn twice.
        chance: of the row.

    Returns:
        Which of the guesses was accepted, None if none was; and what is left of p.
    """
    for place, x in enumerate(guesses):
        if chance.accept(acceptance(p, q, torch.tensor(x, device=p.device)).item()):
            return place, p
        p, q = residual(p, q, x, without_replacement)
    return None, p


def verify_coupled(
    tree: Tree, logits: Tensor, warpers: Sequence[Warper], prefixes: Sequence[Tensor], chances: Sequence[Coupled]
) -> list[Verdict]:
    """`verify` where noise decides (`coupling.py`): a candidate is accepted where it is what the noise makes of p."""
    kind = warpers[0].kind
    alike = kind and not warpers[0].sorts and all(warper.kind == kind for warper in warpers)
    if alike and logits.numel() <= AT_ONCE and logits.device.type not in WALKING:
        levels = tree.nodes if tree.levels is None else tree.levels + 1
        noise = torch.stack([torch.stack([chance.at(depth) for depth in range(levels)]) for chance in chances])
        index = tree.depths[..., None].expand(-1, -1, logits.shape[-1])
        return verify_greedy(tree, under(warpers[0].probs(logits), noise.gather(1, index)))
    tokens, children = tree.lists[0], [tree.children(row) for row in range(tree.rows)]

    def choose(rows: list[int], nodes: list[int], depth: int, probs: Tensor) -> list[tuple[int | None, int]]:
        chosen = under(probs, torch.stack([chances[row].at(depth) for row in rows])).tolist()
        below = (children[row].get(node, []) for row, node in zip(rows, nodes, strict=True))
        return [
            (next((child for child in own if tokens[row][child] == token), None), token)
            for row, own, token in zip(rows, below, chosen, strict=True)
        ]

    return walk(tree, logits, warpers, prefixes, choose)


def verify_greedy(tree: Tree, choices: Tensor) -> list[Verdict]:
    """`verify` of candidates chosen by rule where p is the point mass on `(rows, nodes)` choices after every node."""
    said = choices.gather(1, tree.parents.clamp(min=0))  # the choice after each node's parent
    # The one transfer; with it the tree is on the host, too.
    right, chosen, tokens, parents = torch.stack([tree.tokens == said, choices, tree.tokens, tree.parents]).tolist()
    tree._lists = (tokens, parents)
    verdicts = []
    for row, count in enumerate(tree.counts):
        path = [0]
        # Parents come before children, and of equal siblings the first is the one that is tried.
        for node in compress(range(1, count), right[row][1:count]):
            if parents[row][node] == path[-1]:
                path.append(node)
        verdicts.append(Verdict(path, [chosen[row][node] for node in path]))
    return verdicts


def verify_chains(tree: Tree, probs: Tensor, chances: Sequence[Chance]) -> list[Verdict]:
    """`verify` where every node has at most one child, from the target's `(rows, nodes, vocab)` distributions after all
    nodes.

    The rule at all nodes at once: nothing but the dice has to be asked one after the other.
    """
    rows = tree.rows
    q = None if tree.draft_probs is None else tree.draft_probs[:, :-1].to(probs.dtype)
    odds = acceptance(probs[:, :-1], q, tree.tokens[:, 1:]).tolist()
    ends = []
    for row, count in enumerate(tree.counts):
        accepted = 0
        while accepted < count - 1 and chances[row].accept(odds[row][accepted]):
            accepted += 1
        ends.append(accepted)
    at = torch.arange(rows, device=probs.device), sent(ends, probs.device)
    left = probs[at]
    refused = [row for row, (end, count) in enumerate(zip(ends, tree.counts, strict=True)) if end < count - 1]
    for row in refused:
        drawn_from = None if q is None else q[row, ends[row]]
        left[row], _ = residual(left[row], drawn_from, tree.lists[0][row][ends[row] + 1], False)
    drawn = draw_each(chances, left).tolist()
    return [
        Verdict(list(range(end + 1)), [*tree.lists[0][row][1 : end + 1], drawn[row]]) for row, end in enumerate(ends)
    ]


def _is_chains(tree: Tree) -> bool:
    """Whether every node is the child of the one before it."""
    if tree.chain:  # the host need not look
        return True
    parents = tree.lists[1]
    return all(parents[row][:count] == list(range(-1, count - 1)) for row, count in enumerate(tree.counts))


def acceptance(p: Tensor, q: Tensor | None, x: Tensor) -> Tensor:
    """`(...)` min(1, p(x) / q(x)) of `(..., vocab)` distributions and `(...)` tokens; q None is the point mass on x."""
    odds = p.gather(-1, x[..., None])[..., 0]
    if q is not None:
        odds = odds / q.gather(-1, x[..., None])[..., 0]
    return odds.clamp(max=1.0)


def residual(p: Tensor, q: Tensor | None, x: int, without_replacement: bool) -> tuple[Tensor, Tensor | None]:
    """Both distributions `(vocab,)`, normalised, after the candidate x was rejected."""
    if q is None:
        return normalised(without(p, x), p), None
    rest = normalised((p - q).clamp_(min=0), p)
    return rest, normalised(without(q, x), q) if without_replacement else q


def without(dist: Tensor, x: int) -> Tensor:
    """The distribution with nothing at x."""
    rest = dist.clone()
    rest[x] = 0.0
    return rest


def normalised(weights: Tensor, otherwise: Tensor) -> Tensor:
    """`weights` summing to one; `otherwise` where nothing is left, which only rounding can bring about."""
    total = weights.sum()
    return torch.where(total > 0, weights / total, otherwise)


def _after(warper: Warper, prefixes: Sequence[Tensor], row: int, tokens: list[int]) -> Tensor:
    """Everything before a node, for a warper that reads it."""
    if not warper.reads_prefix:
        return _UNREAD
    prefix = prefixes[row]
    return torch.cat([prefix, prefix.new_tensor(tokens)])


_UNREAD = torch.empty(0, dtype=torch.long)
