"""The target's names in records, and its most probable next tokens.

Against these tokens a drafter is trained without the target's head: a few dozen probabilities hold nearly all of the
mass, and the rest carries no loss.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from outdraft.data.provenance import portable
from outdraft.target.target import Target


def target_id(target: Target) -> str:
    """Return the hub name or folder of the target; its class name when it was built in memory."""
    return str(getattr(target.model.config, "_name_or_path", "") or type(target.model).__name__)


def shown_target(target: Target) -> str:
    """Return the target's id for published files: a folder elsewhere on this machine shows its name alone."""
    return str(portable(target_id(target)))


HEAD_ROWS = 512
"""The default number of positions whose logits are held at once."""

LOGARITHM_ROWS = 32
"""The number of positions whose logits become float32 at once: these fit a processor's cache, four times as fast."""


class TopProbs(NamedTuple):
    """The most probable tokens of every position, best first."""

    ids: Tensor
    """The `(positions, k)` token ids, int64."""
    probs: Tensor
    """The `(positions, k)` probabilities at temperature 1 over the whole vocabulary: a row sums to at most 1."""


def top_probs(logits: Tensor, k: int) -> TopProbs:
    """Return the `k` most probable tokens by `(positions, vocab)` logits."""
    best = logits.topk(k, dim=-1)
    whole = torch.cat([rows.float().logsumexp(dim=-1, keepdim=True) for rows in logits.split(LOGARITHM_ROWS)])
    return TopProbs(best.indices, (best.values.float() - whole).exp())


@torch.no_grad()
def most_probable(target: Target, goal: Tensor, k: int, rows: int = HEAD_ROWS) -> TopProbs:
    """Return the target's most probable tokens for given features.

    Args:
        goal: `(positions, hidden)` features after the final norm.
        k: tokens of every position; all where the vocabulary has fewer.
        rows: positions whose logits are held at once.
    """
    with torch.autocast(goal.device.type, enabled=False):
        pieces = [top_probs(target.head(piece), min(k, target.vocab_size)) for piece in goal.split(rows)]
    return TopProbs(*(torch.cat(parts) for parts in zip(*pieces, strict=True)))


def predicting(loss_mask: Tensor, ahead: int = 1) -> Tensor:
    """Map the `(..., tokens)` mask of response tokens to the `(..., tokens - ahead)` mask of positions that predict
    one: each predicts the token `ahead` places after it."""
    return loss_mask[..., ahead:].bool()


def places(loss_mask: Tensor) -> Tensor:
    """Return the `(batch, tokens - 1)` indices of predicting positions among all of them, row by row."""
    return predicting(loss_mask).flatten().cumsum(0).view(len(loss_mask), -1) - 1


def within(said: TopProbs, indices: Tensor) -> TopProbs:
    """Translate most probable tokens to a reduced draft vocabulary.

    Args:
        said: tokens of the whole vocabulary.
        indices: `(vocab,)` indices of tokens in the draft vocabulary, -1 where it lacks one.

    Returns:
        Ids of the draft vocabulary; a token outside it has id -1 and probability 0.
    """
    ids = indices[said.ids]
    return TopProbs(ids, said.probs.masked_fill(ids < 0, 0.0))
