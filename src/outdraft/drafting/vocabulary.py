"""Drafts over some of the target's tokens: a reduced draft vocabulary, or the tokens that a draft model shares.

With a large vocabulary, its head is most of a draft step, while nearly all tokens of a text are among the most frequent
(FR-Spec, arXiv 2502.14856; EAGLE-3 does the same). A draft model shares a part of the target's tokens if tables were
padded or tokens were added to one of them. Both change what is drafted, not what is decided. Candidates have the
target's own ids. The draft distribution is zero at other tokens, so verification gives those their whole probability.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from outdraft.core.coupling import Narrowed
from outdraft.core.shape import TreeShape
from outdraft.core.tree import Tree
from outdraft.drafting.base import RowContext
from outdraft.drafting.expand import Step, grow
from outdraft.errors import UserError
from outdraft.target.backends import PackedLinear
from outdraft.target.backends.native.weights import NativeLinear, draft_bits
from outdraft.target.backends.packed import is_linear, plain_linear
from outdraft.target.target import Target

NEVER = -3e4
"""Logit of a token that is not kept; finite, so that a distribution exists even if a user bans all kept tokens."""


def indices_in(kept: Tensor, vocab_size: int) -> Tensor:
    """Return the `(vocab,)` index of every token among the `(kept,)` ids; -1 of those that are not kept."""
    indices = torch.full((vocab_size,), -1, device=kept.device)
    indices[kept] = torch.arange(len(kept), device=kept.device)
    return indices


class DraftVocabulary:
    """The tokens that may be drafted.

    Args:
        tokens: `(kept,)` ids of the tokens.
        target: the target, whose head's weights are copied for these tokens.
        head: an output layer over only these tokens, instead of the target's.

    Raises:
        UserError: the target's head is not a plain linear layer.
    """

    def __init__(self, tokens: Tensor, target: Target, head: nn.Module | None = None):
        self.tokens, self.vocab_size = tokens.to(target.device), target.vocab_size
        self.head: Callable[[Tensor], Tensor] = self._reduced(target) if head is None else head
        """Maps `(..., hidden)` to `(..., kept)` logits; the target's head keeps its own path from features on."""

    def _reduced(self, target: Target) -> Callable[[Tensor], Tensor]:
        """Return the target's head on the kept tokens."""
        output = target.model.get_output_embeddings()
        if not is_linear(output):
            raise UserError(
                f"the target's output layer is a {type(output).__name__}, which cannot be read at some tokens only; "
                "use a drafter without draft_vocab_size"
            )
        both = (None if part is None else part.to(target.device)[self.tokens] for part in plain_linear(output))
        weight, bias = both
        assert weight is not None
        reduced: nn.Module
        if isinstance(output, PackedLinear):
            native = isinstance(output, NativeLinear)
            reduced = NativeLinear(weight, bias, draft_bits(weight)) if native else PackedLinear(weight, bias)
        else:
            kept, width = weight.shape
            with torch.device("meta"):
                reduced = nn.Linear(width, kept, bias=bias is not None)
            parts = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
            reduced.load_state_dict(parts, assign=True)
            reduced.requires_grad_(False)
        return target.head_through(reduced)

    def grow(self, roots: Tensor, logits: Tensor, step: Step, shape: TreeShape, rows: RowContext) -> Tree:
        """Run `expand.grow` on logits of the kept tokens; `step` and the tree use the target's ids."""
        if rows.named(logits.device) or (shape.candidates != "top-k" and not rows.greedy and not rows.coupled):
            # Warpers look tokens up by their ids, and verification needs the distribution of all.
            return grow(roots, self.everywhere(logits), lambda *level: self.everywhere(step(*level)), shape, rows)
        if rows.coupled:
            rows = replace(rows, chances=[Narrowed(chance, self.tokens) for chance in rows.chances])  # type: ignore[arg-type]
        tree = grow(roots, logits, lambda tokens, parents: step(self.tokens[tokens], parents), shape, rows)
        drafted = self.tokens[tree.tokens[:, 1:]]
        return tree.with_tokens(torch.cat([roots[:, None], drafted], dim=1))

    def everywhere(self, logits: Tensor) -> Tensor:
        """Map `(..., kept)` logits to `(..., vocab)`, with `NEVER` at all other tokens."""
        whole = logits.new_full((*logits.shape[:-1], self.vocab_size), NEVER)
        return whole.index_copy_(-1, self.tokens, logits)


SAME = 0.5
"""Smallest share of the smaller tokenizer's tokens that must have the same ids in both."""

PADDED = 0.75
"""Smallest share of one tokenizer's tokens, or of the larger table, that the smaller table must hold, if the tokenizers
cannot be compared."""


class DifferentTokenizers(UserError):
    """Two tokenizers have too few tokens in common."""


class SharedVocabulary:
    """Maps the target's ids to the draft model's, and the draft model's logits to the target's.

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
