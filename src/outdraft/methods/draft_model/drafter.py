"""Drafting with a smaller language model; padding and added tokens may differ, and other tokenizers go through text.

The small model keeps a cache of its own over the decided tokens and runs ahead on its own proposals. Of the target it
needs only the tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from outdraft.core.shape import TreeShape
from outdraft.core.tensors import counting, integers
from outdraft.core.tree import Tree
from outdraft.drafting.base import Drafter, DraftState, Limits, RowContext, Update
from outdraft.drafting.draft_cache import RunAhead
from outdraft.drafting.expand import grow
from outdraft.drafting.vocabulary import DifferentTokenizers, SharedVocabulary
from outdraft.errors import UserError
from outdraft.methods.draft_model.retokenised import RetokenisedState, Translation
from outdraft.target.runner import ModelRunner
from outdraft.target.target import Target


class DraftModel(Drafter):
    """Any causal language model with the target's vocabulary, or most of it (`drafting/vocabulary.py`), or with another
    tokenizer (`retokenised.py`).

    Raises:
        UserError: devices differ, a tokenizer does not keep texts, or the family cannot run ahead.
    """

    method = "draft-model"

    def __init__(self, model: Target, target: Target):
        if model.device != target.device:
            raise UserError(f"the draft model is on {model.device}, the target on {target.device}; move it there")
        self.translation: Translation | None = None
        try:
            self.shared = SharedVocabulary(model, target)
        except DifferentTokenizers:
            self.translation = Translation.between(model.tokenizer, target.tokenizer)
            if self.translation is None:
                raise
            self.limits = Limits(probs=False)
        if model.slot_limit is not None:
            raise UserError(
                f"{type(model.model).__name__} has a table of cache slots, in which there is no room to run ahead; "
                "choose a draft model of another family"
            )
        self.model = model

    def begin(self, prompts: Sequence[Tensor], run: ModelRunner) -> _DraftModelState | RetokenisedState:
        if self.translation is not None:
            return RetokenisedState(self.model, self.translation, prompts, run.cache.capacity)
        return _DraftModelState(self.model, self.shared, prompts, run.cache.capacity)

    def default_shape(self, device: torch.device, sampling: bool = False) -> TreeShape:
        return TreeShape.chain(5, candidates="sampled" if sampling and self.limits.probs else "top-k")

    @property
    def num_parameters(self) -> int:
        return self.model.num_parameters


class _DraftModelState(DraftState):
    """The small model's cache: all decided tokens but each row's root, which is pending until the next round."""

    def __init__(self, model: Target, shared: SharedVocabulary, prompts: Sequence[Tensor], capacity: int):
        self.model, self.shared = model, shared
        self.cache = model.new_cache(len(prompts), capacity)
        self.run = ModelRunner(model, self.cache)
        self.run.prefill([shared.known(prompt) for prompt in prompts])
        # Targets' updates after the prefill begin with the prompt's second token; those are known here already.
        self.known = [len(prompt) - 1 for prompt in prompts]

    def propose(self, update: Update, shape: TreeShape, rows: RowContext) -> Tree:
        roots, logits = self._take_in(update)
        ahead = RunAhead(self.cache, self.model.context_length - 1)

        def step(tokens: Tensor, parents: Tensor) -> Tensor:
            known = self.shared.known(tokens)
            return self._logits(self.model.forward(known, *ahead.place(tokens, parents), self.cache))

        tree = grow(roots, logits, step, shape, rows)
        self.cache.rollback()
        return tree

    def select_rows(self, rows: Sequence[int]) -> None:
        self.cache.select_rows(rows)
        self.known = [self.known[row] for row in rows]

    def read(self, update: Update) -> Update:
        if any(known < count - 1 for known, count in zip(self.known, update.counts, strict=True)):
            return update
        self.known = [known - count + 1 for known, count in zip(self.known, update.counts, strict=True)]
        return update.newest()

    def join(self, other: _DraftModelState) -> None:
        self.cache.join(other.cache)
        self.known += other.known

    def _take_in(self, update: Update) -> tuple[Tensor, Tensor]:
        """Run the newly decided tokens; return each row's root and the draft logits after it."""
        news = [
            update.tokens[row, known:count]
            for row, (known, count) in enumerate(zip(self.known, update.counts, strict=True))
        ]
        self.known = [0] * len(news)
        tokens = pad_sequence(news, batch_first=True)
        features = self.run.tree(Tree.chains(self.shared.known(tokens), 1)).features
        self.cache.commit([range(len(new)) for new in news])
        index = counting(0, len(news), tokens.device)
        last = integers([len(new) - 1 for new in news], tokens.device)
        return tokens[index, last], self._logits(features[index, last])

    def _logits(self, features: Tensor) -> Tensor:
        return self.shared.logits(self.model.head(features))
