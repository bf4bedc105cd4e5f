"""N-gram drafts: the tokens that followed the latest earlier occurrence of the newest n-gram.

Prompt lookup needs no model and no features, and pays where answers copy from the prompt (summaries, retrieval, code
edits). The candidates are a chain of point masses.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from outdraft.core.shape import TreeShape
from outdraft.core.tree import Tree
from outdraft.drafting.base import Budget, Drafter, DraftState, Limits, RowContext, Update
from outdraft.drafting.ngrams import Text
from outdraft.target.runner import ModelRunner
from outdraft.target.target import Target
from outdraft.target.views import Reads


class PromptLookup(Drafter):
    """The drafter of prompt lookup decoding.

    Args:
        longest: tokens of the longest n-gram, which is looked for first.
        shortest: tokens of the shortest one.
    """

    method = "prompt-lookup"
    limits = Limits(probs=False, looks_back=True)
    reads = Reads(features=False)

    def __init__(self, longest: int = 3, shortest: int = 1):
        self.longest, self.shortest = longest, shortest

    @classmethod
    def of_any(cls, network: None, target: Target) -> PromptLookup:
        """Return the drafter with its own defaults, which needs no network and serves any target."""
        return cls()

    def begin(self, prompts: Sequence[Tensor], run: ModelRunner) -> _Lookup:
        return _Lookup(self, prompts)

    def default_shape(self, device: torch.device, sampling: bool = False) -> TreeShape:
        return TreeShape.chain(10)

    def text(self, tokens: Sequence[int]) -> Text:
        """Index a row's text, which begins as `tokens`."""
        return Text(tokens, self.longest, self.shortest)


class _Lookup(DraftState):
    """The rows' indexed texts, which grow with every update."""

    def __init__(self, drafter: PromptLookup, prompts: Sequence[Tensor]):
        self.texts = [drafter.text(prompt.tolist()) for prompt in prompts]
        # The first update begins with the prompt's second token.
        self.known = [len(prompt) - 1 for prompt in prompts]

    def propose(self, update: Update, shape: TreeShape, rows: RowContext) -> Tree:
        most = min(shape.depth + 1, shape.size - 1)
        self._take_in(update.on_host)
        self.known = [0] * len(self.texts)
        chains, sure = [], []
        for text in self.texts:
            n, end = text.match()
            chains.append([text.tokens[-1], *text.after(end, most)])
            sure.append(n / (n + 1))
        if rows.budget is not None:
            chains = paced(chains, sure, rows.budget)
        return Tree.listed(chains, update.tokens.device)

    def select_rows(self, rows: Sequence[int]) -> None:
        self.texts = [self.texts[row] for row in rows]
        self.known = [self.known[row] for row in rows]

    def read(self, update: Update) -> Update:
        self._take_in([tokens[:-1] for tokens in update.on_host])
        self.known = [max(0, known - count + 1) for known, count in zip(self.known, update.counts, strict=True)]
        return update.newest()

    def join(self, other: _Lookup) -> None:
        self.texts += other.texts
        self.known += other.known

    def _take_in(self, decided: Sequence[list[int]]) -> None:
        for text, known, new in zip(self.texts, self.known, decided, strict=True):
            text.extend(new[known:])


def paced(chains: Sequence[list[int]], confidences: Sequence[float], budget: Budget) -> list[list[int]]:
    """Cut existing chains, each with its root first, to what the budget wants. `confidences` are the chains', higher
    for longer n-grams."""
    levels, wanted = 0, budget.going
    lengths = [1] * len(chains)
    while any(wanted):
        levels += 1
        there = [going and len(chain) > levels for going, chain in zip(wanted, chains, strict=True)]
        lengths = [length + grown for length, grown in zip(lengths, there, strict=True)]
        budget.drafted([sure if grown else None for sure, grown in zip(confidences, there, strict=True)])
        if not any(there):
            break
        wanted = budget.wants(1)
    return [chain[:length] for chain, length in zip(chains, lengths, strict=True)]
