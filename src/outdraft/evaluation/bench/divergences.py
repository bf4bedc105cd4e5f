"""The divergences of greedy texts from plain decoding's, each judged as a near-tie or a defect.

In low precision a forward over many tokens rounds differently from one over a single token, so that texts can diverge
where the two best tokens are nearly equal. A divergence is called a tie only if the gap lies within that measured
noise. Gaps and noise come from the stock model's own forward (`audit/stock.py`), which uses no cache, tree or mask of
outdraft.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from outdraft.data.text import common_length
from outdraft.evaluation.audit.stock import Noise, StockProbs, measured_noise, stock_logits
from outdraft.evaluation.bench.measure import Run, Script, script_of
from outdraft.target.target import Target

NOISE_TEXTS = 8
"""The number of plain texts with a divergence over which rounding is measured, as many as in the audit."""


@dataclass(frozen=True)
class Difference:
    """Two different texts after one prompt."""

    prompt: int
    """The prompt's number, from 0."""
    ids: list[int]
    """The prompt's token ids."""
    plain: list[int]
    """The new tokens of plain decoding."""
    other: list[int]
    turn: int = 0
    """The turn of the conversation, from 0."""

    @property
    def position(self) -> int:
        """The index of the first new token that differs; the shorter text's length where that text ends."""
        return common_length(self.plain, self.other)


@dataclass(frozen=True)
class Divergence:
    """The divergence of a text from the plain one."""

    prompt: int
    """The prompt's number, from 0."""
    position: int
    """The new token's number, from 0."""
    gap: float
    """The plain choice's logit less the other's, by one-token forwards; nan where one text ends."""
    noise: float
    """The largest change of such a gap by rounding alone."""
    turn: int = 0
    """The turn of the conversation, from 0."""

    @property
    def tie(self) -> bool:
        """True if the gap lies within the noise: rounding, not a defect. A plain choice that is far from the stock
        model's (a negative gap) is a defect as well."""
        return abs(self.gap) <= self.noise

    def as_dict(self) -> dict[str, float | int | bool]:
        return {
            "prompt": self.prompt,
            "turn": self.turn,
            "position": self.position,
            "logit_gap": self.gap,
            "noise": self.noise,
            "tie": self.tie,
        }


@torch.inference_mode()
def divergences(target: Target, differences: Sequence[Difference]) -> list[Divergence]:
    """Judge differing texts, all against the same noise.

    Args:
        differences: differences of all prompts and contenders; those from one plain text share one run over it.

    Returns:
        One divergence for every difference, in their order.
    """
    leaving: dict[tuple[int, int], list[int]] = defaultdict(list)
    for index, one in enumerate(differences):
        leaving[one.prompt, one.turn].append(index)
    left = [differences[indices[0]] for indices in leaving.values()]
    few = left[:NOISE_TEXTS]
    probs = StockProbs(target, {}, warped=False)
    noise = measured_noise(probs, [one.ids for one in few], [one.plain for one in few], lambda: None)
    found: dict[int, Divergence] = {}
    for text, indices in zip(left, leaving.values(), strict=True):
        positions = {differences[index].position for index in indices}
        steps = stock_logits(target, text.ids, [text.plain[: max(positions)]])
        logits = {position: row[0] for position, row in enumerate(steps) if position in positions}
        for index in indices:
            one = differences[index]
            found[index] = _judged(one, logits[one.position], noise)
    return [found[index] for index in range(len(differences))]


def _judged(one: Difference, logits: Tensor, noise: Noise) -> Divergence:
    """Judge one difference by the `(vocab,)` logits of one-token forwards where it begins."""
    place = one.position
    if place == min(len(one.plain), len(one.other)):
        return Divergence(one.prompt, place, math.nan, noise.gap, one.turn)
    own, other = logits[one.plain[place]], logits[one.other[place]]
    # The model hands logits over rounded to its precision. Sums that differ by next to nothing can round to adjacent
    # numbers, so a gap of one unit in the last place is no evidence of anything, even where the few positions measured
    # happened to round alike. In float32 that unit is a ten-millionth of the logit: it excuses no defect there.
    noise_here = max(noise.gap, last_place(max(abs(float(own)), abs(float(other))), logits.dtype))
    return Divergence(one.prompt, place, float(own) - float(other), noise_here, one.turn)


def last_place(magnitude: float, dtype: torch.dtype) -> float:
    """Return the distance of neighbouring numbers of this size and precision; 0.0625 at 8 to 16 in bfloat16."""
    return math.ldexp(torch.finfo(dtype).eps, math.frexp(magnitude)[1] - 1)


def divergences_by_method(
    target: Target, prompts: Sequence[list[int] | Script], plain: Sequence[Run], others: Mapping[str, Sequence[Run]]
) -> dict[str, list[Divergence]]:
    """Return divergences by contender: one for every conversation whose answers differ, in its first such turn.

    Repetition 0 stands for all. All contenders are judged together, against the same noise.
    """
    differing = {
        name: [
            one
            for base, own in zip(plain, runs, strict=True)
            if base.repetition == 0 and (one := difference(prompts[base.prompt], base, own)) is not None
        ]
        for name, runs in others.items()
    }
    judged = iter(divergences(target, [one for found in differing.values() for one in found]))
    return {name: [next(judged) for _ in found] for name, found in differing.items()}


def difference(prompt: list[int] | Script, base: Run, own: Run) -> Difference | None:
    """Return the difference in the first turn whose answers differ; None without one."""
    texts: list[list[int]] = []
    for turn, (expected, said) in enumerate(zip(base.answers, own.answers, strict=False)):
        if expected.tokens != said.tokens:
            ids = script_of(prompt)(texts)
            assert ids is not None
            return Difference(base.prompt, ids, expected.tokens, said.tokens, turn)
        texts.append(expected.tokens)
    return None
