"""The lossless rule: given a tree of candidates and the target's logits, which tokens are kept.

For every row, start at the root, with p the target's distribution of the next token there. Try the node's children x_1,
x_2, ... in order. q is the distribution that the child was drawn from (a point mass for deterministic candidates):

    accept x with probability min(1, p(x) / q(x));
    if rejected, what is left of p:  p <- (p - q)+ / |(p - q)+|       the residual,
    and, for candidates without replacement, of q:  q(x) <- 0, renormalised.

If x is accepted, go down to x and repeat. If no child is accepted, the next token is drawn from what is left of p. By
induction over the children the token after the node has exactly the target's distribution, whatever q is:

    P(x) = q(x) min(1, p(x)/q(x)) + P(reject) residual(x) = p(x)

(Leviathan et al. 2023, theorem 1, applied once a child; SpecInfer's multi-round rule). For a point mass on x this
reads: accept with probability p(x), else p(x) <- 0. Greedy decoding is the same rule with p a point mass: accept x if
it is the target's most probable token. No decision is random then, so `verify_greedy` compares all nodes of all rows at
once; a test compares it with `decide`.

With a temperature, `verify_coupled` is the default in place of the rule: drafter and target share noise, and a
candidate is accepted if it is the token that the noise makes of p (`coupling.py`). All randomness, dice or noise, comes
from the `Chance` objects that callers pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import compress

import torch
from torch import Tensor

from outdraft.core.coupling import Coupled, noise_of, under
from outdraft.core.dice import Chance, draw_each
from outdraft.core.sampling import UNREAD, Warper, alike, probs_of
from outdraft.core.tensors import read_freely, sent
from outdraft.core.tree import Candidates, Tree

AT_ONCE = 2**25
"""Largest number of probabilities, over all nodes and rows, for which the distributions of chains are made at once."""


@dataclass
class Verdict:
    """The part of its tree that one row keeps.

    Attributes:
        path: node indices from the root to the last accepted node, the root included.
        tokens: decided tokens: those of the accepted nodes and the bonus token after them.
    """

    path: list[int]
    tokens: list[int]


def verify(
    tree: Tree, logits: Tensor, warpers: Sequence[Warper], prefixes: Sequence[Tensor], chances: Sequence[Chance]
) -> list[Verdict]:
    """Accept a path of every row's tree and draw the token after it, with exactly the target's distribution.

    Args:
        logits: `(rows, nodes, vocab)` logits of the target after every node; those of padding are not read.
        warpers: one per row: logits and prefix to distribution.
        prefixes: one per row: `(tokens,)` everything decided so far, the root's token last; read only where a warper
            needs it.
        chances: one source of random numbers per row.
    """
    if tree.draft_probs is None and warpers[0].greedy and alike(warpers):
        return verify_greedy(tree, warpers[0].choices(logits))
    coupled = [chance for chance in chances if isinstance(chance, Coupled)]
    if len(coupled) == len(chances):
        return verify_coupled(tree, logits, warpers, prefixes, coupled)
    if _at_once(logits, warpers) and tree.candidates != "spine" and _is_chains(tree):
        return verify_chains(tree, warpers[0].probs(logits), chances)
    return verify_sampled(tree, logits, warpers, prefixes, chances)


Choose = Callable[[list[int], list[int], int, Tensor], list[tuple[int | None, int]]]
"""Maps (rows, the current node of each, its depth, `(rows, vocab)` probabilities after it) to pairs, one per row: the
accepted child (None if none), and the token after the node."""


def walk(
    tree: Tree, logits: Tensor, warpers: Sequence[Warper], prefixes: Sequence[Tensor], choose: Choose
) -> list[Verdict]:
    """Go down the trees of all rows together, so that the target's probabilities are computed together."""
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
    """Run `verify` by the rule, node by node."""
    tokens, children = tree.lists[0], [tree.children(row) for row in range(tree.rows)]

    def choose(rows: list[int], nodes: list[int], depth: int, probs: Tensor) -> list[tuple[int | None, int]]:
        chosen: list[tuple[int | None, int]] = [(None, 0)] * len(rows)
        ended, left = [], []
        for i, (row, node, p) in enumerate(zip(rows, nodes, probs, strict=True)):
            guesses = children[row].get(node, [])
            q = tree.draft_probs[row, node].to(p.dtype) if tree.draft_probs is not None else None
            if tree.candidates == "spine" and q is not None and not q.any():
                q = None
            place, p = decide(p, q, [tokens[row][child] for child in guesses], tree.candidates, chances[row])
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
    p: Tensor, q: Tensor | None, guesses: Sequence[int], candidates: Candidates, chance: Chance
) -> tuple[int | None, Tensor]:
    """Decide the token after one node: one of the guesses, or a draw from what is left of the target's distribution.

    Args:
        p: `(vocab,)` the target's distribution after the node.
        q: `(vocab,)` the distribution that the guesses were drawn from; None if they were chosen deterministically.
        guesses: tokens of the node's children, in order.
        candidates: how the guesses were chosen; of a spine's only the first was drawn.
        chance: the row's source of random numbers.

    Returns:
        The index of the accepted guess (None if none was), and what is left of p.
    """
    for place, x in enumerate(guesses):
        if chance.accept(acceptance(p, q, torch.tensor(x, device=p.device)).item()):
            return place, p
        p, q = residual(p, q, x, candidates == "without_replacement")
        if candidates == "spine":
            q = None
    return None, p


def verify_coupled(
    tree: Tree, logits: Tensor, warpers: Sequence[Warper], prefixes: Sequence[Tensor], chances: Sequence[Coupled]
) -> list[Verdict]:
    """Run `verify` for coupled rows (`coupling.py`): a candidate is accepted if noise chooses it of p."""
    if not read_freely(logits.device) and _at_once(logits, warpers):
        levels = tree.nodes if tree.levels is None else tree.levels + 1
        noise, index = noise_of(chances, levels), tree.depths[..., None].expand(-1, -1, logits.shape[-1])
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
    """Run `verify` for deterministic candidates; p is the point mass on the `(rows, nodes)` choices after nodes."""
    said = choices.gather(1, tree.parents.clamp(min=0))  # the choice after each node's parent
    # The one transfer; with it the tree is on the host, too.
    right, chosen, tokens, parents = torch.stack([tree.tokens == said, choices, tree.tokens, tree.parents]).tolist()
    tree.lists = (tokens, parents)
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
    """Run `verify` for trees of single chains, from the target's `(rows, nodes, vocab)` distributions after all nodes.

    The rule is computed at all nodes at once; only the random decisions are made one by one.
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


def _at_once(logits: Tensor, warpers: Sequence[Warper]) -> bool:
    """Return True if the distributions after all nodes may be made at once, also those that nobody will need."""
    return not warpers[0].sorts and logits.numel() <= AT_ONCE and alike(warpers)


def _is_chains(tree: Tree) -> bool:
    """Return True if every node is the child of the one before it."""
    if tree.chain:  # the host need not look
        return True
    parents = tree.lists[1]
    return all(parents[row][:count] == list(range(-1, count - 1)) for row, count in enumerate(tree.counts))


def acceptance(p: Tensor, q: Tensor | None, x: Tensor) -> Tensor:
    """Return `(...)` min(1, p(x) / q(x)) of `(..., vocab)` distributions at `(...)` tokens; q None: point mass on x."""
    odds = p.gather(-1, x[..., None])[..., 0]
    if q is not None:
        odds = odds / q.gather(-1, x[..., None])[..., 0]
    return odds.clamp(max=1.0)


def residual(p: Tensor, q: Tensor | None, x: int, without_replacement: bool) -> tuple[Tensor, Tensor | None]:
    """Return both distributions `(vocab,)`, normalised, after candidate x was rejected."""
    if q is None:
        return normalised(without(p, x), p), None
    rest = normalised((p - q).clamp_(min=0), p)
    return rest, normalised(without(q, x), q) if without_replacement else q


def without(dist: Tensor, x: int) -> Tensor:
    """Return a copy of the distribution with 0 at x."""
    rest = dist.clone()
    rest[x] = 0.0
    return rest


def normalised(weights: Tensor, otherwise: Tensor) -> Tensor:
    """Return `weights` scaled to sum to one, or `otherwise` if nothing is left, which only rounding can cause."""
    total = weights.sum()
    return torch.where(total > 0, weights / total, otherwise)


def _after(warper: Warper, prefixes: Sequence[Tensor], row: int, tokens: list[int]) -> Tensor:
    """Return the prefix of a node if the warper reads it, else an empty tensor."""
    if not warper.reads_prefix:
        return UNREAD
    prefix = prefixes[row]
    return torch.cat([prefix, prefix.new_tensor(tokens)])
