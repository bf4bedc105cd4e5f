"""Losses of a drafter's probabilities against the target's beyond cross-entropy, with gradients written out.

Top-k counts the target's most probable tokens again (HASS, arXiv 2408.15766, section 3.1). Total variation is the
probability with which a sampled candidate is rejected: verification accepts with the sum of min(p, q). Its gradient
vanishes where the two distributions hardly meet; the negative logarithm of the acceptance divides that by the
acceptance, and so does not.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

Kind = Literal["soft", "top-k", "total-variation", "log-acceptance"]


class TokenLoss(NamedTuple):
    """One of the losses."""

    kind: Kind = "soft"
    """Cross-entropy alone, with the most probable tokens counted again, 1 - sum min(p, q), or - log sum min(p, q)."""
    top_k: int = 10
    """Tokens of the target that top-k counts again."""
    top_k_weight: float = 1.0
    """How often it counts them."""


SOFT = TokenLoss()
"""Cross-entropy, as published."""


@torch.no_grad()
def losses_and_slope(loss: TokenLoss, logits: Tensor, probs: Tensor, wanted: bool) -> tuple[Tensor, Tensor | None]:
    """Compute the loss of every position, and its gradient in the logits where wanted.

    Args:
        loss: any but `soft`, which is `cross_entropy.py`'s own.
        logits: `(positions, vocab)` the drafter's.
        probs: `(positions, vocab)` the target's, in the precision to compute in.
        wanted: True asks for the gradient.

    Returns:
        `(positions,)` and `(positions, vocab)` or None.
    """
    if loss.kind == "top-k":
        best = probs.topk(min(loss.top_k, probs.shape[-1]), dim=-1)
        goal = probs.scatter_add(1, best.indices, best.values * loss.top_k_weight)
        log_guess = logits.log_softmax(dim=-1, dtype=probs.dtype)
        losses = -(goal * log_guess).sum(dim=-1)
        return losses, log_guess.exp_().mul_(goal.sum(dim=-1, keepdim=True)).sub_(goal) if wanted else None
    guess = logits.softmax(dim=-1, dtype=probs.dtype)
    accepted = torch.minimum(guess, probs).sum(dim=-1)
    rising = guess.where(guess < probs, guess.new_zeros(()))  # where more probability is accepted
    tiny = torch.finfo(probs.dtype).tiny
    logarithmic = loss.kind == "log-acceptance"
    losses = -accepted.clamp(min=tiny).log() if logarithmic else 1 - accepted
    if not wanted:
        return losses, None
    slope = guess.mul_(rising.sum(dim=-1, keepdim=True)).sub_(rising)
    return losses, slope.div_(accepted.clamp(min=tiny)[:, None]) if logarithmic else slope
