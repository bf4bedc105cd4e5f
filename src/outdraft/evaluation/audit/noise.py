"""What rounding does to this model, in this precision, on this backend: one token a forward against many.

Measured on the stock model alone (`stock.py`): neither the drafter, nor trees, nor our cache or masks take part. A
wrong mask or position therefore cannot pass for noise, however many texts it changes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from outdraft.evaluation.audit.stock import Laws

SEVERAL = 8
"""Tokens of a forward that stands for verifying a tree."""


@dataclass
class Noise:
    """Differences between one-token forwards and forwards over several tokens and over the whole text.

    Attributes:
        positions: token positions compared, each with both kinds of forward.
        gap: largest change of the logit gap between a position's two best tokens.
        gap_mean: the mean change.
        variation: largest total variation between the two laws of a position (temperature 1, no filter).
        variation_mean: the mean.
        flips: positions at which the best token differs.
    """

    positions: int = 0
    gap: float = 0.0
    gap_mean: float = 0.0
    variation: float = 0.0
    variation_mean: float = 0.0
    flips: int = 0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def add(self, single: Tensor, other: Tensor) -> None:
        """Compare the `(vocab,)` laws of one position."""
        gap = abs(log_ratio(single, *best_two(single)) - log_ratio(other, *best_two(single)))
        variation = total_variation(single, other)
        self.gap, self.variation = max(self.gap, gap), max(self.variation, variation)
        self.gap_mean += (gap - self.gap_mean) / (self.positions + 1)
        self.variation_mean += (variation - self.variation_mean) / (self.positions + 1)
        self.flips += int(single.argmax() != other.argmax())
        self.positions += 1


@torch.inference_mode()
def measured_noise(
    laws: Laws, prompts: Sequence[list[int]], texts: Sequence[list[int]], advance: Callable[[], None]
) -> Noise:
    """Over every position of these greedy texts."""
    noise = Noise()
    for prompt, text in zip(prompts, texts, strict=True):
        single = [step[0] for step in laws.along(prompt, [text])]
        for piece in (SEVERAL, None):
            for one, (other,) in zip(single, laws.along(prompt, [text], piece), strict=True):
                if one is not None and other is not None:
                    noise.add(one, other)
        advance()
    return noise


def best_two(law: Tensor) -> tuple[int, int]:
    first, second = law.topk(2).indices.tolist()
    return first, second


def log_ratio(law: Tensor, one: int, other: int) -> float:
    """log p(one) / p(other): the gap of their processed logits; infinite where `other` is ruled out."""
    law = law.double()
    return float(law[one].log() - law[other].log())


def total_variation(one: Tensor, other: Tensor) -> float:
    """Half the absolute differences of two `(vocab,)` laws."""
    return float((one.double() - other.double()).abs().sum() / 2)
