"""Losses between draft and target probabilities beyond cross-entropy, with gradients written out.

Top-k counts the target's most probable tokens again (HASS, arXiv 2408.15766, section 3.1). Total variation is the
probability with which a sampled candidate is rejected: verification accepts with the sum of min(p, q). Its gradient
vanishes where the two distributions hardly overlap. The gradient of the negative log acceptance is divided by the
acceptance, and so does not vanish.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

Kind = Literal["soft", "top-k", "total-variation", "log-acceptance"]


class TokenLoss(NamedTuple):
    """The choice of a token loss, with its settings."""

    kind: Kind = "soft"
    """The loss: cross-entropy, the same with top-k tokens counted again, 1 - sum min(p, q), or - log sum min(p, q)."""
    top_k: int = 10
    """The number of the target's tokens that top-k counts again."""
    top_k_weight: float = 1.0
    """The weight with which top-k counts them again."""


SOFT = TokenLoss()
"""The published cross-entropy."""


@torch.no_grad()
def losses_and_slope(loss: TokenLoss, logits: Tensor, probs: Tensor, wanted: bool) -> tuple[Tensor, Tensor | None]:
    """Compute the loss of every position, and its gradient in the logits where wanted.

    Args:
        loss: any loss but `soft`, which `cross_entropy.py` computes.
        logits: `(positions, vocab)` draft logits.
        probs: `(positions, vocab)` target probabilities, in the precision to compute in.
        wanted: True asks for the gradient.

    Returns:
        `(positions,)` losses, and the `(positions, vocab)` gradient or None.
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
