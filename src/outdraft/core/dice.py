"""The sources of all random decisions in drafting and verification, and how they draw a token.

Callers pass them in, so a test can replace them by an exhaustive enumeration. That proves losslessness where random
trials would only observe it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from outdraft.core.tensors import sent

BLOCK = 512
"""Tokens whose probabilities are summed at once when a token is drawn."""


class Chance(Protocol):
    """The source of all random decisions in drafting and verification of one row."""

    def accept(self, probability: float) -> bool:
        """Return True with this probability."""

    def draw(self, dist: Tensor) -> int:
        """Draw an index from `(vocab,)` probabilities, which need not be normalised."""


class Dice:
    """Random decisions from a seeded generator. It is always on the CPU, so that no draw waits for a device's numbers.

    Args:
        seed: seed of this row's generator; None takes a fresh one from the system.
    """

    def __init__(self, seed: int | None = None):
        self.generator = torch.Generator()
        if seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(seed)

    def uniform(self) -> float:
        """Return the next number in [0, 1)."""
        return torch.rand((), dtype=torch.float64, generator=self.generator).item()

    def accept(self, probability: float) -> bool:
        if probability <= 0 or probability >= 1:  # certain: no draw is spent
            return probability >= 1
        return self.uniform() < probability

    def draw(self, dist: Tensor) -> int:
        return int(draw_each([self], dist[None]))


class Thrown:
    """Random numbers drawn ahead, in the order in which `Dice` would draw them, and kept on the device.

    Args:
        shares: `(throws,)` numbers in [0, 1), float64.
    """

    def __init__(self, shares: Tensor):
        self.shares, self._next = shares, 0

    def share(self) -> Tensor:
        """Return the next number, as a scalar tensor."""
        self._next += 1
        return self.shares[self._next - 1]

    def accept(self, probability: float) -> bool:
        raise NotImplementedError("what was thrown ahead only draws")

    def draw(self, dist: Tensor) -> int:
        return int(draw_each([self], dist[None]))


def draw_each(chances: Sequence[Chance], probs: Tensor) -> Tensor:
    """Draw one token from each of the `(rows, vocab)` distributions, with each row's own random numbers; `(rows,)`.

    A distribution is NaN if its logits were not finite. Its token is one past the vocabulary, so that the caller learns
    of it from the token, with no further transfer from a device.
    """
    if all(isinstance(chance, Thrown) for chance in chances):
        return at_shares(torch.stack([thrown.share() for thrown in chances]), probs)  # type: ignore[attr-defined]
    if not all(isinstance(chance, Dice) for chance in chances):
        drawn = [chance.draw(dist) for chance, dist in zip(chances, probs, strict=True)]
        return torch.tensor(drawn, device=probs.device)
    thrown = [dice.uniform() for dice in chances]  # type: ignore[attr-defined]
    return at_shares(sent(thrown, probs.device, torch.float64), probs)


def at_shares(shares: Tensor, probs: Tensor) -> Tensor:
    """Return the `(rows,)` first tokens where cumulative `(rows, vocab)` probabilities exceed `(rows,)` shares.

    Sums are float64, so that no token of positive probability is lost. The share is kept below the whole sum, which
    rounding could otherwise reach.
    """
    if probs.device.type != "cpu":
        return at_shares_by_blocks(shares, probs)
    upto = probs.cumsum(-1, dtype=torch.float64)
    return _reached(upto, shares[:, None] * upto[:, -1:])[0][:, 0]


def at_shares_by_blocks(shares: Tensor, probs: Tensor) -> Tensor:
    """Compute `at_shares` in two steps: find the block of tokens, then the token in it. A GPU adds in parallel but
    makes running sums serially, which took 1.4 ms over 8 distributions of 128,256 tokens."""
    rows, vocab = probs.shape
    full = vocab // BLOCK * BLOCK
    sums = probs[:, :full].reshape(rows, -1, BLOCK).sum(-1, dtype=torch.float64)
    if full < vocab:
        sums = torch.cat([sums, probs[:, full:].sum(-1, keepdim=True, dtype=torch.float64)], dim=1)
    upto = sums.cumsum(-1)
    block, wanted = _reached(upto, shares[:, None] * upto[:, -1:])
    block = block.clamp(max=sums.shape[1] - 1)  # the index of a NaN distribution is past the last block
    before = (upto - sums).gather(1, block)
    indices = block * BLOCK + torch.arange(BLOCK, device=probs.device)
    inside = probs.gather(1, indices.clamp(max=vocab - 1)) * (indices < vocab)
    token, _ = _reached(inside.cumsum(-1, dtype=torch.float64), (wanted - before).clamp(min=0))
    return (block * BLOCK + token)[:, 0]


def _reached(upto: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Return the `(rows, 1)` first index whose running sum `(rows, n)` exceeds `wanted`, and the clipped `wanted`."""
    whole = upto[:, -1:]
    wanted = torch.minimum(wanted, whole.nextafter(torch.zeros_like(whole)))
    return torch.searchsorted(upto, wanted, right=True), wanted
