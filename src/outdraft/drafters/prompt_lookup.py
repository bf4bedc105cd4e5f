"""Drafting by looking back: the words after the last place where the newest n-gram occurred before.

No model and no features; good where answers copy from the prompt (summaries, retrieval, code edits). The candidates
are a chain of point masses.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from outdraft.drafters.base import Drafter, DraftState, Pace, RowContext, TreeShape, Update
from outdraft.run import TargetRun
from outdraft.tree import Tree


class PromptLookup(Drafter):
    """Prompt lookup decoding.

    Args:
        longest: tokens of the longest n-gram that is looked for first.
        shortest: tokens of the shortest one.
    """

    method = "prompt-lookup"
    has_law = False

    def __init__(self, longest: int = 3, shortest: int = 1):
        self.longest, self.shortest = longest, shortest

    def begin(self, prompts: Sequence[Tensor], run: TargetRun) -> _Lookup:
        return _Lookup(self, prompts)

    def default_shape(self, device: torch.device, sampling: bool = False) -> TreeShape:
        return TreeShape.chain(10)

    def continuation(self, tokens: list[int], most: int) -> list[int]:
        """At most `most` tokens that followed the latest earlier occurrence of the end of `tokens`."""
        text = Text(self, tokens)
        _, end = text.match()
        return tokens[end : end + most]


class Text:
    """What was decided of one row, and where each of its n-grams last ended.

    Args:
        drafter: says how long n-grams are.
        tokens: decided so far.
    """

    def __init__(self, drafter: PromptLookup, tokens: Sequence[int]):
        self.drafter = drafter
        self.tokens: list[int] = []
        self._ends: dict[tuple[int, ...], int] = {}
        self.extend(tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        """Take in newly decided tokens."""
        for token in tokens:
            # The n-grams that end here are earlier ones only now that something follows.
            end = len(self.tokens)
            for n in range(self.drafter.shortest, min(self.drafter.longest, end) + 1):
                self._ends[tuple(self.tokens[end - n :])] = end
            self.tokens.append(token)

    def match(self) -> tuple[int, int]:
        """Length of the longest end of the text that occurred before (0: none), and where it last ended."""
        count = len(self.tokens)
        for n in range(min(self.drafter.longest, count - 1), self.drafter.shortest - 1, -1):
            end = self._ends.get(tuple(self.tokens[count - n :]))
            if end is not None:
                return n, end
        return 0, count


class _Lookup(DraftState):
    """The rows' texts, which grow with every update."""

    def __init__(self, drafter: PromptLookup, prompts: Sequence[Tensor]):
        self.texts = [Text(drafter, prompt.tolist()) for prompt in prompts]
        # The first update begins with the prompt's second token.
        self.known = [len(prompt) - 1 for prompt in prompts]

    def propose(self, update: Update, shape: TreeShape, rows: RowContext) -> Tree:
        most = min(shape.depth + 1, shape.size - 1)
        for text, known, new, count in zip(self.texts, self.known, update.tokens.tolist(), update.counts, strict=True):
            text.extend(new[known:count])
        self.known = [0] * len(self.texts)
        chains, sure = [], []
        for text in self.texts:
            n, end = text.match()
            chains.append([text.tokens[-1], *text.tokens[end : end + most]])
            sure.append(n / (n + 1))
        if rows.pace is not None:
            chains = paced(chains, sure, rows.pace)
        nodes = max(len(chain) for chain in chains)
        device = update.tokens.device
        padded = torch.tensor([chain + [0] * (nodes - len(chain)) for chain in chains], device=device)
        if all(len(chain) == nodes for chain in chains):
            return Tree.chains(padded, 1)
        counts = [len(chain) for chain in chains]
        parents = [[*range(-1, count - 1), *[0] * (nodes - count)] for count in counts]
        return Tree(padded, torch.tensor(parents, device=device), counts, levels=nodes - 1)

    def select_rows(self, rows: Sequence[int]) -> None:
        self.texts = [self.texts[row] for row in rows]
        self.known = [self.known[row] for row in rows]

    def join(self, other: _Lookup) -> None:
        self.texts += other.texts
        self.known += other.known


def paced(chains: Sequence[list[int]], confidences: Sequence[float], pace: Pace) -> list[list[int]]:
    """What the pace wants of chains that are there already, each beginning with its root; the longer the n-gram that
    was found, the surer is the whole chain."""
    levels, wanted = 0, pace.going
    lengths = [1] * len(chains)
    while any(wanted):
        levels += 1
        there = [going and len(chain) > levels for going, chain in zip(wanted, chains, strict=True)]
        lengths = [length + grown for length, grown in zip(lengths, there, strict=True)]
        pace.drafted([sure if grown else None for sure, grown in zip(confidences, there, strict=True)])
        if not any(there):
            break
        wanted = pace.wants(1)
    return [chain[:length] for chain, length in zip(chains, lengths, strict=True)]
