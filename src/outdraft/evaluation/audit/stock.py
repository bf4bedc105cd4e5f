"""The stock model's own forward over one token, several or all at once: the reference of all checks.

Positions, masks and the cache are those of `transformers`; of outdraft's code only the backend's linears and the
target's head take part, so nothing that is under test can vouch for itself. The rounding noise of a model, precision
and backend is the difference between these forwards, so neither a wrong mask nor a wrong position can pass for noise.

On quantised weights of our own the model is what the kernels compute: they round inputs, too, which stock modules on
the same weights do not. There the reference is the target's own forward over each whole text, without drafts and trees.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from outdraft.api.settings import model_settings, sampling_settings
from outdraft.core.sampling import Warper
from outdraft.target.backends import QUANTISED
from outdraft.target.runner import ModelRunner
from outdraft.target.target import Target


@torch.inference_mode()
def stock_logits(
    target: Target, prompt: Sequence[int], texts: Sequence[Sequence[int]], piece: int | None = 1
) -> Iterator[Tensor]:
    """Yield `(texts, vocab)` logits after the prompt, then after every further token of the texts.

    Args:
        prompt: the same for all texts.
        texts: texts of any lengths; logits past a text's own end are meaningless.
        piece: tokens a forward. 1 is how plain decoding goes: the prompt whole, then token by token. More run the
            prompt in such pieces too, and None everything at once without a cache.
    """
    inner: Any = target.model.base_model
    longest = max(len(text) for text in texts)
    rows = torch.tensor([list(text) + [0] * (longest - len(text)) for text in texts], dtype=torch.long)
    rows = rows.view(len(texts), longest).to(target.device)
    first = torch.tensor([list(prompt)] * len(texts), device=target.device)
    if piece is None:
        features = inner(input_ids=torch.cat([first, rows], dim=1), use_cache=False).last_hidden_state
        for place in range(len(prompt) - 1, len(prompt) + longest):
            yield target.head(features[:, place])
        return
    output = inner(input_ids=first[:, : None if piece == 1 else piece], use_cache=True)
    for start in range(len(prompt) if piece == 1 else piece, len(prompt), piece):
        output = inner(
            input_ids=first[:, start : start + piece], past_key_values=output.past_key_values, use_cache=True
        )
    yield target.head(output.last_hidden_state[:, -1])
    for start in range(0, longest, piece):
        output = inner(input_ids=rows[:, start : start + piece], past_key_values=output.past_key_values, use_cache=True)
        for place in range(output.last_hidden_state.shape[1]):
            yield target.head(output.last_hidden_state[:, place])


@torch.inference_mode()
def own_logits(target: Target, prompt: Sequence[int], texts: Sequence[Sequence[int]]) -> Iterator[Tensor]:
    """Yield what `stock_logits` does, from the target's own forward, whose bits do not depend on the size of pieces."""
    rows = [torch.tensor([*prompt, *text]) for text in texts]
    longest = max(map(len, rows))
    features = ModelRunner(target, target.new_cache(len(rows), longest)).prefill(rows).features
    for place in range(len(prompt) - 1, longest):
        yield target.head(features[:, place])


UNWARPED: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "typical_p": 1.0} | {
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
}
"""The sampling settings of temperature 1 without filters."""


class StockProbs:
    """Exact probabilities of next tokens under one audit's settings.

    Args:
        target: gives vocabulary and end-of-sequence tokens.
        sampling: settings by Hugging Face's names.
        warped: False leaves temperature 1 and no filter, so that logarithms of the probabilities are the processed
            logits.
        own: True takes the target's own forward over whole texts where its kernels round inputs, so that stock modules
            are another model.
    """

    def __init__(self, target: Target, sampling: dict[str, Any], warped: bool = True, own: bool = False):
        given = sampling_settings(sampling, model_settings(target))
        self.target, self.settings = target, given if warped else replace(given, **UNWARPED)
        self.own = own and target.backend in QUANTISED

    def _logits(self, prompt: Sequence[int], texts: Sequence[Sequence[int]], piece: int | None) -> Iterator[Tensor]:
        """Yield what `stock_logits` does."""
        return own_logits(self.target, prompt, texts) if self.own else stock_logits(self.target, prompt, texts, piece)

    def warper(self, prompt: Sequence[int]) -> Warper:
        target = self.target
        return Warper(self.settings, len(prompt), target.vocab_size, target.eos_token_ids, (), target.device)

    def along(
        self, prompt: Sequence[int], texts: Sequence[Sequence[int]], piece: int | None = 1
    ) -> Iterator[list[Tensor | None]]:
        """Yield, for every position, the `(vocab,)` next-token probabilities of each text; None past its end."""
        warper, target = self.warper(prompt), self.target
        ids = [torch.tensor([*prompt, *text], device=target.device) for text in texts]
        for place, logits in enumerate(self._logits(prompt, texts, piece)):
            yield [
                warper.probs_after(row, own[: len(prompt) + place]) if place < len(text) else None
                for row, own, text in zip(logits, ids, texts, strict=True)
            ]

    def after(self, prompt: Sequence[int], texts: Sequence[Sequence[int]], piece: int | None = 1) -> Tensor:
        """Return the `(texts, vocab)` next-token probabilities after texts of one length."""
        warper = self.warper(prompt)
        *_, logits = self._logits(prompt, texts, piece)
        device = self.target.device
        return torch.stack(
            [
                warper.probs_after(row, torch.tensor([*prompt, *text], device=device))
                for row, text in zip(logits, texts, strict=True)
            ]
        )


SEVERAL = 8
"""The number of tokens of a forward that stands for verifying a tree."""


@dataclass
class Noise:
    """The differences of one-token forwards from forwards over several tokens and over the whole text.

    Attributes:
        positions: number of positions compared, each with both kinds of forward.
        gap: largest change of the logit gap between a position's two best tokens.
        gap_mean: mean change of that gap.
        variation: largest total variation between the two distributions at a position (temperature 1, no filter).
        variation_mean: mean total variation.
        flips: number of positions at which the best token differs.
    """

    positions: int = 0
    gap: float = 0.0
    gap_mean: float = 0.0
    variation: float = 0.0
    variation_mean: float = 0.0
    flips: int = 0

    def add(self, single: Tensor, other: Tensor) -> None:
        """Compare the `(vocab,)` probabilities at one position."""
        gap = abs(log_ratio(single, *best_two(single)) - log_ratio(other, *best_two(single)))
        variation = total_variation(single, other)
        self.gap, self.variation = max(self.gap, gap), max(self.variation, variation)
        self.gap_mean += (gap - self.gap_mean) / (self.positions + 1)
        self.variation_mean += (variation - self.variation_mean) / (self.positions + 1)
        self.flips += int(single.argmax() != other.argmax())
        self.positions += 1


@dataclass(frozen=True)
class Divergence:
    """The first token, or one of several, at which a text differs from what it should be."""

    prompt: int
    """The prompt's number, from 0."""
    position: int
    """The new token's number, from 0."""
    gap: float
    """The expected token's logit less the found one's, by one-token forwards; nan where one text ends."""
    noise: float
    """The largest change of such a gap by rounding alone."""
    expected: int | None
    found: int | None
    """The token found; None where the text ends, as for `expected`."""
    turn: int = 0
    """The turn of the conversation, from 0."""

    @property
    def tie(self) -> bool:
        """True if the gap lies within the noise: rounding, not a defect. An expected token that is far from the stock
        model's choice (a negative gap) is a defect as well, and so is no number."""
        return abs(self.gap) <= self.noise

    def as_dict(self) -> dict[str, Any]:
        found = asdict(self)
        return {**found, "logit_gap": found.pop("gap"), "tie": self.tie}

    def line(self) -> str:
        what = "near-tie" if self.tie else "BUG"
        return (
            f"prompt {self.prompt + 1}, token {self.position + 1}: {self.found} instead of {self.expected}, "
            f"logit gap {self.gap:.3g}, noise {self.noise:.3g}: {what}"
        )


NOISE_PASSES = 3
"""The number of steps that a text's noise counts for: one for each way to run over it."""


@torch.inference_mode()
def measured_noise(
    probs: StockProbs, prompts: Sequence[list[int]], texts: Sequence[list[int]], advance: Callable[[int], None]
) -> Noise:
    """Measure the noise over every position of greedy texts."""
    noise = Noise()
    for prompt, text in zip(prompts, texts, strict=True):
        single = [step[0] for step in probs.along(prompt, [text])]
        advance(1)
        for piece in (SEVERAL, None):
            for one, (other,) in zip(single, probs.along(prompt, [text], piece), strict=True):
                if one is not None and other is not None:
                    noise.add(one, other)
            advance(1)
    return noise


def best_two(dist: Tensor) -> tuple[int, int]:
    first, second = dist.topk(2).indices.tolist()
    return first, second


def log_ratio(dist: Tensor, one: int, other: int) -> float:
    """Return log p(one) / p(other), the gap of processed logits; infinite where `other` has probability 0."""
    dist = dist.double()
    return float(dist[one].log() - dist[other].log())


def total_variation(one: Tensor, other: Tensor) -> float:
    """Return half the summed absolute differences of two `(vocab,)` distributions."""
    return float((one.double() - other.double()).abs().sum() / 2)
