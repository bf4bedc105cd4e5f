"""What a drafter's law is held against the target's by, beyond cross-entropy, with gradients written out.

Top-k counts the target's most probable tokens again (HASS, arXiv 2408.15766, section 3.1). Total variation is what a
sampled candidate is rejected with: verification accepts with the sum of min(p, q). Its gradient vanishes where the two
laws hardly meet; the negative logarithm of the acceptance divides that by the acceptance, and so does not.

Knows laws and logits of a chunk of positions; nothing of heads, drafters or what counts.
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
    """How often it does so."""


SOFT = TokenLoss()
"""The paper's."""


@torch.no_grad()
def losses_and_slope(loss: TokenLoss, logits: Tensor, law: Tensor, wanted: bool) -> tuple[Tensor, Tensor | None]:
    """The loss of every position, and its gradient in the logits where wanted.

    Args:
        loss: which; not `soft`, which is `cross_entropy.py`'s own.
        logits: `(positions, vocab)` the drafter's.
        law: `(positions, vocab)` the target's, in the precision to compute in.
        wanted: whether there shall be a gradient.

    Returns:
        `(positions,)` and `(positions, vocab)` or None.
    """
    if loss.kind == "top-k":
        best = law.topk(min(loss.top_k, law.shape[-1]), dim=-1)
        goal = law.scatter_add(1, best.indices, best.values * loss.top_k_weight)
        log_guess = logits.log_softmax(dim=-1, dtype=law.dtype)
        losses = -(goal * log_guess).sum(dim=-1)
        return losses, log_guess.exp_().mul_(goal.sum(dim=-1, keepdim=True)).sub_(goal) if wanted else None
    guess = logits.softmax(dim=-1, dtype=law.dtype)
    accepted = torch.minimum(guess, law).sum(dim=-1)
    rising = guess.where(guess < law, guess.new_zeros(()))  # where more probability is accepted
    tiny = torch.finfo(law.dtype).tiny
    logarithmic = loss.kind == "log-acceptance"
    losses = -accepted.clamp(min=tiny).log() if logarithmic else 1 - accepted
    if not wanted:
        return losses, None
    slope = guess.mul_(rising.sum(dim=-1, keepdim=True)).sub_(rising)
    return losses, slope.div_(accepted.clamp(min=tiny)[:, None]) if logarithmic else slope
