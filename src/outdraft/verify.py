"""The lossless rule: a tree of guesses, the target's logits, and what may be kept.

For every row: stand at the root, with p the target's law of the next token there. Try the node's children x_1, x_2, ...
in order, where q is the law that the child was drawn from (a point mass for deterministic candidates):

    accept x with probability min(1, p(x) / q(x));
    if rejected, what is left of p:  p <- (p - q)+ / |(p - q)+|       the residual,
    and, for candidates without replacement, of q:  q(x) <- 0, renormalised.

Accepted: step down to x and go on. None accepted: the next token is drawn from what is left of p. By induction over
the children the token after the node has exactly the target's law, whatever q is: P(x) = q(x) min(1, p(x)/q(x)) +
P(reject) residual(x) = p(x) (Leviathan et al. 2023, theorem 1, applied once a child; SpecInfer's multi-round rule).
For a point mass on x this reads: accept with probability p(x), else p(x) <- 0.
Greedy decoding is the same rule, with p a point mass.

Knows nothing of models, caches or how the guesses were made. No randomness but the dice that it is handed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from outdraft.sampling import Chance, Warper
from outdraft.tree import Tree


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
    """Accept a path of every row's tree and draw the token after it, with exactly the target's law.

    Args:
        tree: the guesses.
        logits: `(rows, nodes, vocab)` of the target after every node.
        warpers: for every row, logits and prefix to law.
        prefixes: for every row, `(tokens,)` everything decided so far, the root's token last.
        chances: for every row, its dice.
    """
    return [verify_row(tree, row, logits[row], warpers[row], prefixes[row], chances[row]) for row in range(tree.rows)]


def verify_row(tree: Tree, row: int, logits: Tensor, warper: Warper, prefix: Tensor, chance: Chance) -> Verdict:
    """`verify` for one row; `logits` is `(nodes, vocab)`."""
    children, tokens = tree.children(row), tree.tokens[row].tolist()
    verdict = Verdict([0], [])
    while True:
        node = verdict.path[-1]
        p = warper.law(logits[node], prefix)
        q = tree.laws[row, node].to(p.dtype) if tree.laws is not None else None
        for child in children.get(node, []):
            x = tokens[child]
            if chance.accept(acceptance(p, q, x)):
                break
            p, q = residual(p, q, x, tree.candidates == "without_replacement")
        else:
            verdict.tokens.append(chance.draw(p))
            return verdict
        verdict.path.append(child)
        verdict.tokens.append(x)
        if warper.reads_prefix:
            prefix = torch.cat([prefix, prefix.new_tensor([x])])


def acceptance(p: Tensor, q: Tensor | None, x: int) -> float:
    """min(1, p(x) / q(x)); q None is the point mass on x."""
    if q is None:
        return p[x].item()
    return min(1.0, p[x].item() / q[x].item())


def residual(p: Tensor, q: Tensor | None, x: int, without_replacement: bool) -> tuple[Tensor, Tensor | None]:
    """Both laws `(vocab,)`, normalised, after the candidate x was rejected."""
    without_x = torch.ones_like(p).index_fill_(0, torch.tensor([x], device=p.device), 0.0)
    if q is None:
        return normalised(p * without_x, p), None
    rest = normalised((p - q).clamp_(min=0), p)
    return rest, normalised(q * without_x, q) if without_replacement else q


def normalised(weights: Tensor, otherwise: Tensor) -> Tensor:
    """`weights` summing to one; `otherwise` where nothing is left, which only rounding can bring about."""
    total = weights.sum()
    return weights / total if total > 0 else otherwise
