"""Greedy texts, token for token: drafted against plain, and every difference held against the measured noise.

A difference is a tie only if the logit gap there, by one-token forwards of the stock model, lies within the noise of
this model, precision and backend. Such ties must also be no more frequent than that noise causes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from outdraft.api.generation import SpeculativeModel
from outdraft.core.statistics import Statistics
from outdraft.data.text import common_length
from outdraft.evaluation.audit.findings import Finding
from outdraft.evaluation.audit.stock import Noise, StockProbs, log_ratio

BATCH = 8
"""The number of prompts decoded in a batch: rows of different lengths are part of the check."""

MORE = 3.0
"""The largest ratio of the frequency of ties to that of flips among the stock model's own forwards."""


@dataclass(frozen=True)
class TokenDivergence:
    """A token that differs from plain decoding's choice after the same text."""

    prompt: int
    """The number of the prompt, from 0."""
    position: int
    """The new token's number, from 0."""
    expected: int | None
    found: int | None
    """The token found; None where the text ends, as for `expected`."""
    gap: float
    """The processed logit of the expected token less the found one's, by one-token forwards of the stock model."""
    noise: float
    """The largest change of such a gap by rounding."""

    @property
    def tie(self) -> bool:
        return self.gap <= self.noise  # nan is no tie

    def as_dict(self) -> dict[str, Any]:
        return {
            "prompt": self.prompt,
            "position": self.position,
            "expected": self.expected,
            "found": self.found,
            "logit_gap": self.gap,
            "noise": self.noise,
            "tie": self.tie,
        }

    def line(self) -> str:
        what = "near-tie" if self.tie else "BUG"
        return (
            f"prompt {self.prompt + 1}, token {self.position + 1}: {self.found} instead of {self.expected}, "
            f"logit gap {self.gap:.3g}, noise {self.noise:.3g}: {what}"
        )


def texts(
    model: SpeculativeModel, prompts: Sequence[list[int]], generation: dict[str, Any], advance: Callable[[int], None]
) -> tuple[list[list[int]], Statistics]:
    """Decode the new tokens of all prompts, a batch at a time."""
    found: list[list[int]] = []
    parts = []
    for start in range(0, len(prompts), BATCH):
        batch = list(prompts[start : start + BATCH])
        output = model.generate(batch, **generation)
        found += output.tokens
        parts.append(output.statistics)
        advance(len(batch))
    return found, Statistics.sum(parts)


@torch.inference_mode()
def token_divergences(
    probs: StockProbs, prompt: list[int], text: list[int], number: int, noise: Noise
) -> list[TokenDivergence]:
    """List all tokens of the text that differ from the stock model's choice after the text up to there."""
    found = []
    for place, (dist,) in enumerate(probs.along(prompt, [text])):
        if dist is not None and (best := int(dist.argmax())) != text[place]:
            gap = log_ratio(dist, best, text[place])
            found.append(TokenDivergence(number, place, best, text[place], gap, noise.gap))
    return found


def first_difference(
    probs: StockProbs, prompt: list[int], plain: list[int], other: list[int], number: int, noise: Noise
) -> TokenDivergence:
    """Return the first divergence of two texts, whichever of them left the stock model's choice."""
    place = common_length(plain, other)
    expected = plain[place] if place < len(plain) else None
    found = other[place] if place < len(other) else None
    gap = math.nan
    if expected is not None and found is not None:
        gap = abs(log_ratio(probs.after(prompt, [plain[:place]])[0], expected, found))
    return TokenDivergence(number, place, expected, found, gap, noise.gap)


def too_many(ties: int, tokens: int, flips: int, compared: int) -> float:
    """Return the binomial tail P(`ties` or more) if ties were `MORE` times as frequent as flips of the stock model."""
    if ties == 0 or compared == 0:
        return 1.0
    share = MORE * tokens / (MORE * tokens + compared)
    total = ties + flips
    return sum(math.comb(total, k) * share**k * (1 - share) ** (total - k) for k in range(ties, total + 1))


def greedy_finding(
    probs: StockProbs,
    prompts: Sequence[list[int]],
    plain: Sequence[list[int]],
    drafted: Sequence[list[int]],
    statistics: Statistics,
    noise: Noise,
    alpha: float,
    advance: Callable[[int], None],
) -> Finding:
    """Compare all texts.

    Args:
        probs: unwarped target probabilities of the greedy settings.
        plain, drafted: each decoder's new tokens of every prompt.
        alpha: level of the test for too many ties.
    """
    found: list[TokenDivergence] = []
    differing = 0
    for number, (prompt, own, other) in enumerate(zip(prompts, plain, drafted, strict=True)):
        if own != other:
            differing += 1
            first = first_difference(probs, prompt, own, other, number, noise)
            later = token_divergences(probs, prompt, other, number, noise)
            found += [first, *(one for one in later if one.position != first.position)]
        advance(1)
    question = "Does greedy decoding give the text of plain decoding?"
    counts = {"prompts": len(prompts), "identical": len(prompts) - differing, "tokens": sum(map(len, drafted))}
    return equality_finding("greedy", question, counts, found, statistics, noise, alpha)


def equality_finding(
    name: str,
    question: str,
    counts: dict[str, int],
    found: Sequence[TokenDivergence],
    statistics: Statistics,
    noise: Noise,
    alpha: float,
) -> Finding:
    """Judge texts that must be equal but for near-ties.

    Args:
        counts: numbers of texts, of identical ones and of tokens, in this order, by their keys in the figures.
        alpha: level of the test for too many ties.
    """
    total, exact, tokens = counts.values()
    bugs = [one for one in found if not one.tie]
    chance = too_many(len(found) - len(bugs), tokens, noise.flips, noise.positions)
    evidence = f"{exact} of {total} texts are token-exact ({tokens} tokens, tau {statistics.tau:.2f})"
    if found:
        evidence += f"; {len(found)} tokens differ, {len(found) - len(bugs)} of them near-ties within the noise"
    if chance < alpha:
        evidence += f"; so many near-ties are not explained by noise (p = {chance:.2g})"
    return Finding(
        name,
        question,
        not bugs and chance >= alpha,
        evidence + drafting(statistics) + ".",
        figures={
            **counts,
            "divergences": [one.as_dict() for one in found],
            "bugs": len(bugs),
            "noise": asdict(noise),
            "too_many_ties_p": chance,
            "drafting": statistics.as_dict(),
        },
        lines=[one.line() for one in sorted(found, key=lambda one: one.tie)],
    )


def plain_finding(
    probs: StockProbs,
    prompts: Sequence[list[int]],
    plain: Sequence[list[int]],
    noise: Noise,
    advance: Callable[[int], None],
) -> Finding:
    """Check that plain decoding, the baseline of all checks, is the stock model's."""
    found = []
    for number, (prompt, text) in enumerate(zip(prompts, plain, strict=True)):
        found += token_divergences(probs, prompt, text, number, noise)
        advance(1)
    tokens = sum(len(text) for text in plain)
    bugs = [one for one in found if not one.tie]
    return Finding(
        "plain",
        "Is plain decoding, which all else is compared with, the stock model's own choice token by token?",
        not bugs,
        f"{tokens - len(found)} of {tokens} tokens are the stock model's best; {len(found) - len(bugs)} near-ties.",
        figures={"tokens": tokens, "divergences": [one.as_dict() for one in found], "bugs": len(bugs)},
        lines=[one.line() for one in found],
    )


def drafting(statistics: Statistics) -> str:
    """Return a remark where drafts were all absent, rejected or accepted, so that the check is weak."""
    if statistics.drafted == 0:
        return "; nothing was drafted, so nothing of the drafter was seen"
    if statistics.accepted == 0:
        return "; no candidate was accepted, so only rejections were seen"
    if statistics.accepted == statistics.drafted:
        return "; no candidate was rejected, so only acceptances were seen"
    return ""
