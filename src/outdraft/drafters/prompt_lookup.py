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
        return _Lookup(self)

    def default_shape(self, device: torch.device, sampling: bool = False) -> TreeShape:
        return TreeShape.chain(10)

    def match(self, tokens: list[int]) -> tuple[int, int]:
        """Length of the longest end of `tokens` that occurred before (0: none), and where it last ended."""
        for n in range(min(self.longest, len(tokens) - 1), self.shortest - 1, -1):
            pattern = tokens[-n:]
            for start in range(len(tokens) - n - 1, -1, -1):
                if tokens[start : start + n] == pattern:
                    return n, start + n
        return 0, len(tokens)

    def continuation(self, tokens: list[int], most: int) -> list[int]:
        """At most `most` tokens that followed the latest earlier occurrence of the end of `tokens`."""
        _, end = self.match(tokens)
        return tokens[end : end + most]


class _Lookup(DraftState):
    """Everything it needs stands in the rows' prefixes."""

    def __init__(self, drafter: PromptLookup):
        self.drafter = drafter

    def propose(self, update: Update, shape: TreeShape, rows: RowContext) -> Tree:
        most = min(shape.depth + 1, shape.size - 1)
        chains, sure = [], []
        for prefix in rows.prefixes:
            tokens = prefix.tolist()
            n, end = self.drafter.match(tokens)
            chains.append([tokens[-1], *tokens[end : end + most]])
            sure.append(n / (n + 1))
        if rows.pace is not None:
            chains = paced(chains, sure, rows.pace)
        nodes = max(len(chain) for chain in chains)
        device = update.tokens.device
        padded = torch.tensor([chain + [0] * (nodes - len(chain)) for chain in chains], device=device)
        parents = torch.tensor(
            [[node - 1 if node < len(chain) else 0 for node in range(nodes)] for chain in chains], device=device
        )
        return Tree(padded, parents, [len(chain) for chain in chains])

    def select_rows(self, rows: Sequence[int]) -> None:
        pass

    def join(self, other: _Lookup) -> None:
        pass


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
