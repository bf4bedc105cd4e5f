"""N-gram drafts that override a drafter: if the end of a row's text occurred before, what followed then is the draft.

A long match is right more often than any drafter, goes further and costs nothing to draft. Elsewhere the drafter drafts
as usual. Repetition is a property of decided tokens alone, so the candidates are point masses and the choice between
the two is lossless. Choosing by the length of the match is SAM-Decoding's idea (arXiv 2411.10666), with one table of
n-grams instead of its automaton.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from outdraft.core.tensors import sent
from outdraft.core.tree import Tree
from outdraft.errors import UserError


class Text:
    """The decided tokens of one row, and where each of its n-grams last ended.

    Args:
        longest: length of the longest n-gram, which is looked for first.
        shortest: length of the shortest n-gram.
    """

    def __init__(self, tokens: Sequence[int], longest: int, shortest: int):
        self.longest, self.shortest = longest, shortest
        self.tokens: list[int] = []
        self._ends: dict[tuple[int, ...], int] = {}
        self.extend(tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            # The n-grams that end here are earlier ones only now that something follows.
            end = len(self.tokens)
            for n in range(self.shortest, min(self.longest, end) + 1):
                self._ends[tuple(self.tokens[end - n :])] = end
            self.tokens.append(token)

    def match(self) -> tuple[int, int]:
        """Return the length of the longest n-gram at the end that occurred before (0: none), and its last end."""
        count = len(self.tokens)
        for n in range(min(self.longest, count - 1), self.shortest - 1, -1):
            end = self._ends.get(tuple(self.tokens[count - n :]))
            if end is not None:
                return n, end
        return 0, count

    def alike(self, end: int, most: int) -> int:
        """Count the tokens before `end` that equal those before the end of the text, up to `most`."""
        here, there = len(self.tokens), end
        while there > 0 and end - there < most and self.tokens[there - 1] == self.tokens[here - 1]:
            here, there = here - 1, there - 1
        return end - there

    def after(self, end: int, most: int) -> list[int]:
        """Return the `most` tokens that followed `end`; beyond the text's end, they repeat the tokens since `end`."""
        found = self.tokens[end : end + most]
        period = len(self.tokens) - end
        while found and len(found) < most:
            found.append(found[-period])
        return found


IDLE_LEAST = 2
"""Length of the shortest n-grams that are drafted where a greedy row's drafter rests, as its own drafts do not pay."""


PRIOR = 4.0
"""Weight, in drafts, of the belief that a short repetition's draft yields one token."""
FADE = 0.9
"""Weight of a short repetition's draft after one more."""
PROBE = 32
"""Repetitions of which one is drafted where their drafts do not pay."""


class Luck:
    """The yield of one row's drafts of short repetitions, and whether the next is worth its cost."""

    def __init__(self) -> None:
        self.accepted, self.drafts, self.passed = 0.0, 0.0, 0

    def observe(self, accepted: int) -> None:
        """Count a draft of which so many candidates were accepted."""
        self.accepted, self.drafts = FADE * self.accepted + accepted, FADE * self.drafts + 1

    def worth(self, cost: float) -> bool:
        """Return True if a draft is expected to yield more than it costs, in plain rounds, or is due as a probe."""
        if (self.accepted + PRIOR) / (self.drafts + PRIOR) >= cost:
            self.passed = 0
            return True
        self.passed = (self.passed + 1) % PROBE
        return self.passed == 0


@dataclass(frozen=True)
class NgramSettings:
    """When to draft n-grams of the text, and how many tokens of them."""

    least: int = 4
    """Tokens at the end of a text that must have occurred before, so that the tokens after that are drafted."""
    most: int = 20
    """Most candidates of an n-gram draft, which also has at most twice as many as tokens matched. With a temperature,
    it is no longer than other drafts."""

    def __post_init__(self) -> None:
        if self.least < 1:
            raise UserError(f"prompt_lookup_min must be 0 (never) or more, not {self.least}")
        if self.most < 1:
            raise UserError(
                f"prompt_lookup_num_tokens must be at least 1, not {self.most}; prompt_lookup_min 0 turns it off"
            )

    def text(self, tokens: Sequence[int]) -> Text:
        """Make the n-gram index of a row that has these tokens so far."""
        return Text(tokens, self.least, min(self.least, IDLE_LEAST))

    def candidates(self, text: Text, limit: int, idle: bool = False) -> list[int]:
        """Return at most `limit` tokens that are expected to continue the text; none if it repeats nothing.

        Args:
            idle: True if no drafter drafts instead, so that a match of `IDLE_LEAST` tokens is enough.
        """
        found, end = text.match()
        if found < (min(self.least, IDLE_LEAST) if idle else self.least):
            return []
        return text.after(end, min(limit, self.most, 2 * text.alike(end, self.most)))


class FullDrafts:
    """A `Budget` that lets some rows draft to their full length, and the others nothing.

    Args:
        drafting: for every row, True if the drafter drafts for it.
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
    """Override the tree by these chains, in the rows that have one.

    Args:
        tree: the drafter's tree; in rows with a chain, the chain replaces what it drafted.
        chains: for every row, candidates below its root, each the child of the one before; an empty chain changes
            nothing.
    """
    device, own = tree.tokens.device, [1 + len(chain) for chain in chains]
    counts = [mine if mine > 1 else count for count, mine in zip(tree.counts, own, strict=True)]
    more = max(0, max(counts) - tree.nodes)
    tokens, parents = (F.pad(part, (0, more)) for part in (tree.tokens, tree.parents))
    tokens, parents = tokens[:, : max(counts)].clone(), parents[:, : max(counts)].clone()
    probs = None if tree.draft_probs is None else F.pad(tree.draft_probs, (0, 0, 0, more))[:, : max(counts)].clone()
    for row, chain in enumerate(chains):
        if chain:
            below = sent(chain, device)
            tokens[row, 1:] = parents[row, 1:] = 0
            tokens[row, 1 : own[row]] = below
            parents[row, 1 : own[row]] = torch.arange(len(chain), device=device)
            if probs is not None:
                probs[row] = 0.0  # the chain is certain, from the root on
                probs[row, torch.arange(len(chain), device=device), below] = 1.0
    levels = None if tree.levels is None else max(tree.levels, max(own) - 1)
    return Tree(tokens, parents, counts, tree.candidates, probs, levels)
