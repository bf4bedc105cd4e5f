"""Sampling by noise that drafter and target share, so that a seed gives the text of stock `generate` token for token.

`torch.multinomial` draws a token as the arg max of p / e, with e a vector of exponential noise from the generator. The
noise of a position depends on the seed, the position and the batch, not on the text, so it can be known ahead. The
target's choice at a tree node is the arg max under the noise of that node's position. A draft is the drafter's own arg
max under the same noise. A candidate is accepted where both agree, as in greedy decoding. For every value of the noise
the output is that of plain decoding, whatever was drafted. Over the noise it has the target's distribution (the
Gumbel-max trick).

This module handles generators and probabilities; trees and verdicts are elsewhere.
"""

from __future__ import annotations

import secrets
from collections import OrderedDict
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from outdraft.core.sampling import Warper, with_greatest

KEPT_BYTES = 256 * 2**20
"""Bytes of noise that are kept. If a lagging row asks for older steps, the generator's state makes them again."""


class Noise:
    """The noise that `torch.multinomial` would draw for a batch of `rows` rows, step by step.

    Args:
        rows: number of rows that stock `generate` would decode together.
        seed: as for `torch.manual_seed`; None continues torch's own generator of the device.
    """

    def __init__(self, rows: int, vocab_size: int, device: torch.device, seed: int | None = None):
        self._own = None if seed is not None else default_generator(device)
        self._generator = torch.Generator(device=device)
        if self._own is None:
            self._generator.manual_seed(seed)  # type: ignore[arg-type]
        else:
            self._generator.set_state(self._own.get_state())
        self._states = [self._generator.get_state()]  # before every step so far, and before the next
        self._shape, self._device = (rows, vocab_size), device
        self._steps: OrderedDict[int, Tensor] = OrderedDict()
        self._most = max(8, KEPT_BYTES // (4 * rows * vocab_size))

    def step(self, index: int) -> Tensor:
        """Return the `(rows, vocab)` noise of the step that decides every row's new token `index`."""
        while len(self._states) <= index + 1:
            self._make(len(self._states) - 1)
        if index not in self._steps:
            self._make(index)
        self._steps.move_to_end(index)
        return self._steps[index]

    def leave(self, steps: int) -> None:
        """Set torch's own generator, if the noise is from it, to its state after `steps` steps of `generate`."""
        if self._own is not None:
            if steps:
                self.step(steps - 1)
            self._own.set_state(self._states[steps])

    def _make(self, index: int) -> None:
        self._generator.set_state(self._states[index])
        made = exponential(self._shape, self._generator)
        if index + 1 == len(self._states):
            self._states.append(self._generator.get_state())
        self._steps[index] = made
        if len(self._steps) > self._most:
            self._steps.popitem(last=False)


def exponential(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Return what `torch.empty(shape).exponential_()` draws, which on a CPU takes three times as long."""
    if generator.device.type == "cpu" and _by_uniform_numbers():
        return _from_uniform(shape, generator)
    return torch.empty(shape, dtype=torch.float32, device=generator.device).exponential_(1, generator=generator)


def _from_uniform(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    drawn = torch.empty(shape, dtype=torch.float64).uniform_(generator=generator)
    return drawn.neg_().log1p_().neg_().float()


@cache
def _by_uniform_numbers() -> bool:
    """Return True if this torch makes exponential numbers on a CPU from uniform ones, as `_from_uniform` does."""
    own, stock = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
    shapes: list[tuple[int, ...]] = [(1, 4099), (3, 5)]
    same = all(torch.equal(_from_uniform(s, own), torch.empty(s).exponential_(generator=stock)) for s in shapes)
    return same and torch.equal(own.get_state(), stock.get_state())


class Coupled:
    """One row's share of the noise: a `Chance` with noise for every node, which accepts nothing itself.

    Args:
        noise: noise of the row's batch.
        row: index of the row in that batch.
        decided: new tokens of the row, a list that grows while the row is decoded.
    """

    def __init__(self, noise: Noise, row: int, decided: Sequence[int]):
        self.noise, self._row, self._decided = noise, row, decided

    def at(self, depth: int) -> Tensor:
        """Return the `(vocab,)` noise that chooses the token after a node `depth` levels below the root."""
        return self.noise.step(len(self._decided) + depth)[self._row]

    def accept(self, probability: float) -> bool:
        raise NotImplementedError("coupled rows compare choices, they throw no dice")

    def draw(self, dist: Tensor) -> int:
        """Choose the next token of the row from `(vocab,)` probabilities."""
        return int(under(dist, self.at(0)))


class Still(Coupled):
    """Noise of greedy rows among coupled ones: all ones, because a point mass is the same under any noise."""

    def __init__(self, vocab_size: int, device: torch.device):
        self._ones = torch.ones(1, device=device).expand(vocab_size)

    def at(self, depth: int) -> Tensor:
        return self._ones


class Shown(Coupled):
    """Noise computed beforehand, one vector for every depth.

    Args:
        noise: `(depths, vocab)`, or `(depths, kept)` for some tokens only.
    """

    def __init__(self, noise: Tensor):
        self.ready = noise

    def at(self, depth: int) -> Tensor:
        return self.ready[depth]


class Narrowed(Coupled):
    """Another row's noise, restricted to some tokens.

    Args:
        other: noise of all tokens.
        tokens: `(kept,)` ids of those tokens.
    """

    def __init__(self, other: Coupled, tokens: Tensor):
        self.other, self.tokens = other, tokens

    def at(self, depth: int) -> Tensor:
        return self.other.at(depth)[self.tokens]


def chance_of(
    warper: Warper, vocab_size: int, device: torch.device, seed: int | None, decided: Sequence[int]
) -> Coupled:
    """Make noise for one row, so that its text does not depend on the batch.

    Args:
        seed: seed of the row; None takes a fresh one from the system.
        decided: new tokens of the row, a list that grows while the row is decoded.
    """
    if warper.greedy:
        return Still(vocab_size, device)
    return Coupled(Noise(1, vocab_size, device, secrets.randbits(63) if seed is None else seed), 0, decided)


def under(probs: Tensor, noise: Tensor) -> Tensor:
    """Return the `(...)` tokens that noise chooses of `(..., vocab)` probabilities; the noise broadcasts to them. Where
    the probabilities are NaN, the result is one past the vocabulary, as in `draw_each`."""
    chosen, best = with_greatest(probs / noise)
    return torch.where(best.isnan(), probs.shape[-1], chosen)


def noise_of(chances: Sequence[Coupled], depths: int) -> Tensor:
    """Return the `(rows, depths, vocab)` noise of the nodes down to that depth, in one operation of the device."""
    return torch.stack([chance.at(depth) for chance in chances for depth in range(depths)]).unflatten(0, (-1, depths))


def leave_generator(chances: Sequence[Any], tokens: Sequence[Sequence[int]]) -> None:
    """Call `Noise.leave` for a batch that was decoded, if its rows are coupled."""
    if chances and isinstance(chances[0], Coupled):
        chances[0].noise.leave(max(map(len, tokens)))


def default_generator(device: torch.device) -> torch.Generator:
    """Return torch's own generator of the device."""
    if device.type == "cpu":
        return torch.default_generator
    return torch.cuda.default_generators[device.index if device.index is not None else torch.cuda.current_device()]
