"""The loss against the paper's equations, written out once more in float64 numpy, position by position."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from outdraft.losses.cross_entropy import soft_cross_entropy
from outdraft.methods.fspad.loss import DrafterLoss, feature_noise
from outdraft.methods.fspad.network import FeatureHead, FeatureHeadConfig

D, V = 8, 13


def drafter(partial_alignment: bool = True, feature_sampling: bool = True) -> FeatureHead:
    torch.manual_seed(1)
    config = FeatureHeadConfig(
        hidden_size=D,
        intermediate_size=12,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        vocab_size=V,
        partial_alignment=partial_alignment,
        feature_sampling=feature_sampling,
    )
    return FeatureHead(config).double()


@pytest.fixture
def batch() -> SimpleNamespace:
    torch.manual_seed(2)
    lengths = [9, 6]
    mask = torch.zeros(2, 9, dtype=torch.bool)
    mask[0, [0, 1, 2, 5, 6, 8]] = True  # 0 and 1 cannot be predicted: no (e, f) pair stands before them
    mask[1, [3, 4, 5]] = True
    return SimpleNamespace(
        lengths=lengths,
        mask=mask,
        embeddings=torch.randn(2, 9, D, dtype=torch.float64),
        features=2 * torch.randn(2, 9, D, dtype=torch.float64),
        weight=torch.randn(V, D, dtype=torch.float64),
    )


def by_the_equations(net: FeatureHead, batch: SimpleNamespace) -> tuple[float, float, int, int]:
    """L_reg, L_cls (means), agreeing positions, positions: one row and one position at a time, without padding."""
    weight = batch.weight.numpy()
    regression, cross_entropy, agreed, positions = 0.0, 0.0, 0, 0
    for row, length in enumerate(batch.lengths):
        for t in range(length - 2):
            if not batch.mask[row, t + 2]:  # x_{t+2} is what f_{t+1} predicts
                continue
            with torch.no_grad():  # causal: everything up to t, the token one ahead of the feature
                out = net(batch.embeddings[row : row + 1, 1 : t + 2], batch.features[row : row + 1, : t + 1])
            p, r = out.p[0, -1].numpy(), out.r[0, -1].numpy()
            goal = batch.features[row, t + 1].numpy()
            difference = np.abs(r - goal)
            regression += np.where(difference < 1, 0.5 * difference**2, difference - 0.5).mean()
            target, draft = weight @ goal, weight @ p
            law = np.exp(target - target.max())
            law /= law.sum()
            log_draft = draft - draft.max() - np.log(np.exp(draft - draft.max()).sum())
            cross_entropy -= float((law * log_draft).sum())
            agreed += int(target.argmax() == draft.argmax())
            positions += 1
    return regression / positions, cross_entropy / positions, agreed, positions


@pytest.mark.parametrize("chunk_size", [1, 3, 512])
@pytest.mark.parametrize("partial_alignment", [True, False])
def test_loss_matches_the_equations(batch: SimpleNamespace, chunk_size: int, partial_alignment: bool) -> None:
    net = drafter(partial_alignment)
    sums = DrafterLoss(net, lambda x: x @ batch.weight.T, chunk_size)(batch.embeddings, batch.features, batch.mask)
    regression, cross_entropy, agreed, positions = by_the_equations(net, batch)
    assert positions == 7 == int(sums.positions)
    assert sums.regression.item() / positions == pytest.approx(regression, abs=1e-12)
    assert sums.token.item() / positions == pytest.approx(cross_entropy, abs=1e-12)
    assert int(sums.agreed) == agreed


def test_what_stands_on_padding_changes_nothing(batch: SimpleNamespace) -> None:
    net = drafter()
    loss = DrafterLoss(net, lambda x: x @ batch.weight.T)
    before = loss(batch.embeddings, batch.features, batch.mask)
    batch.features[1, 6:] = 1e3
    batch.embeddings[1, 6:] = -1e3
    assert all(
        torch.equal(a, b) for a, b in zip(before, loss(batch.embeddings, batch.features, batch.mask), strict=True)
    )


def test_gradients_are_the_plain_ones_and_reach_only_the_drafter(batch: SimpleNamespace) -> None:
    net = drafter()
    weight = batch.weight.requires_grad_()
    features, embeddings = batch.features.requires_grad_(), batch.embeddings.requires_grad_()

    def plain() -> Tensor:
        counted = batch.mask[:, 2:]
        out = net(embeddings[:, 1:-1], features[:, :-2])
        goal = features.detach()[:, 1:-1][counted]
        law = (goal @ batch.weight.detach().T).softmax(-1)
        log_draft = (out.p[counted] @ batch.weight.detach().T).log_softmax(-1)
        regression = torch.nn.functional.smooth_l1_loss(out.r[counted], goal, reduction="none").mean(-1).sum()
        return regression - 0.1 * (law * log_draft).sum()

    expected = torch.autograd.grad(plain(), list(net.parameters()))
    sums = DrafterLoss(net, lambda x: x @ weight.T, chunk_size=2)(embeddings.detach(), features.detach(), batch.mask)
    (sums.regression + 0.1 * sums.token).backward()
    for (name, parameter), gradient in zip(net.named_parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-12, rtol=1e-12, msg=name)
    assert weight.grad is None and features.grad is None and embeddings.grad is None


def test_partial_alignment_keeps_the_two_losses_apart(batch: SimpleNamespace) -> None:
    net = drafter()
    sums = DrafterLoss(net, lambda x: x @ batch.weight.T)(batch.embeddings, batch.features, batch.mask)
    (for_p,) = torch.autograd.grad(sums.token, net.down_proj.weight, retain_graph=True)
    (for_r,) = torch.autograd.grad(sums.regression, net.down_proj.weight)
    assert for_p[:D].abs().min() > 0 and for_p[D:].abs().max() == 0
    assert for_r[D:].abs().min() > 0 and for_r[:D].abs().max() == 0


def test_unrolled_steps_see_what_decoding_sees(batch: SimpleNamespace) -> None:
    net = drafter()

    def head(x: Tensor) -> Tensor:
        return x @ batch.weight.T

    regression, cross_entropy = [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]
    with torch.no_grad():
        for row, length in enumerate(batch.lengths):
            for t in range(length - 2):
                for step in range(3):
                    if t < step or not batch.mask[row, t + 2]:
                        continue
                    read = batch.features[row : row + 1, : t - step + 1]
                    out = net(batch.embeddings[row : row + 1, 1 : t - step + 2], read)
                    for drafted in range(step):  # one token more, and the drafter's own feature for it
                        read = torch.cat([read, out.r[:, -1:]], dim=1)
                        out = net(batch.embeddings[row : row + 1, 1 : t - step + 3 + drafted], read)
                    goal = batch.features[row, t + 1]
                    regression[step] += torch.nn.functional.smooth_l1_loss(out.r[0, -1], goal).item()
                    cross_entropy[step] -= (head(goal).softmax(-1) * head(out.p[0, -1]).log_softmax(-1)).sum().item()
    sums = DrafterLoss(net, head, unroll_steps=3)(batch.embeddings, batch.features, batch.mask)
    weights = np.array([1, 0.8, 0.64]) / 2.44
    assert sums.regression.item() == pytest.approx(np.dot(weights, regression), rel=1e-10)
    assert sums.token.item() == pytest.approx(np.dot(weights, cross_entropy), rel=1e-10)
    assert sums.positions == 7


def test_every_draft_step_costs_one_forward(batch: SimpleNamespace) -> None:
    net, tokens = drafter(), []
    net.register_forward_hook(lambda _, inputs, __: tokens.append(inputs[0].shape[1]))
    DrafterLoss(net, lambda x: x @ batch.weight.T, unroll_steps=4)(batch.embeddings, batch.features, batch.mask)
    assert tokens == [7] * 4


def test_token_loss_passes_gradcheck() -> None:
    torch.manual_seed(3)
    p, goal = torch.randn(5, D, dtype=torch.float64, requires_grad=True), torch.randn(5, D, dtype=torch.float64)
    weight = torch.randn(V, D, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: soft_cross_entropy(x, goal, lambda y: y @ weight.T, 2)[0], (p,))


def test_logits_of_all_positions_are_never_held_at_once() -> None:
    seen: list[int] = []

    def head(x: Tensor) -> Tensor:
        seen.append(len(x))
        return x @ torch.ones(D, V)

    soft_cross_entropy(torch.randn(10, D, requires_grad=True), torch.randn(10, D), head, chunk_size=4)
    assert max(seen) == 4 and sum(seen) == 20


def test_noise_is_the_published_one_and_independent_of_the_batch() -> None:
    noise = feature_noise([400, 64], 50, 500, seeds=[5, 6], device="cpu")
    assert noise.shape == (2, 500, 50) and noise[0, 400:].abs().max() == 0 and noise[1, 64:].abs().max() == 0
    for row, length in enumerate((400, 64)):
        bound = 0.5 * 0.2 * 512 / length
        drawn = noise[row, :length]
        assert 0.99 * bound < drawn.abs().max() <= bound
        assert drawn.std().item() == pytest.approx(bound / 3**0.5, rel=0.03)
        assert drawn.mean().item() == pytest.approx(0, abs=0.03 * bound)
    alone = feature_noise([64], 50, 64, seeds=[6], device="cpu")
    assert alone[0].equal(noise[1, :64])


def test_noise_is_added_to_what_is_read_and_not_to_the_goal(batch: SimpleNamespace) -> None:
    net = drafter()
    loss = DrafterLoss(net, lambda x: x @ batch.weight.T)
    noise = torch.randn_like(batch.features)
    clean, noisy = (loss(batch.embeddings, batch.features, batch.mask, n) for n in (None, noise))
    assert clean.regression != noisy.regression
    noise[:, :-2] = 0  # the two last features are goals only
    assert torch.equal(clean.regression, loss(batch.embeddings, batch.features, batch.mask, noise).regression)
