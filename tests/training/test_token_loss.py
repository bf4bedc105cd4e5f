"""The token losses beyond cross-entropy against their definitions, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from outdraft.losses.cross_entropy import Guess, TokenLoss, soft_cross_entropies, soft_cross_entropy

D, V = 6, 9
KINDS = [TokenLoss("top-k", 3, 0.5), TokenLoss("top-k", 50), TokenLoss("total-variation"), TokenLoss("log-acceptance")]


def head(x: Tensor) -> Tensor:
    return x @ torch.linspace(-1, 1, V * D, dtype=torch.float64).cos().view(D, V) * 3


def states(count: int = 7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    p, goal = (torch.randn(count, D, dtype=torch.float64, generator=generator) for _ in range(2))
    return p.requires_grad_(), goal


def defined(loss: TokenLoss, p: Tensor, goal: Tensor) -> Tensor:
    """Position by position, as written in the papers."""
    total = p.new_zeros(())
    for said, heard in zip(head(p).softmax(-1), head(goal).softmax(-1), strict=True):
        accepted = sum(torch.minimum(said[v], heard[v]) for v in range(V))
        if loss.kind == "total-variation":
            total = total + 1 - accepted
        elif loss.kind == "log-acceptance":
            total = total - accepted.log()
        else:
            best = heard.argsort(descending=True)[: loss.top_k].tolist()
            for v in range(V):
                total = total - (1 + loss.top_k_weight * (v in best)) * heard[v] * said[v].log()
    return total


@pytest.mark.parametrize("chunk_size", [2, 512])
@pytest.mark.parametrize("loss", KINDS, ids=lambda loss: f"{loss.kind}-{loss.top_k}")
def test_value_and_gradient_are_the_definition_s(loss: TokenLoss, chunk_size: int) -> None:
    p, goal = states()
    total, agreed = soft_cross_entropy(p, goal, head, chunk_size, token_loss=loss)
    expected = defined(loss, p, goal)
    torch.testing.assert_close(total, expected, atol=1e-12, rtol=1e-12)
    assert agreed == (head(p).argmax(-1) == head(goal).argmax(-1)).sum()
    (found,) = torch.autograd.grad(total, p)
    torch.testing.assert_close(found, torch.autograd.grad(expected, p)[0], atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("loss", KINDS[1:], ids=lambda loss: loss.kind)
def test_guesses_that_do_not_count_are_left_out(loss: TokenLoss) -> None:
    p, goal = states()
    counted = torch.tensor([True, False, True, True, False, False, True])
    totals, _ = soft_cross_entropies([Guess(p), Guess(p, counted)], goal, head, 3, token_loss=loss)
    torch.testing.assert_close(totals[1], defined(loss, p[counted], goal[counted]), atol=1e-12, rtol=1e-12)
    (slope,) = torch.autograd.grad(totals[1], p)
    assert (slope[~counted] == 0).all() and slope[counted].abs().min() > 0


def test_total_variation_is_how_often_a_sampled_candidate_is_rejected() -> None:
    """Drawn from the drafter's law and put to verification's own test."""
    p, goal = states(1)
    with torch.no_grad():
        guess, law = head(p)[0].softmax(-1), head(goal)[0].softmax(-1)
        drawn = torch.multinomial(guess, 40_000, replacement=True, generator=torch.Generator().manual_seed(1))
        rejected = 1 - (law / guess).clamp(max=1)[drawn].mean()
        loss, _ = soft_cross_entropy(p, goal, head, token_loss=TokenLoss("total-variation"))
    assert loss.item() == pytest.approx(rejected.item(), abs=0.01)


def test_laws_that_never_meet_give_finite_losses_and_slopes() -> None:
    p = torch.tensor([[1000.0, 0.0]], requires_grad=True)
    goal = torch.tensor([[0.0, 1000.0]])
    for loss in KINDS:
        total, _ = soft_cross_entropy(p, goal, lambda x: x, token_loss=loss)
        (slope,) = torch.autograd.grad(total, p)
        assert total.isfinite() and slope.isfinite().all()
