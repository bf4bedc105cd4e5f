"""Drafting with a smaller language model that has the same tokenizer.

The small model keeps a cache of its own over the decided tokens and runs ahead on what it proposes. It needs nothing of
the target but its tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from outdraft.drafters.base import Drafter, DraftState, RowContext, TreeShape, Update
from outdraft.drafters.growth import RunAhead, grow
from outdraft.errors import UserError
from outdraft.places import counting, integers
from outdraft.run import TargetRun
from outdraft.target import Target
from outdraft.tree import Tree


class DraftModel(Drafter):
    """Any causal language model with the target's vocabulary.

    Args:
        model: the small model.
        target: the model that it drafts for.

    Raises:
        UserError: vocabularies or devices differ, or the family cannot run ahead.
    """

    method = "draft-model"

    def __init__(self, model: Target, target: Target):
        if model.vocab_size != target.vocab_size:
            raise UserError(
                f"the draft model has {model.vocab_size} tokens, the target {target.vocab_size}; "
                "a draft model must share the target's tokenizer"
            )
        if model.device != target.device:
            raise UserError(f"the draft model is on {model.device}, the target on {target.device}; move it there")
        own, others = model.tokenizer, target.tokenizer
        if own is not None and others is not None and own.get_vocab() != others.get_vocab():
            raise UserError("the draft model's tokenizer differs from the target's; a draft model must share it")
        if model.slot_limit is not None:
            raise UserError(
                f"{type(model.model).__name__} has a table of cache slots, in which there is no room to run ahead; "
                "choose a draft model of another family"
            )
        self.model = model

    def begin(self, prompts: Sequence[Tensor], run: TargetRun) -> _DraftModelState:
        return _DraftModelState(self.model, prompts, run.cache.capacity)

    def default_shape(self, device: torch.device, sampling: bool = False) -> TreeShape:
        return TreeShape.chain(5, candidates="sampled" if sampling else "top-k")

    @property
    def num_parameters(self) -> int:
        return self.model.num_parameters


class _DraftModelState(DraftState):
    """The small model's cache: everything decided but each row's root, which waits for the next round."""

    def __init__(self, model: Target, prompts: Sequence[Tensor], capacity: int):
        self.model = model
        self.cache = model.new_cache(len(prompts), capacity)
        self.run = TargetRun(model, self.cache)
        self.run.prefill(prompts)
        # Targets' updates after the prefill begin with the prompt's second token; those are known here already.
        self.known = [len(prompt) - 1 for prompt in prompts]

    def propose(self, update: Update, shape: TreeShape, rows: RowContext) -> Tree:
        roots, logits = self._take_in(update)
        ahead = RunAhead(self.cache, self.model.context_length - 1)

        def step(tokens: Tensor, parents: Tensor) -> Tensor:
            return self.model.head(self.model.forward(tokens, *ahead.place(tokens, parents), self.cache))

        tree = grow(roots, logits, step, shape, rows)
        self.cache.rollback()
        return tree

    def select_rows(self, rows: Sequence[int]) -> None:
        self.cache.select_rows(rows)
        self.known = [self.known[row] for row in rows]

    def join(self, other: _DraftModelState) -> None:
        self.cache.join(other.cache)
        self.known += other.known

    def _take_in(self, update: Update) -> tuple[Tensor, Tensor]:
        """Run the newly decided tokens; each row's root and the draft logits after it."""
        news = [
            update.tokens[row, known:count]
            for row, (known, count) in enumerate(zip(self.known, update.counts, strict=True))
        ]
        self.known = [0] * len(news)
        tokens = pad_sequence(news, batch_first=True)
        features = self.run.tree(Tree.chains(tokens, 1)).features
        self.cache.commit([range(len(new)) for new in news])
        index = counting(0, len(news), tokens.device)
        last = integers([len(new) - 1 for new in news], tokens.device)
        return tokens[index, last], self.model.head(features[index, last])
