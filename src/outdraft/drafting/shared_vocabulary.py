"""Tokens that a draft model has in common with its target, where their tables were padded or tokens added to one.

Drafts are made of the common tokens alone, under the target's own ids. What is drafted changes, what is decided does
not: the distribution that candidates are declared with has nothing at other tokens. Knows vocabularies; not how trees
grow.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from outdraft.drafting.vocabulary import NEVER
from outdraft.errors import UserError
from outdraft.target.target import Target

SAME = 0.5
"""Of the smaller tokenizer's tokens, the share that must have the same ids in both."""

PADDED = 0.75
"""Of the tokens that one tokenizer has, or of the larger table, the share that the smaller table must hold, where the
tokenizers cannot be compared."""


class SharedVocabulary:
    """From the target's ids to those that the draft model knows, and from its logits to the target's.

    Args:
        model: the draft model.
        target: the model that it drafts for.

    Raises:
        UserError: their tokenizers are different ones.
    """

    def __init__(self, model: Target, target: Target):
        own, whole = model.vocab_size, target.vocab_size
        shared = _shared(model, target)
        self.same = own == whole and bool(shared.all())
        self._least, self._more = min(own, whole), max(0, whole - own)
        self._others = ~shared.to(target.device)
        unknown = getattr(model.tokenizer, "unk_token_id", None) or 0
        ids = torch.arange(self._least)
        known = torch.full((whole,), min(unknown, own - 1)).index_copy_(0, ids, torch.where(shared, ids, unknown))
        self._known = known.to(target.device)

    def known(self, tokens: Tensor) -> Tensor:
        """Any of the target's tokens as ones that the draft model knows, which for others is its unknown one."""
        return tokens if self.same else self._known[tokens]

    def logits(self, logits: Tensor) -> Tensor:
        """`(..., vocab)` of the draft model to `(..., vocab)` of the target."""
        if self.same:
            return logits
        common = logits[..., : self._least].masked_fill(self._others, NEVER)
        return F.pad(common, (0, self._more), value=NEVER)


def _shared(model: Target, target: Target) -> Tensor:
    """`(tokens,)` of the smaller table, which of them are the same in both."""
    least, most = sorted((model.vocab_size, target.vocab_size))
    words = [_words(one) for one in (model, target)]
    if all(words):
        first, second = words
        shared = torch.tensor([token in first and first[token] == second.get(token) for token in range(least)])
        smaller = min(map(len, words))
        if int(shared.sum()) < SAME * smaller:
            raise UserError(
                f"the tokenizer of the draft model {_name(model)} is not that of the target {_name(target)} "
                f"({int(shared.sum()):,} of {smaller:,} tokens are the same); a draft model must share the target's "
                "tokenizer"
            )
        return shared
    (told,) = [one for one in words if one] or [dict[int, str]()]
    if least < PADDED * (len(told) or most):
        raise UserError(
            f"the draft model {_name(model)} has {model.vocab_size} tokens, the target {_name(target)} "
            f"{target.vocab_size}; a draft model must share the target's tokenizer"
        )
    return torch.tensor([token in told for token in range(least)]) if told else torch.ones(least, dtype=torch.bool)


def _words(one: Target) -> dict[int, str]:
    """The tokens of a tokenizer by their ids; none without one."""
    return {} if one.tokenizer is None else {token: word for word, token in one.tokenizer.get_vocab().items()}


def _name(one: Target) -> str:
    tokenizer: Any = one.tokenizer
    return str(one.model.name_or_path or getattr(tokenizer, "name_or_path", "") or type(one.model).__name__)
