"""Texts that must be equal, token for token: greedy ones to plain ones, and seeded ones to those of stock `generate`.

A difference is a tie only if the logit gap there, by one-token forwards of the stock model, lies within the noise of
this model, precision and backend. Such ties must also be no more frequent than that noise causes.

Under shared noise a token is chosen as the arg max of p / e, with e the noise that the seed gives to its position
(`core/coupling.py`). So sampled losslessness is a question of equality too, and its gap is that of log(p / e).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from outdraft.api.generation import SpeculativeModel
from outdraft.core.coupling import Noise as SharedNoise
from outdraft.core.statistics import Statistics
from outdraft.data.text import common_length
from outdraft.evaluation.audit.findings import AuditSettings, Finding
from outdraft.evaluation.audit.progress import Stage
from outdraft.evaluation.audit.stock import SEVERAL, Divergence, Noise, StockProbs, log_ratio

MORE = 3.0
"""The largest ratio of the frequency of ties to that of flips among the stock model's own forwards."""


@torch.inference_mode()
def token_divergences(
    probs: StockProbs, prompt: list[int], text: list[int], number: int, noise: Noise
) -> list[Divergence]:
    """List all tokens of the text that differ from the stock model's choice after the text up to there."""
    return _departures((dist for (dist,) in probs.along(prompt, [text])), text, number, noise)


def _departures(dists: Iterable[Tensor | None], text: list[int], number: int, noise: Noise) -> list[Divergence]:
    """List the tokens of a text that are not the most probable ones of the `(vocab,)` probabilities at their places."""
    found = []
    for place, dist in enumerate(dists):
        if dist is not None and (best := int(dist.argmax())) != text[place]:
            gap = log_ratio(dist, best, text[place])
            found.append(Divergence(number, place, gap, noise.gap, best, text[place]))
    return found


def first_difference(
    probs: StockProbs, prompt: list[int], plain: list[int], other: list[int], number: int, noise: Noise
) -> Divergence:
    """Return the first divergence of two texts, whichever of them left the stock model's choice."""
    place = common_length(plain, other)
    expected = plain[place] if place < len(plain) else None
    found = other[place] if place < len(other) else None
    gap = math.nan
    if expected is not None and found is not None:
        gap = abs(log_ratio(probs.after(prompt, [plain[:place]])[0], expected, found))
    return Divergence(number, place, gap, noise.gap, expected, found)


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
    found: list[Divergence] = []
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
    found: Sequence[Divergence],
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


OURS = ("presence_penalty", "frequency_penalty", "logit_bias")
"""The settings that stock `generate` does not have; with them there is nothing to compare with."""


def comparable(probs: StockProbs) -> bool:
    """Return True if stock `generate` has all settings of the audit, and the target's arithmetic."""
    return not probs.own and not any(getattr(probs.settings, name) for name in OURS)


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
) -> list[Divergence]:
    """List the tokens of a drafted text that are not the seed's, and the first difference from the stock text.

    Args:
        expected, found: the stock text and the drafted one.
        noise: rounding of the stock model under such noise.
        edges: True if a token without probability may be rounding at a filter's edge.
    """
    listed = _departures(seeded.along(found), found, number, noise)
    if edges:
        listed = [replace(one, gap=noise.gap) if math.isinf(one.gap) else one for one in listed]
    first = common_length(expected, found)
    if all(one.position != first for one in listed):  # the processors or the end differ, not the forward
        asked, given = (text[first] if first < len(text) else None for text in (expected, found))
        listed.insert(0, Divergence(number, first, math.nan, noise.gap, asked, given))
    return listed


@torch.inference_mode()
def seeded_finding(
    model: SpeculativeModel,
    probs: StockProbs,
    prompts: Sequence[list[int]],
    settings: AuditSettings,
    stage: Stage,
) -> Finding:
    """Compare drafted texts of several seeds after every prompt with stock `generate`'s. A prompt counts for one step
    with every seed, and each of its texts for another, if one has to be looked at closely."""
    generation = {name: value for name, value in settings.generation.items() if name != "candidates"}
    generation |= {"coupling": "noise", "max_new_tokens": settings.max_new_tokens}
    texts: list[tuple[SeededProbs, list[int], list[int]]] = []
    parts = []
    for place, prompt in enumerate(prompts):
        seed = settings.seed_for("seeded texts", place)

        def both(prompt: list[int] = prompt, seed: int = seed) -> dict[str, Any]:
            output = model.generate([prompt] * settings.seeds, **generation, seed=seed)
            stage(1)
            stock = []
            for row in range(settings.seeds):
                stock.append(stock_text(probs, prompt, seed + row, settings.max_new_tokens))
                stage(1)
            return {"found": output.tokens, "stock": stock, "statistics": asdict(output.statistics)}

        known = stage.part(place, both)
        parts.append(Statistics(**known["statistics"]))
        for row, (stock, found) in enumerate(zip(known["stock"], known["found"], strict=True)):
            texts.append((SeededProbs(probs, prompt, seed + row), stock, found))
    statistics, noise, edges = Statistics.sum(parts), Noise(), model.target.dtype.itemsize < 4
    differing = [number for number, (_, stock, found) in enumerate(texts) if stock != found]
    listed: list[Divergence] = []
    if differing:
        for seeded, stock, _ in texts:
            seeded.add_to(noise, stock)
            stage(1)
        for number in differing:
            listed += divergences(texts[number][0], number // settings.seeds, *texts[number][1:], noise, edges)
    question = "Do seeded texts equal those of stock `generate` with the same seed (coupling noise)?"
    tokens = sum(len(found) for _, _, found in texts)
    counts = {"texts": len(texts), "identical": len(texts) - len(differing), "tokens": tokens}
    return equality_finding("seeded", question, counts, listed, statistics, noise, settings.alpha)


def drafting(statistics: Statistics) -> str:
    """Return a remark where drafts were all absent, rejected or accepted, so that the check is weak."""
    if statistics.drafted == 0:
        return "; nothing was drafted, so nothing of the drafter was seen"
    if statistics.accepted == 0:
        return "; no candidate was accepted, so only rejections were seen"
    if statistics.accepted == statistics.drafted:
        return "; no candidate was rejected, so only acceptances were seen"
    return ""
