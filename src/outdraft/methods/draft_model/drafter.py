"""Drafting with a smaller language model; padding and added tokens may differ, and other tokenizers go through text.

The small model keeps a cache of its own over the decided tokens and runs ahead on its own proposals. Of the target it
needs only the tokens.

With another tokenizer, as in universal assisted decoding, the text so far is tokenised for the small model, which
writes on greedily, and the text that it adds is tokenised for the target. So candidates are point masses: how good they
are depends on how alike the tokenizers are, and the target's output does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from outdraft.core.shape import TreeShape
from outdraft.core.tensors import counting, integers
from outdraft.core.tree import Tree
from outdraft.data.text import answer_text, common_length, decode_text, special_ids
from outdraft.drafting.base import Drafter, Limits, RowContext, Update
from outdraft.drafting.draft_cache import CachedState, RunAhead
from outdraft.drafting.expand import grow, grow_chain
from outdraft.drafting.sample import Step
from outdraft.drafting.vocabulary import DifferentTokenizers, SharedVocabulary
from outdraft.errors import UserError
from outdraft.target.runner import ModelRunner
from outdraft.target.target import Target
from outdraft.target.views import Reads


class DraftModel(Drafter):
    """Any causal language model with the target's vocabulary, or most of it (`drafting/vocabulary.py`), or with another
    tokenizer.

    Raises:
        UserError: devices differ, a tokenizer does not keep texts, or the family cannot run ahead.
    """

    method = "draft-model"
    reads = Reads(features=False)

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


class _ModelState(CachedState):
    """A small model at work on its own tokens of every row.

    Args:
        prompts: `(tokens,)` tokens of every row that the small model knows.
    """

    def __init__(self, model: Target, prompts: Sequence[Tensor], capacity: int):
        self.model = model
        self.cache = model.new_cache(len(prompts), capacity)
        self.run = ModelRunner(model, self.cache)
        self.run.prefill(prompts)

    def _run_new(self, news: Sequence[Tensor]) -> Tensor:
        """Run and commit the rows' new tokens, at least one of each; return `(rows, hidden)` features at the last."""
        features = self.run.tree(Tree.chains(pad_sequence(list(news), batch_first=True), 1)).features
        self.cache.commit([range(len(new)) for new in news])
        last = integers([len(new) - 1 for new in news], features.device)
        return features[counting(0, len(news), features.device), last]

    def _running_ahead(self) -> Step:
        """Return the function from a level's tokens and parents to its `(rows, nodes, hidden)` features."""
        ahead = RunAhead(self.cache, self.model.context_length - 1)
        return lambda tokens, parents: self.model.forward(tokens, *ahead.place(tokens, parents), self.cache)


class _DraftModelState(_ModelState):
    """The small model's cache: all decided tokens but each row's root, which is pending until the next round."""

    def __init__(self, model: Target, shared: SharedVocabulary, prompts: Sequence[Tensor], capacity: int):
        super().__init__(model, [shared.known(prompt) for prompt in prompts], capacity)
        self.shared = shared
        # Targets' updates after the prefill begin with the prompt's second token; those are known here already.
        self.known = [len(prompt) - 1 for prompt in prompts]

    def propose(self, update: Update, shape: TreeShape, rows: RowContext) -> Tree:
        tokens = self.shared.known(update.tokens)
        news = [own[known:count] for own, known, count in zip(tokens, self.known, update.counts, strict=True)]
        self.known = [0] * len(news)
        logits = self._logits(self._run_new(news))
        run = self._running_ahead()
        tree = grow(
            update.roots,
            logits,
            lambda level, parents: self._logits(run(self.shared.known(level), parents)),
            shape,
            rows,
        )
        self.cache.rollback()
        return tree

    def select_rows(self, rows: Sequence[int]) -> None:
        super().select_rows(rows)
        self.known = [self.known[row] for row in rows]

    def read(self, update: Update) -> Update:
        if any(known < count - 1 for known, count in zip(self.known, update.counts, strict=True)):
            return update
        self.known = [known - count + 1 for known, count in zip(self.known, update.counts, strict=True)]
        return update.newest()

    def join(self, other: Any) -> None:
        super().join(other)
        self.known += other.known

    def _logits(self, features: Tensor) -> Tensor:
        return self.shared.logits(self.model.head(features))


PROBE = "Once there were 3 cats; they said: no!"
"""A text that must come through both tokenizers as it is."""

WINDOW = 16
"""Tokens of the text so far that are tokenised again together with a draft."""

UNFINISHED = "\ufffd"
"""What tokenizers decode a part of a character to."""


class Translation:
    """Tokens of two tokenizers that stand for the same text.

    Args:
        own: the small model's tokenizer.
        target: the target's tokenizer.
    """

    def __init__(self, own: PreTrainedTokenizerBase, target: PreTrainedTokenizerBase):
        self.own, self.target = own, target
        words, theirs = own.get_vocab(), target.get_vocab()
        shared = special_ids(own)
        self._spelled = {token for word, token in theirs.items() if words.get(word) in shared}
        self._ends = {words[word]: theirs[word] for word in words.keys() & theirs.keys() if words[word] in shared}
        if own.eos_token_id is not None and target.eos_token_id is not None:
            self._ends[own.eos_token_id] = target.eos_token_id
        whole, text = list(own("a")["input_ids"]), _encoded(own, "a")
        first = next((i for i in range(len(whole)) if whole[i : i + len(text)] == text), 0)
        self._before = whole[:first]  # special tokens that every text of the small model begins with

    @classmethod
    def between(cls, own: Any, target: Any) -> Translation | None:
        """Return the translation between two tokenizers; None if one of them does not keep a text as it is."""
        keep = (callable(one) and decode_text(one, _encoded(one, PROBE)).strip() == PROBE for one in (own, target))
        return cls(own, target) if all(keep) else None

    def of_text(self, tokens: Sequence[int]) -> list[int]:
        """Return the small model's tokens, at least one, of the text of the target's.

        Special tokens that the small model does not have are left out, and so is an unfinished character.
        """
        hidden = special_ids(self.target) - self._spelled
        text = decode_text(self.target, [token for token in tokens if token not in hidden], skip_special_tokens=False)
        found = _encoded(self.own, text.rstrip(UNFINISHED))
        if found[: len(self._before)] != self._before:
            found = self._before + found
        return found or [self.own.eos_token_id or 0]

    def candidates(self, tokens: Sequence[int], own: Sequence[int], drafts: Sequence[int]) -> list[int]:
        """Return the target's tokens after `tokens` that stand for the small model's `drafts` after `own`."""
        special = special_ids(self.own)
        length = next((i for i, token in enumerate(drafts) if token in special), len(drafts))
        new = answer_text(self.own, own, drafts[:length]).rstrip(UNFINISHED)
        end = [self._ends[token] for token in drafts[length : length + 1] if token in self._ends]
        found = self._continued(tokens, new) if new else []
        return found + (end if found or not new else [])

    def _continued(self, tokens: Sequence[int], new: str) -> list[int]:
        """Return the target's tokens of a text after `tokens`; none if the target has no token end between them."""
        special = special_ids(self.target)
        start = next((i for i in range(len(tokens), 0, -1) if tokens[i - 1] in special), 0)
        tail = list(tokens[max(start, len(tokens) - WINDOW) :])
        while (text := decode_text(self.target, tail)).startswith(UNFINISHED):
            tail = tail[1:]  # the window begins amid a character
        whole = _encoded(self.target, text.rstrip(UNFINISHED) + new)
        known = tail[1:] or tail  # tokenizers may put a space, alone or with the first token, before a text
        for first in (len(tail) - len(known), len(tail) - len(known) + 1):
            if known and whole[first : first + len(known)] == known:
                return whole[first + len(known) :]
        if text.endswith(UNFINISHED):
            return []
        for count in range(1, len(whole)):
            if decode_text(self.target, whole[:count]) == text:
                return whole[count:]
        alone = _encoded(self.target, new)  # the text goes on within what would be one token
        return alone if decode_text(self.target, tail + alone) == text + new else []


class RetokenisedState(_ModelState):
    """The small model's cache over its own tokens of every row's text.

    Args:
        prompts: `(tokens,)` target tokens of every row.
    """

    def __init__(self, model: Target, translation: Translation, prompts: Sequence[Tensor], capacity: int):
        self.translation = translation
        self.texts = [translation.of_text(prompt.tolist()) for prompt in prompts]
        super().__init__(model, [torch.tensor(text) for text in self.texts], capacity)

    def propose(self, update: Update, shape: TreeShape, rows: RowContext) -> Tree:
        most = min(shape.depth + 1, shape.size - 1)
        prefixes = [prefix.tolist() for prefix in rows.prefixes]
        logits = self._take_in([self.translation.of_text(prefix) for prefix in prefixes])
        run = self._running_ahead()
        chain = grow_chain(update.roots, logits, lambda *level: self.model.head(run(*level)), most)
        drafts = chain.tokens[:, 1:].tolist()
        self.cache.rollback()
        found = map(self.translation.candidates, prefixes, self.texts, drafts)
        return Tree.listed(
            [[prefix[-1], *new[:most]] for prefix, new in zip(prefixes, found, strict=True)], logits.device
        )

    def select_rows(self, rows: Sequence[int]) -> None:
        super().select_rows(rows)
        self.texts = [self.texts[row] for row in rows]

    def read(self, update: Update) -> Update:
        return update.newest()  # it reads texts

    def join(self, other: Any) -> None:
        super().join(other)
        self.texts += other.texts

    def _take_in(self, texts: list[list[int]]) -> Tensor:
        """Run what is new in the rows' texts, forget what a text tokenises to no more, and return the next logits."""
        # All but the last token of a text, which is run again for its logits.
        kept = [common_length(old, new[:-1]) for old, new in zip(self.texts, texts, strict=True)]
        self.cache.cut(kept)
        self.texts, device = texts, self.model.device
        news = [torch.tensor(text[count:], device=device) for text, count in zip(texts, kept, strict=True)]
        return self.model.head(self._run_new(news))


def _encoded(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
