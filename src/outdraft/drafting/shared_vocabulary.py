"""The tokens that a draft model shares with its target, if tables were padded or tokens were added to one of them.

Drafts consist of shared tokens only, under the target's own ids. This changes what is drafted, not what is decided: the
draft distribution of the candidates is zero at all other tokens.
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
"""Smallest share of the smaller tokenizer's tokens that must have the same ids in both."""

PADDED = 0.75
"""Smallest share of one tokenizer's tokens, or of the larger table, that the smaller table must hold, if the tokenizers
cannot be compared."""


class DifferentTokenizers(UserError):
    """Two tokenizers have too few tokens in common."""


class SharedVocabulary:
    """Maps the target's ids to the draft model's, and the draft model's logits to the target's.

    Args:
        model: the draft model.
        target: the model that it drafts for.

    Raises:
        DifferentTokenizers: their tokenizers are different ones.
        UserError: their sizes are, and one of the tokenizers is not known.
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
        """Map the target's tokens to ones that the draft model knows; others become its unknown token."""
        return tokens if self.same else self._known[tokens]

    def logits(self, logits: Tensor) -> Tensor:
        """Map `(..., vocab)` logits of the draft model to `(..., vocab)` of the target."""
        if self.same:
            return logits
        common = logits[..., : self._least].masked_fill(self._others, NEVER)
        return F.pad(common, (0, self._more), value=NEVER)


def _shared(model: Target, target: Target) -> Tensor:
    """Return the `(tokens,)` mask of the smaller table: True for tokens that are the same in both."""
    least, most = sorted((model.vocab_size, target.vocab_size))
    words = [_words(one) for one in (model, target)]
    if all(words):
        first, second = words
        shared = torch.tensor([token in first and first[token] == second.get(token) for token in range(least)])
        smaller = min(map(len, words))
        if int(shared.sum()) < SAME * smaller:
            raise DifferentTokenizers(
                f"the tokenizer of the draft model {_name(model)} is not that of the target {_name(target)} "
                f"({int(shared.sum()):,} of {smaller:,} tokens are the same), and one of them does not keep texts "
                "as they are, so that drafts cannot be tokenised again; choose a draft model that shares the tokenizer"
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
    """Return the tokens of a tokenizer by their ids; empty if there is no tokenizer."""
    return {} if one.tokenizer is None else {token: word for word, token in one.tokenizer.get_vocab().items()}


def _name(one: Target) -> str:
    tokenizer: Any = one.tokenizer
    return str(one.model.name_or_path or getattr(tokenizer, "name_or_path", "") or type(one.model).__name__)
