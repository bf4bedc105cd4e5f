"""Sampling by noise that drafter and target share, so that a seed gives the text of stock `generate` token for token.

`torch.multinomial` draws one token as the arg max of p / e, with e a vector of exponential noise of the generator's.
The noise of a position depends on the seed, the position and the batch, not on the text. So it can be known ahead: the
target's choice at a tree's node is the arg max under the noise of that node's position, a draft is the drafter's own
arg max under the same noise, and a candidate is accepted where both agree, as in greedy decoding. For every value of
the noise what comes out is what plain decoding gives, whatever was drafted; over the noise it has the target's
distribution (the Gumbel-max trick).

Knows generators and probabilities; nothing of trees, drafters or how verdicts are reached.
"""

from __future__ import annotations

import secrets
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from outdraft.core.sampling import Warper, with_greatest

KEPT_BYTES = 256 * 2**20
"""Of noise that is kept; older steps are made again from the generator's state when a row that lags behind asks."""


class Noise:
    """What `torch.multinomial` would draw for a batch of `rows` rows, step by step.

    Args:
        rows: of the batch that stock `generate` would decode together.
        vocab_size: tokens.
        device: of the probabilities.
        seed: as for `torch.manual_seed`; None goes on with torch's own generator of the device.
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
        """`(rows, vocab)` of the step that decides every row's new token of this index."""
        while len(self._states) <= index + 1:
            self._make(len(self._states) - 1)
        if index not in self._steps:
            self._make(index)
        self._steps.move_to_end(index)
        return self._steps[index]

    def leave(self, steps: int) -> None:
        """Put torch's own generator, where the noise is from it, to where stock `generate` leaves it after so many."""
        if self._own is not None:
            if steps:
                self.step(steps - 1)
            self._own.set_state(self._states[steps])

    def _make(self, index: int) -> None:
        self._generator.set_state(self._states[index])
        made = torch.empty(self._shape, device=self._device).exponential_(1, generator=self._generator)
        if index + 1 == len(self._states):
            self._states.append(self._generator.get_state())
        self._steps[index] = made
        if len(self._steps) > self._most:
            self._steps.popitem(last=False)


class Coupled:
    """One row's share of the noise (a `Chance` that accepts nothing by itself), `at` any node of its trees.

    Args:
        noise: of its batch.
        row: its place there.
        decided: its new tokens, a list that grows while it is decoded.
    """

    def __init__(self, noise: Noise, row: int, decided: Sequence[int]):
        self.noise, self._row, self._decided = noise, row, decided

    def at(self, depth: int) -> Tensor:
        """`(vocab,)` noise under which the token after a node this deep below the root is chosen."""
        return self.noise.step(len(self._decided) + depth)[self._row]

    def accept(self, probability: float) -> bool:
        raise NotImplementedError("coupled rows compare choices, they throw no dice")

    def draw(self, dist: Tensor) -> int:
        """The next token of the row."""
        return int(under(dist, self.at(0)))


class Still(Coupled):
    """For greedy rows among coupled ones: a point mass is the same under any noise.

    Args:
        vocab_size: tokens.
        device: of the probabilities.
    """

    def __init__(self, vocab_size: int, device: torch.device):
        self._ones = torch.ones(1, device=device).expand(vocab_size)

    def at(self, depth: int) -> Tensor:
        return self._ones


class Shown(Coupled):
    """Noise that lies ready, one vector for every depth.

    Args:
        noise: `(depths, vocab)`, or of some tokens only.
    """

    def __init__(self, noise: Tensor):
        self.ready = noise

    def at(self, depth: int) -> Tensor:
        return self.ready[depth]


class Narrowed(Coupled):
    """Another's noise of some tokens only.

    Args:
        other: of all tokens.
        tokens: `(kept,)` those.
    """

    def __init__(self, other: Coupled, tokens: Tensor):
        self.other, self.tokens = other, tokens

    def at(self, depth: int) -> Tensor:
        return self.other.at(depth)[self.tokens]


def chance_of(
    warper: Warper, vocab_size: int, device: torch.device, seed: int | None, decided: Sequence[int]
) -> Coupled:
    """A row's share of noise of its own; its text is the same in any company.

    Args:
        warper: of the row.
        vocab_size: tokens.
        device: of the probabilities.
        seed: of the row; a fresh one from the system when None.
        decided: its new tokens, a list that grows while it is decoded.
    """
    if warper.greedy:
        return Still(vocab_size, device)
    return Coupled(Noise(1, vocab_size, device, secrets.randbits(63) if seed is None else seed), 0, decided)


def under(probs: Tensor, noise: Tensor) -> Tensor:
    """`(...)` the tokens chosen of `(..., vocab)` probabilities under noise that broadcasts to them; one past the
    vocabulary where those are NaN, as in `draw_each`."""
    chosen, best = with_greatest(probs / noise)
    return torch.where(best.isnan(), probs.shape[-1], chosen)


def leave_generator(chances: Sequence[Any], tokens: Sequence[Sequence[int]]) -> None:
    """`Noise.leave` of a batch that was decoded, where its rows are coupled.

    Args:
        chances: of the rows.
        tokens: their new ones.
    """
    if chances and isinstance(chances[0], Coupled):
        chances[0].noise.leave(max(map(len, tokens)))


def default_generator(device: torch.device) -> torch.Generator:
    """Torch's own of the device."""
    if device.type == "cpu":
        return torch.default_generator
    return torch.cuda.default_generators[device.index if device.index is not None else torch.cuda.current_device()]
