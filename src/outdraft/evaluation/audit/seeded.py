"""Seeded texts, token for token: drafted under shared noise against stock `generate(do_sample=True)`.

A token is chosen as the arg max of p / e, with e the noise that the seed gives to its position (`core/coupling.py`). So
sampled losslessness is a question of equality, as greedy decoding's is, and differences are held against rounding in
the same way: by the gap of log(p / e) between the two tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from outdraft.api.generation import SpeculativeModel
from outdraft.core.coupling import Noise as SharedNoise
from outdraft.core.statistics import Statistics
from outdraft.data.text import common_length
from outdraft.evaluation.audit.findings import Finding
from outdraft.evaluation.audit.greedy import TokenDivergence, equality_finding
from outdraft.evaluation.audit.settings import AuditSettings
from outdraft.evaluation.audit.stock import SEVERAL, Noise, StockProbs, log_ratio

OURS = ("presence_penalty", "frequency_penalty", "logit_bias")
"""The settings that stock `generate` does not have; with them there is nothing to compare with."""


def comparable(probs: StockProbs) -> bool:
    """Return True if stock `generate` has all settings of the audit."""
    return not any(getattr(probs.settings, name) for name in OURS)


def stock_text(probs: StockProbs, prompt: Sequence[int], seed: int, max_new_tokens: int) -> list[int]:
    """Sample a text by the model's own `generate` after `torch.manual_seed(seed)`; torch's generators stay as they
    are."""
    target = probs.target
    settings = {name: value for name, value in asdict(probs.settings).items() if name not in OURS}
    ids = torch.tensor([list(prompt)], device=target.device)
    devices = [target.device] if target.device.type == "cuda" else []
    model: Any = target.model
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        found = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            max_new_tokens=max_new_tokens,
            eos_token_id=target.eos_token_ids or None,
            pad_token_id=0,
            # Every setting by keyword, None too, so that none is the model's own generation config's.
            **{name: value or None for name, value in settings.items()},
        )
    return found[0, len(prompt) :].tolist()


class SeededProbs:
    """The stock model's probabilities along texts, tilted by a seed's noise: it chooses the most probable token."""

    def __init__(self, probs: StockProbs, prompt: list[int], seed: int):
        self.probs, self.prompt = probs, prompt
        self.noise = SharedNoise(1, probs.target.vocab_size, probs.target.device, seed)

    def along(self, text: list[int], piece: int | None = 1) -> list[Tensor]:
        """Return `(vocab,)` p / e, normalised, for every position of the text; pieces as in `StockProbs.along`."""
        found = []
        for place, (dist,) in enumerate(self.probs.along(self.prompt, [text], piece)):
            if dist is not None:
                tilted = dist.double() / self.noise.step(place)[0].double()
                found.append(tilted / tilted.sum())
        return found

    def add_to(self, noise: Noise, text: list[int]) -> None:
        """Measure the rounding of the stock model's own forwards over the text; a token at a filter's edge, which one
        of them drops, is a flip without a gap."""
        single = self.along(text)
        for piece in (SEVERAL, None):
            for one, other in zip(single, self.along(text, piece), strict=True):
                if (other[one.topk(2).indices] > 0).all() and (one > 0).sum() > 1:
                    noise.add(one, other)
                else:
                    noise.positions += 1
                    noise.flips += int(one.argmax() != other.argmax())


def divergences(
    seeded: SeededProbs, number: int, expected: list[int], found: list[int], noise: Noise, edges: bool
) -> list[TokenDivergence]:
    """List the tokens of a drafted text that are not the seed's, and the first difference from the stock text.

    Args:
        expected, found: the stock text and the drafted one.
        noise: rounding of the stock model under such noise.
        edges: True if a token without probability may be rounding at a filter's edge.
    """
    listed = []
    for place, dist in enumerate(seeded.along(found)):
        if (best := int(dist.argmax())) != found[place]:
            gap = log_ratio(dist, best, found[place])
            gap = noise.gap if edges and math.isinf(gap) else gap
            listed.append(TokenDivergence(number, place, best, found[place], gap, noise.gap))
    first = common_length(expected, found)
    if all(one.position != first for one in listed):  # the processors or the end differ, not the forward
        asked, given = (text[first] if first < len(text) else None for text in (expected, found))
        listed.insert(0, TokenDivergence(number, first, asked, given, math.nan, noise.gap))
    return listed


@torch.inference_mode()
def seeded_finding(
    model: SpeculativeModel,
    probs: StockProbs,
    prompts: Sequence[list[int]],
    settings: AuditSettings,
    advance: Callable[[int], None],
) -> Finding:
    """Compare drafted texts of several seeds after every prompt with stock `generate`'s."""
    generation = {name: value for name, value in settings.generation.items() if name != "candidates"}
    generation |= {"coupling": "noise", "max_new_tokens": settings.max_new_tokens}
    texts: list[tuple[SeededProbs, list[int], list[int]]] = []
    parts = []
    for place, prompt in enumerate(prompts):
        seed = settings.seed_for("seeded texts", place)
        output = model.generate([prompt] * settings.seeds, **generation, seed=seed)
        parts.append(output.statistics)
        for row, found in enumerate(output.tokens):
            stock = stock_text(probs, prompt, seed + row, settings.max_new_tokens)
            texts.append((SeededProbs(probs, prompt, seed + row), stock, found))
        advance(1)
    statistics, noise, edges = Statistics.sum(parts), Noise(), model.target.dtype.itemsize < 4
    differing = [number for number, (_, stock, found) in enumerate(texts) if stock != found]
    listed: list[TokenDivergence] = []
    if differing:
        for seeded, stock, _ in texts:
            seeded.add_to(noise, stock)
        for number in differing:
            listed += divergences(texts[number][0], number // settings.seeds, *texts[number][1:], noise, edges)
    question = "Do seeded texts equal those of stock `generate` with the same seed (coupling noise)?"
    tokens = sum(len(found) for _, _, found in texts)
    counts = {"texts": len(texts), "identical": len(texts) - len(differing), "tokens": tokens}
    return equality_finding("seeded", question, counts, listed, statistics, noise, settings.alpha)
