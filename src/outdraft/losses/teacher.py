"""The target's most probable next tokens, against which a drafter is trained without the target's head.

A few dozen probabilities hold nearly all of the mass; what they leave out carries no loss.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from outdraft.losses.target_like import TargetLike

HEAD_ROWS = 512
"""Positions whose logits are held at once, unless said otherwise."""

LOGARITHM_ROWS = 32
"""Positions whose logits are made float32 at once: so many stay in a processor's cache, which is four times as fast."""


class TopProbs(NamedTuple):
    """The most probable tokens of every position, best first."""

    ids: Tensor
    """`(positions, k)` int64."""
    probs: Tensor
    """`(positions, k)` probabilities at temperature 1, of the whole vocabulary: a row sums to 1 at most."""


def top_probs(logits: Tensor, k: int) -> TopProbs:
    """The `k` most probable tokens by `(positions, vocab)` logits."""
    best = logits.topk(k, dim=-1)
    whole = torch.cat([rows.float().logsumexp(dim=-1, keepdim=True) for rows in logits.split(LOGARITHM_ROWS)])
    return TopProbs(best.indices, (best.values.float() - whole).exp())


@torch.no_grad()
def most_probable(target: TargetLike, goal: Tensor, k: int, rows: int = HEAD_ROWS) -> TopProbs:
    """The target's most probable tokens after some features.

    Args:
        target: the model whose head runs.
        goal: `(positions, hidden)` features after the final norm.
        k: tokens of every position, or all where the vocabulary has less.
        rows: positions whose logits are held at once.
    """
    with torch.autocast(goal.device.type, enabled=False):
        pieces = [top_probs(target.head(piece), min(k, target.vocab_size)) for piece in goal.split(rows)]
    return TopProbs(*(torch.cat(parts) for parts in zip(*pieces, strict=True)))


def predicting(loss_mask: Tensor) -> Tensor:
    """`(..., tokens)` mask of response tokens -> `(..., tokens - 1)` positions whose next token is one."""
    return loss_mask[..., 1:].bool()


def within(said: TopProbs, places: Tensor) -> TopProbs:
    """Translate most probable tokens for a drafter that knows a part of the vocabulary only.

    Args:
        said: tokens of the whole vocabulary.
        places: `(vocab,)` indices of tokens in the draft vocabulary, -1 where it lacks one.

    Returns:
        Ids of the draft vocabulary; a token that is not in it has id -1 and probability 0.
    """
    ids = places[said.ids]
    return TopProbs(ids, said.probs.masked_fill(ids < 0, 0.0))
