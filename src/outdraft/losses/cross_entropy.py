"""Losses of a drafter's logits against the target's probabilities, a token, or both, with the logits of one chunk at a
time.

Several guesses at the same positions (the steps of an unrolled drafter, Medusa's heads) share the target's
probabilities. The target's head makes all of them once a chunk; those of its most probable tokens (`teacher.py`) need
no head.

Beyond cross-entropy, with gradients written out: top-k counts the target's most probable tokens again (HASS, arXiv
2408.15766, section 3.1). Total variation is the probability with which a sampled candidate is rejected: verification
accepts with the sum of min(p, q). Its gradient vanishes where the two distributions hardly overlap. The gradient of the
negative log acceptance is divided by the acceptance, and so does not vanish.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from outdraft.losses.teacher import TopProbs

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
        loss: any loss but `soft`, which `_loss` computes.
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


Head = Callable[[Tensor], Tensor]

PRODUCT_ROWS = 32
"""The number of positions whose products p log q are held at once; a batched dot product rounds worse and is slower."""


class HardLabels(NamedTuple):
    """The hard labels: tokens that the cross-entropy is also taken against."""

    tokens: Tensor
    """The `(positions,)` token ids."""
    weight: float
    """The weight of the hard labels; the target's probabilities have the rest up to 1."""


class Guess(NamedTuple):
    """A drafter's output at every position; several guesses may share their goals."""

    p: Tensor
    """The `(positions, hidden)` input of the head."""
    counted: Tensor | None = None
    """The `(positions,)` mask, False where this guess carries no loss; None counts every position."""
    own_head: nn.Module | None = None
    """The drafter's own output layer, whose weights are trained; it runs as the caller's autocast says."""
    through: Head | None = None
    """The function from `p` through the own head to logits; None is the own head itself."""


def soft_cross_entropy(
    p: Tensor,
    goal: Tensor | TopProbs,
    head: Head,
    chunk_size: int = 512,
    *,
    own_head: nn.Module | None = None,
    through: Head | None = None,
    labels: HardLabels | None = None,
    token_loss: TokenLoss = SOFT,
    precision: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Return `soft_cross_entropies` of a single guess that counts everywhere, as two scalars."""
    guesses = [Guess(p, None, own_head, through)]
    settings: dict[str, Any] = {"labels": labels, "token_loss": token_loss, "precision": precision}
    totals, agreed = soft_cross_entropies(guesses, goal, head, chunk_size, **settings)
    return totals[0], agreed[0]


def soft_cross_entropies(
    guesses: Sequence[Guess],
    goal: Tensor | TopProbs,
    head: Head,
    chunk_size: int = 512,
    *,
    labels: HardLabels | None = None,
    token_loss: TokenLoss = SOFT,
    precision: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum, for every guess, its cross-entropy against the target's probabilities over all positions.

    Args:
        guesses: guesses at the same positions.
        goal: `(positions, hidden)` the target's features, without gradient, whose logits are head(goal); or the most
            probable tokens there, with ids of the head's vocabulary.
        head: the target's frozen head, or its rows of a draft vocabulary.
        chunk_size: positions whose logits are held at once, those of one guess and the target's probabilities.
        labels: hard labels beside, or in place of, the target's probabilities.
        token_loss: the loss to sum in place of cross-entropy; without labels.
        precision: precision of the head, as in decoding; that of the features in `goal` if not given.

    Returns:
        Both `(guesses,)`: the sums in float32, differentiable in every `p` and the own heads' weights, and the counts
        of equal argmaxes.
    """
    leaves = [leaf for guess in guesses for leaf in _leaves(guess)]
    precision = precision or (guesses[0].p.dtype if isinstance(goal, TopProbs) else goal.dtype)
    totals, agreed = _ChunkedCrossEntropy.apply(
        tuple(guesses), goal, head, precision, labels, token_loss, chunk_size, *leaves
    )
    return totals, agreed


def _leaves(guess: Guess) -> list[Tensor]:
    return [guess.p, *(guess.own_head.parameters() if guess.own_head is not None else ())]


class _ChunkedCrossEntropy(torch.autograd.Function):
    """A cross-entropy that computes its gradients chunk by chunk in the forward, so that logits live for one chunk
    only.

    Keeping `(positions, hidden)` of gradient costs V/d times less than keeping logits, and the head runs once.
    """

    @staticmethod
    def forward(
        ctx: Any,
        guesses: tuple[Guess, ...],
        goal: Tensor | TopProbs,
        head: Head,
        precision: torch.dtype,
        labels: HardLabels | None,
        token_loss: TokenLoss,
        chunk_size: int,
        *leaves: Tensor,
    ) -> tuple[Tensor, Tensor]:
        wanted = any(ctx.needs_input_grad)
        device, positions = guesses[0].p.device, len(guesses[0].p)
        exact = torch.promote_types(guesses[0].p.dtype, torch.float32)
        totals = torch.zeros(len(guesses), dtype=exact, device=device)
        agreed = torch.zeros(len(guesses), dtype=torch.long, device=device)
        gradients = [[torch.zeros_like(leaf) for leaf in _leaves(guess)] if wanted else [] for guess in guesses]
        for start in range(0, positions, chunk_size):
            chunk = slice(start, start + chunk_size)
            best, target = _target_says(goal, chunk, head, exact, labels)
            for k, guess in enumerate(guesses):
                counted = None if guess.counted is None else guess.counted[chunk]
                p, *own = _leaves(guess)
                leaf = p[chunk].detach().requires_grad_(wanted)
                with torch.set_grad_enabled(wanted):
                    logits = _logits(leaf, precision, head, guess)
                equal = _is_best(logits.detach(), best)
                agreed[k] += (equal if counted is None else equal & counted).sum()
                loss, slope = _loss(logits.detach(), target, labels, token_loss, chunk, counted, exact, wanted)
                totals[k] += loss
                if slope is None:
                    continue
                for_p, *for_own = torch.autograd.grad(logits, (leaf, *own), slope.to(logits.dtype))
                gradients[k][0][chunk] = for_p
                for sum_of, more in zip(gradients[k][1:], for_own, strict=True):
                    sum_of += more
                del logits, slope  # before the next guess has its own
            del target  # before the next chunk has its own
        ctx.counts = [len(of_one) for of_one in gradients]
        ctx.save_for_backward(*(gradient for of_one in gradients for gradient in of_one))
        ctx.mark_non_differentiable(agreed)
        return totals, agreed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, totals: Tensor, agreed: Tensor) -> tuple[Tensor | None, ...]:
        factors = [total for total, count in zip(totals, ctx.counts, strict=True) for _ in range(count)]
        pairs = zip(ctx.saved_tensors, factors, strict=True)
        scaled = (gradient * factor.to(gradient.dtype) for gradient, factor in pairs)
        return (None, None, None, None, None, None, None, *scaled)


def _target_says(
    goal: Tensor | TopProbs, chunk: slice, head: Head, exact: torch.dtype, labels: HardLabels | None
) -> tuple[Tensor, Tensor | TopProbs]:
    """Return the target's `(positions,)` best tokens and its probabilities: those of the given most probable tokens,
    else `(positions, vocab)`, which is empty where only hard labels count."""
    if isinstance(goal, TopProbs):
        return goal.ids[chunk, 0], TopProbs(goal.ids[chunk], goal.probs[chunk].to(exact))
    with torch.no_grad(), torch.autocast(goal.device.type, enabled=False):
        logits = head(goal[chunk])
        best = logits.argmax(dim=-1)
        only_tokens = labels is not None and labels.weight == 1
        return best, logits.new_empty(0) if only_tokens else logits.softmax(dim=-1, dtype=exact)


def _is_best(logits: Tensor, tokens: Tensor) -> Tensor:
    """Return True where no logit is above the token's (-1 is no token); many times as fast as an argmax in bf16."""
    own = logits.gather(1, tokens.clamp(min=0)[:, None])[:, 0]
    return (own == logits.amax(dim=-1)) & (tokens >= 0)


def _logits(p: Tensor, precision: torch.dtype, head: Head, guess: Guess) -> Tensor:
    if guess.own_head is not None:
        return (guess.through or guess.own_head)(p)
    with torch.autocast(p.device.type, enabled=False):
        return head(p.to(precision))


@torch.no_grad()
def _loss(
    logits: Tensor,
    target: Tensor | TopProbs,
    labels: HardLabels | None,
    token_loss: TokenLoss,
    chunk: slice,
    counted: Tensor | None,
    exact: torch.dtype,
    wanted: bool,
) -> tuple[Tensor, Tensor | None]:
    """Compute the loss's sum over the positions and, where wanted, its gradient in the logits: the guess's
    probabilities less the target's.

    The gradient is written out to save memory: beside logits and target only one tensor of their size is made.
    """
    with torch.autocast(logits.device.type, enabled=False):
        if token_loss.kind != "soft":
            losses, slope = losses_and_slope(token_loss, logits, _spread(target, logits), wanted)
            if counted is not None:
                losses = losses.masked_fill_(~counted, 0.0)
                slope = None if slope is None else slope.masked_fill_(~counted[:, None], 0.0)
            return losses.sum(), slope
        log_guess = logits.log_softmax(dim=-1, dtype=exact)
        weight = 0.0 if labels is None else labels.weight
        losses = log_guess.new_zeros(len(log_guess))
        if labels is not None:
            tokens = labels.tokens[chunk, None]
            losses -= weight * log_guess.gather(1, tokens)[:, 0]
        if isinstance(target, TopProbs):
            losses -= (1 - weight) * (target.probs * log_guess.gather(1, target.ids.clamp(min=0))).sum(dim=-1)
        elif weight != 1:
            blocks = zip(target.split(PRODUCT_ROWS), log_guess.split(PRODUCT_ROWS), strict=True)
            losses -= (1 - weight) * torch.cat([(p * log_q).sum(dim=-1) for p, log_q in blocks])
        if counted is not None:
            losses = losses.masked_fill_(~counted, 0.0)
        if not wanted:
            return losses.sum(), None
        slope = log_guess.exp_()
        if isinstance(target, TopProbs):
            # What the teacher's tokens leave out carries no loss, so a row weighs what they have together.
            slope.mul_((1 - weight) * target.probs.sum(dim=-1, keepdim=True) + weight)
            slope.scatter_add_(1, target.ids.clamp(min=0), (weight - 1) * target.probs)
        elif weight != 1:
            slope.sub_(target, alpha=1 - weight)
        if labels is not None:
            slope.scatter_add_(1, tokens, slope.new_full(tokens.shape, -weight))
        if counted is not None:
            slope.masked_fill_(~counted[:, None], 0.0)
        return losses.sum(), slope


def _spread(target: Tensor | TopProbs, logits: Tensor) -> Tensor:
    """Scatter the most probable tokens to `(positions, vocab)` probabilities, 0 elsewhere; whole distributions pass."""
    if not isinstance(target, TopProbs):
        return target
    return target.probs.new_zeros(logits.shape).scatter_add_(1, target.ids.clamp(min=0), target.probs)
