"""Drafting from repetition beside a drafter: where the end of a row's text stood in it before, what followed then is
the draft, and the drafter is not asked.

A long match is right more often than any drafter, goes further and costs nothing to draft; everywhere else the drafter
drafts as ever. Whether a text repeats itself is seen in what is decided alone, so the candidates are point masses
and the choice between the two loses nothing. Choosing by the length of the match is SAM-Decoding's idea (arXiv
2411.10666), with one table of n-grams in place of its automaton. Knows rows' texts and trees; not who drafts otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from outdraft.core.tree import Tree
from outdraft.drafting.ngrams import Text
from outdraft.errors import UserError


@dataclass(frozen=True)
class Repeats:
    """When to draft a repetition, and how much of it."""

    least: int = 4
    """Tokens at the end of a text that must have stood there before, for what followed then to be drafted."""
    most: int = 20
    """Candidates of such a draft, and at most twice as many as tokens were found again; no more than of other drafts
    where a temperature is set."""

    def __post_init__(self) -> None:
        if self.least < 1:
            raise UserError(f"prompt_lookup_min must be 0 (never) or more, not {self.least}")
        if self.most < 1:
            raise UserError(
                f"prompt_lookup_num_tokens must be at least 1, not {self.most}; prompt_lookup_min 0 turns it off"
            )

    def text(self, tokens: Sequence[int]) -> Text:
        """A row's text, of so many tokens as yet."""
        return Text(tokens, self.least, self.least)

    def candidates(self, text: Text, limit: int) -> list[int]:
        """What the text is believed to go on with, of at most `limit` tokens; none where it repeats nothing."""
        found, end = text.match()
        if not found:
            return []
        return text.after(end, min(limit, self.most, 2 * text.alike(end, self.most)))


class Others:
    """The pace of rows that have their candidates already: the others draft to their full length (a `Budget`).

    Args:
        drafting: of every row, whether it is one of the others.
    """

    def __init__(self, drafting: Sequence[bool]):
        self.going = list(drafting)

    def wants(self, nodes: int) -> list[bool]:
        return self.going

    def drafted(self, confidences: Sequence[float | None]) -> None:
        pass

    def sizes(self, gains: Sequence[Sequence[float]], levels: Sequence[Sequence[int]]) -> list[int]:
        return [len(row) for row in gains]


def spliced(tree: Tree, chains: Sequence[Sequence[int]]) -> Tree:
    """The tree with these chains in its rows that have one.

    Args:
        tree: of the drafter; what it drafted for a row that has a chain gives way to that.
        chains: of every row, candidates below its root, one below the other; none leaves the row as it is.
    """
    device, own = tree.tokens.device, [1 + len(chain) for chain in chains]
    counts = [mine if mine > 1 else count for count, mine in zip(tree.counts, own, strict=True)]
    more = max(0, max(counts) - tree.nodes)
    tokens, parents = (F.pad(part, (0, more)) for part in (tree.tokens, tree.parents))
    tokens, parents = tokens[:, : max(counts)].clone(), parents[:, : max(counts)].clone()
    probs = None if tree.draft_probs is None else F.pad(tree.draft_probs, (0, 0, 0, more))[:, : max(counts)].clone()
    for row, chain in enumerate(chains):
        if chain:
            below = torch.tensor(chain, device=device)
            tokens[row, 1:] = parents[row, 1:] = 0
            tokens[row, 1 : own[row]] = below
            parents[row, 1 : own[row]] = torch.arange(len(chain), device=device)
            if probs is not None:
                probs[row] = point_masses(below, *probs.shape[1:]).to(probs)
    levels = None if tree.levels is None else max(tree.levels, max(own) - 1)
    return Tree(tokens, parents, counts, tree.candidates, probs, levels)


def point_masses(tokens: Tensor, nodes: int, vocab: int) -> Tensor:
    """`(nodes, vocab)` distributions under which a chain of these tokens was certain, the root's first; zeros after its
    last."""
    probs = torch.zeros(nodes, vocab, device=tokens.device)
    probs[torch.arange(len(tokens), device=tokens.device), tokens] = 1.0
    return probs
