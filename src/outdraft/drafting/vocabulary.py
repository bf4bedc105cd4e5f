"""A reduced draft vocabulary: the target's head on only the tokens that a drafter may propose.

With a large vocabulary, its head is most of a draft step, while nearly all tokens of a text are among the most frequent
(FR-Spec, arXiv 2502.14856; EAGLE-3 does the same). This changes what is drafted, not what is decided. Candidates have
the target's own ids. The draft distribution is zero at other tokens, so verification gives those their whole
probability.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from outdraft.core.coupling import Narrowed
from outdraft.core.shape import TreeShape
from outdraft.core.tree import Tree
from outdraft.drafting.base import RowContext
from outdraft.drafting.expand import Step, grow
from outdraft.errors import UserError
from outdraft.target.backends import PackedLinear
from outdraft.target.backends.native.modules import NativeLinear, draft_bits
from outdraft.target.backends.packed import plain_linear
from outdraft.target.target import Target

NEVER = -3e4
"""Logit of a token that is not kept; finite, so that a distribution exists even if a user bans all kept tokens."""


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
        if not isinstance(output, nn.Linear | PackedLinear):
            raise UserError(
                f"the target's output layer is a {type(output).__name__}, which cannot be read at some tokens only; "
                "use a drafter without draft_vocab_size"
            )
        weight, bias = (None if part is None else part[self.tokens] for part in plain_linear(output))
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
        named = rows.guided(logits.device) or (rows.coupled and any(warper.names_tokens for warper in rows.warpers))
        if named or (shape.candidates != "top-k" and not rows.greedy and not rows.coupled):
            # Warpers look tokens up by their ids, and verification needs the distribution of all.
            return grow(roots, self.everywhere(logits), lambda *level: self.everywhere(step(*level)), shape, rows)
        if rows.coupled:
            rows = replace(rows, chances=[Narrowed(chance, self.tokens) for chance in rows.chances])  # type: ignore[arg-type]
        tree = grow(roots, logits, lambda tokens, parents: step(self.tokens[tokens], parents), shape, rows)
        drafted = self.tokens[tree.tokens[:, 1:]]
        return replace(tree, tokens=torch.cat([roots[:, None], drafted], dim=1), _lists=None)

    def everywhere(self, logits: Tensor) -> Tensor:
        """Map `(..., kept)` logits to `(..., vocab)`, with `NEVER` at all other tokens."""
        whole = logits.new_full((*logits.shape[:-1], self.vocab_size), NEVER)
        return whole.index_copy_(-1, self.tokens, logits)
