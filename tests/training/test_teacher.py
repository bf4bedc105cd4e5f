"""The target's most probable tokens: what they are, and what a drafter learns from them, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from outdraft.losses.cross_entropy import (
    SOFT,
    Guess,
    HardLabels,
    TokenLoss,
    _is_best,
    soft_cross_entropies,
    soft_cross_entropy,
)
from outdraft.losses.teacher import TopProbs, most_probable, top_probs, within
from outdraft.target.target import Target

D, V, N = 6, 11, 9
KINDS = [SOFT, TokenLoss("top-k", 3, 0.5), TokenLoss("total-variation"), TokenLoss("log-acceptance")]


@pytest.fixture
def weight() -> Tensor:
    return torch.randn(V, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def states(count: int = N) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    p, goal = (torch.randn(count, D, dtype=torch.float64, generator=generator) for _ in range(2))
    return p.requires_grad_(), goal


def in_float64(goal: Tensor, weight: Tensor, k: int) -> TopProbs:
    best = (goal @ weight.T).softmax(-1).topk(k)
    return TopProbs(best.indices, best.values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_they_are_the_best_of_the_whole_distribution(dtype: torch.dtype) -> None:
    logits = (3 * torch.randn(70, 40)).to(dtype)
    said, law = top_probs(logits, 7), logits.double().softmax(-1)
    torch.testing.assert_close(said.probs.double(), law.topk(7).values, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(law.gather(1, said.ids), law.topk(7).values)
    torch.testing.assert_close(top_probs(logits, 40).probs.sum(-1), torch.ones(70))


def test_they_are_the_same_in_any_number_of_pieces(target: Target) -> None:
    goal = torch.randn(20, 16)
    whole, pieces = most_probable(target, goal, 5), most_probable(target, goal, 5, rows=3)
    assert torch.equal(whole.ids, pieces.ids)
    torch.testing.assert_close(whole.probs, pieces.probs)
    assert most_probable(target, goal, 10_000).ids.shape == (20, 260)
    assert len(most_probable(target, goal[:0], 5).ids) == 0


@pytest.mark.parametrize("chunk_size", [2, 512])
@pytest.mark.parametrize("loss", KINDS, ids=lambda loss: loss.kind)
def test_all_tokens_are_the_whole_distribution(weight: Tensor, loss: TokenLoss, chunk_size: int) -> None:
    p, goal = states()

    def head(x: Tensor) -> Tensor:
        return x @ weight.T

    dense, agreed = soft_cross_entropy(p, goal, head, chunk_size, token_loss=loss)
    said = in_float64(goal, weight, V)
    sparse, likewise = soft_cross_entropy(p, said, head, chunk_size, token_loss=loss)
    torch.testing.assert_close(sparse, dense, atol=1e-12, rtol=1e-12)
    assert agreed == likewise
    slopes = [torch.autograd.grad(one, p)[0] for one in (dense, sparse)]
    torch.testing.assert_close(slopes[1], slopes[0], atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("hard_weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("k", [1, 4, V])
def test_fewer_tokens_are_those_terms_of_the_sum(weight: Tensor, k: int, own: bool, hard_weight: float) -> None:
    """Position by position and token by token, with several guesses of which some do not count."""
    p, goal = states()
    q = (p.detach() * 0.7 - 0.1).requires_grad_()
    counted = torch.tensor([True, False, True, True, False, False, True, True, False])
    own_head = nn.Linear(D, V).double() if own else None
    labels = HardLabels(torch.arange(N) % V, hard_weight) if hard_weight else None
    said = in_float64(goal, weight, k)
    leaves = [p, q, *(own_head.parameters() if own_head is not None else ())]

    def head(x: Tensor) -> Tensor:
        return x @ weight.T

    def plainly(x: Tensor, here: Tensor | None) -> Tensor:
        total = x.new_zeros(())
        for i in range(N):
            if here is not None and not here[i]:
                continue
            log_guess = (own_head or head)(x[i]).log_softmax(-1)
            for token, prob in zip(said.ids[i].tolist(), said.probs[i].tolist(), strict=True):
                total = total - (1 - hard_weight) * prob * log_guess[token]
            total = total - hard_weight * log_guess[i % V]
        return total

    guesses = [Guess(p, None, own_head), Guess(q, counted, own_head)]
    totals, agreed = soft_cross_entropies(guesses, said, head, 4, labels=labels)
    expected = torch.stack([plainly(p, None), plainly(q, counted)])
    torch.testing.assert_close(totals, expected, atol=1e-12, rtol=1e-12)
    found = torch.autograd.grad(totals @ totals.new_tensor([1.0, 2.0]), leaves)
    wanted = torch.autograd.grad(expected @ totals.new_tensor([1.0, 2.0]), leaves)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-11)
    right = (own_head or head)(q).argmax(-1) == (goal @ weight.T).argmax(-1)
    assert agreed[1] == right[counted].sum()


def test_fewer_tokens_pass_gradcheck(weight: Tensor) -> None:
    p, goal = states(5)
    said = in_float64(goal, weight, 3)
    assert torch.autograd.gradcheck(lambda x: soft_cross_entropy(x, said, lambda y: y @ weight.T, 2)[0], (p,))


@pytest.mark.parametrize("loss", KINDS, ids=lambda loss: loss.kind)
def test_a_drafter_of_fewer_tokens_learns_what_it_can_say(weight: Tensor, loss: TokenLoss) -> None:
    """What is never drafted has no logit and carries no loss; the rest is held against its own probabilities."""
    p, goal = states()
    kept = torch.tensor([0, 2, 3, 7, 9])
    places = torch.full((V,), -1)
    places[kept] = torch.arange(len(kept))
    said = within(in_float64(goal, weight, 6), places)
    total, agreed = soft_cross_entropy(p, said, lambda x: x @ weight[kept].T, 4, token_loss=loss)
    law, expected = (goal @ weight.T).softmax(-1), p.new_zeros(())
    for i in range(N):
        guess = (p[i] @ weight[kept].T).softmax(-1)
        goals = guess.new_zeros(len(kept))
        for token in law[i].topk(6).indices.tolist():
            if token in kept.tolist():
                goals[kept.tolist().index(token)] = law[i, token]
        accepted = torch.minimum(guess, goals).sum()
        again = torch.zeros_like(goals).index_fill(0, goals.topk(3).indices, 0.5) + 1
        terms = {
            "soft": -(goals * guess.log()).sum(),
            "top-k": -(again * goals * guess.log()).sum(),
            "total-variation": 1 - accepted,
            "log-acceptance": -accepted.log(),
        }
        expected = expected + terms[loss.kind]
    torch.testing.assert_close(total, expected, atol=1e-12, rtol=1e-12)
    slopes = [torch.autograd.grad(one, p)[0] for one in (total, expected)]
    torch.testing.assert_close(slopes[0], slopes[1], atol=1e-12, rtol=1e-11)
    drafted = kept[(p @ weight[kept].T).argmax(-1)]
    assert agreed == (drafted == law.argmax(-1)).sum()


def test_tokens_that_are_never_drafted_are_dropped() -> None:
    said = TopProbs(torch.tensor([[4, 1, 0], [2, 3, 4]]), torch.tensor([[0.5, 0.3, 0.1], [0.6, 0.2, 0.1]]))
    known = within(said, torch.tensor([-1, 0, -1, 1, 2]))
    assert known.ids.tolist() == [[2, 0, -1], [-1, 1, 2]]
    torch.testing.assert_close(known.probs, torch.tensor([[0.5, 0.3, 0.0], [0.0, 0.2, 0.1]]))
    assert torch.equal(said.probs[1], torch.tensor([0.6, 0.2, 0.1]))  # the teacher's own stays as it is


def test_no_logit_above_is_the_argmax() -> None:
    logits, tokens = torch.randn(500, 7), torch.randint(7, (500,))
    assert torch.equal(_is_best(logits, tokens), logits.argmax(-1) == tokens)
    assert _is_best(logits, logits.argmax(-1)).all()
    assert not _is_best(logits, torch.full((500,), -1)).any()


def test_a_position_whose_tokens_are_all_unknown_pulls_nowhere(weight: Tensor) -> None:
    p, _ = states(2)
    said = TopProbs(torch.full((2, 3), -1), torch.zeros(2, 3, dtype=torch.float64))
    total, agreed = soft_cross_entropy(p, said, lambda x: x @ weight.T)
    (slope,) = torch.autograd.grad(total, p)
    assert total == 0 and agreed == 0 and not slope.any()
