"""Cross-entropy of a drafter's logits against the target's law, its token, or both, with logits of one chunk at a time.

Knows heads as functions; nothing of positions, drafters or what counts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

Head = Callable[[Tensor], Tensor]


class HardLabels(NamedTuple):
    """Tokens that the cross-entropy is taken against, too."""

    tokens: Tensor
    """`(positions,)`"""
    weight: float
    """Of this part; the law of the target has the rest up to 1."""


def soft_cross_entropy(
    p: Tensor,
    goal: Tensor,
    head: Head,
    chunk_size: int = 512,
    *,
    own_head: nn.Module | None = None,
    through: Head | None = None,
    labels: HardLabels | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum over positions of the cross-entropy of head(p) against the law of head(goal), and the agreeing argmaxes.

    Args:
        p: `(positions, hidden)` what the drafter hands to the head.
        goal: `(positions, hidden)` the target's features there; no gradient.
        head: the target's frozen head; it runs in the precision of `goal`, as it does in decoding.
        chunk_size: positions whose logits are held at once.
        own_head: the drafter's own output layer, whose weights are trained; it runs as the caller's autocast says.
        through: the way from `p` to logits by that layer, itself when not given.
        labels: tokens to be hit beside, or in place of, the law.

    Returns:
        Two scalars: the sum in float32, differentiable in `p` and the own head's weights, and the count of equal
        argmaxes.
    """
    own = list(own_head.parameters()) if own_head is not None else []
    drafts = (through or own_head) if own_head is not None else None
    total, agreed = _ChunkedCrossEntropy.apply(p, goal, head, drafts, labels, chunk_size, *own)
    return total, agreed


class _ChunkedCrossEntropy(torch.autograd.Function):
    """The gradients are computed chunk by chunk in the forward, so that logits live for one chunk only.

    Keeping `(positions, hidden)` of gradient costs V/d times less than keeping logits, and the head runs once.
    """

    @staticmethod
    def forward(
        ctx: Any,
        p: Tensor,
        goal: Tensor,
        head: Head,
        own_head: Head | None,
        labels: HardLabels | None,
        chunk_size: int,
        *own: Tensor,
    ) -> tuple[Tensor, Tensor]:
        wanted = any(ctx.needs_input_grad)
        total = torch.zeros((), dtype=torch.promote_types(p.dtype, torch.float32), device=p.device)
        agreed = torch.zeros((), dtype=torch.long, device=p.device)
        gradients = [torch.zeros_like(leaf) for leaf in (p, *own)] if wanted else []
        for start in range(0, len(p), chunk_size):
            chunk = slice(start, start + chunk_size)
            with torch.no_grad(), torch.autocast(p.device.type, enabled=False):
                goal_logits = head(goal[chunk]).to(total.dtype)
                best, law = goal_logits.argmax(dim=-1), goal_logits.softmax(dim=-1)
                del goal_logits
            leaf = p[chunk].detach().requires_grad_(wanted)
            with torch.set_grad_enabled(wanted):
                logits = _logits(leaf, goal.dtype, head, own_head).to(total.dtype)
                loss = _loss(logits, law, labels, chunk)
                if wanted:
                    for_p, *for_own = torch.autograd.grad(loss, (leaf, *own))
                    gradients[0][chunk] = for_p
                    for sum_of, more in zip(gradients[1:], for_own, strict=True):
                        sum_of += more
            total += loss.detach()
            agreed += (logits.detach().argmax(dim=-1) == best).sum()
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(agreed)
        return total, agreed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, total: Tensor, agreed: Tensor) -> tuple[Tensor | None, ...]:
        for_p, *for_own = (gradient * total.to(gradient.dtype) for gradient in ctx.saved_tensors)
        return (for_p, None, None, None, None, None, *for_own)


def _logits(p: Tensor, precision: torch.dtype, head: Head, own_head: Head | None) -> Tensor:
    if own_head is not None:
        return own_head(p)
    with torch.autocast(p.device.type, enabled=False):
        return head(p.to(precision))


def _loss(logits: Tensor, law: Tensor, labels: HardLabels | None, chunk: slice) -> Tensor:
    with torch.autocast(logits.device.type, enabled=False):
        if labels is None:
            return F.cross_entropy(logits, law, reduction="sum")
        hard = labels.weight * F.cross_entropy(logits, labels.tokens[chunk], reduction="sum")
        if labels.weight == 1:
            return hard
        return hard + (1 - labels.weight) * F.cross_entropy(logits, law, reduction="sum")
