"""The forecast of an audit's duration, from a few rounds and forwards that are timed before it begins.

It is no promise: texts may end early, and the number of samples that rounding asks for is not known yet.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from outdraft.api.generation import SpeculativeModel
from outdraft.evaluation.audit.findings import AuditSettings
from outdraft.evaluation.audit.goodness_of_fit import needed_samples
from outdraft.evaluation.audit.rounds import Watch
from outdraft.evaluation.audit.stock import SEVERAL, StockProbs

PROBE_TOKENS = 8
FEW, MANY = 1, 8
SAMPLED_ROWS = 8, 32
"""The rows of the two batches that are timed, of texts and of samples."""

NOISE_PROMPTS = 8
TWICE_PROMPTS = 4
CANDIDATES = 3
"""The number of candidate prefixes for each chosen one."""
TESTS = 4
"""The most statistical tests, which sets the first of Holm's levels for sample sizes."""

FREEDOM = 28
"""The approximate degrees of freedom of the test of the first tokens."""

MORE_SAMPLES = 1.15
"""How many times the samples rounding in 16 bits asks for."""

LEAVES = 4
"""The approximate number of leaves, and of levels, of a tree."""

PLAIN = "plain greedy texts"
NOISE = "rounding noise of the stock model"
STOCK = "plain decoding against the stock model"
DRAFTED = "drafted greedy texts"
TWICE = "candidates drafted twice"
TWICE_SAMPLED = "sampled candidates drafted twice"
PLAIN_SAMPLED = "plain sampled texts"
DRAFTED_SAMPLED = "drafted sampled texts"
LAWS = "exact probabilities along the texts"
SEEDED = "seeded texts against stock generate"
CELLS = "exact probabilities of the first tokens"
SAMPLES = "samples of the first tokens"
FORWARDS = "trees node by node"
"""The names of the checks."""


Run = Callable[[int], tuple[float, float]]
"""A function that decodes so many rows; returns the seconds until their first token, and of every further one."""


@dataclass(frozen=True)
class Pace:
    """The seconds of a batch until its first token and of every further one, both linear in the rows."""

    one: float
    row: float
    """The seconds that each further row adds to a token."""
    prefill: float
    prefill_row: float = 0.0

    def step(self, rows: int) -> float:
        return self.one + self.row * (rows - 1)

    def batch(self, rows: int, tokens: float) -> float:
        return self.prefill + self.prefill_row * (rows - 1) + tokens * self.step(rows)

    @classmethod
    def timed(cls, run: Run, few: int = FEW, many: int = MANY) -> Pace:
        """Time two numbers of rows; a first run warms up."""
        (first, token), (first_many, token_many) = [run(rows) for rows in (few, few, many)][1:]
        row, prefill_row = (max(0.0, more / (many - few)) for more in (token_many - token, first_many - first))
        one, prefill = token - row * (few - 1), first - prefill_row * (few - 1)
        return cls(max(0.0, one), row, max(0.0, prefill), prefill_row)


@dataclass(frozen=True)
class Paces:
    """The speed of all that an audit does: `plain` and `drafted` decoding, one-token forwards of the `stock` model with
    the probabilities after them, and a batch of `samples` of the first tokens (all its seconds in `prefill`)."""

    plain: Pace
    drafted: Pace
    stock: Pace
    samples: Pace | None
    """None if nothing is sampled."""

    @classmethod
    def timed(
        cls, model: SpeculativeModel, probs: StockProbs, prompts: Sequence[list[int]], settings: AuditSettings
    ) -> Paces:
        """Time short texts after the prompt of median length, and samples after the shortest, as the audit takes
        them."""
        order = sorted(prompts, key=len)
        middle = order[len(order) // 2]
        # What controllers learn here is not taken into the audit.
        fresh, plain = SpeculativeModel(model.target, model.drafter), model.with_drafter(None)
        samples = None
        if probs.settings.temperature > 0:
            assert model.drafter is not None
            watched = fresh.with_drafter(Watch(model.drafter, prefill_once=True))
            sampled = decoding(watched, order[0], settings.generation, settings.first_tokens)
            few, many = (min(rows, settings.batch_size) for rows in SAMPLED_ROWS)
            samples = Pace.timed(lambda rows: (sum(sampled(rows)), 0.0), few, max(many, few + 1))
        return cls(
            Pace.timed(decoding(plain, middle, settings.sampling, PROBE_TOKENS)),
            Pace.timed(decoding(fresh, middle, settings.generation, PROBE_TOKENS)),
            Pace.timed(forwards(probs, middle, PROBE_TOKENS)),
            samples,
        )


def decoding(model: SpeculativeModel, prompt: list[int], generation: dict[str, Any], tokens: int) -> Run:
    """Return a run of `generate`."""

    def run(rows: int) -> tuple[float, float]:
        start = time.perf_counter()
        found = model.generate([prompt] * rows, **{**generation, "max_new_tokens": tokens, "seed": 0})
        decoded = found.statistics.decode_seconds
        steps = max(1, max(map(len, found.tokens)) - 1)
        return time.perf_counter() - start - decoded, decoded / steps

    return run


def forwards(probs: StockProbs, prompt: list[int], tokens: int) -> Run:
    """Return a run of the stock model along the beginning of the prompt, as if that were a text."""

    @torch.inference_mode()
    def run(rows: int) -> tuple[float, float]:
        text = (prompt * tokens)[:tokens]
        steps, start = probs.along(prompt, [text] * rows), time.perf_counter()
        next(steps)
        first = time.perf_counter()
        for _ in steps:
            pass
        return first - start, (time.perf_counter() - first) / tokens

    return run


def expected(
    settings: AuditSettings, paces: Paces, lengths: Sequence[int], samples: bool, exact: bool = True
) -> dict[str, float]:
    """Forecast the seconds of every check, by its name.

    Args:
        lengths: the prompts' numbers of tokens.
        samples: True if the settings sample.
        exact: False for 16 bits, where rounding asks for more samples, and seeded texts differ by near-ties.
    """
    plain, drafted, stock = paces.plain, paces.drafted, paces.stock
    count, tokens = min(len(lengths), settings.limit), settings.max_new_tokens
    few, batches, rows = min(NOISE_PROMPTS, count), -(-count // MANY), min(MANY, count)
    noise = few * (stock.batch(1, tokens) + tokens / SEVERAL * stock.one + stock.prefill)
    twice = 2 * drafted.batch(min(TWICE_PROMPTS, count), tokens)
    found: dict[str, float] = {}
    if settings.greedy or not samples:
        found[PLAIN] = batches * plain.batch(rows, tokens)
        found[NOISE] = noise
        found[STOCK] = few * stock.batch(1, tokens)
        found[DRAFTED] = batches * drafted.batch(rows, tokens)
        found[TWICE] = twice
    if samples:
        asked, each = min(settings.text_prompts, count), settings.texts
        found[TWICE_SAMPLED] = twice
        found[PLAIN_SAMPLED] = asked * plain.batch(each, tokens)
        found.setdefault(NOISE, noise)
        found[DRAFTED_SAMPLED] = asked * drafted.batch(each, tokens)
        found[LAWS] = asked * stock.batch(each, tokens)
        seeded = stock.batch(1, tokens)
        # Every text once more for its noise, in all three ways, and drafted ones that differ once more for their gaps.
        again = 0.0 if exact else 2 * seeded + tokens / SEVERAL * stock.one + stock.prefill
        found[SEEDED] = asked * (settings.seeds * (seeded + again) + drafted.batch(settings.seeds, tokens))
        # A prefix is run through once for every cell that is split, and for every level in pieces and as a whole.
        pieces = sum(sorted(lengths)[:few]) / few / SEVERAL
        a_prefix = settings.cells * stock.batch(1, 1) + settings.first_tokens * (pieces * stock.one + stock.prefill)
        found[CELLS] = CANDIDATES * settings.prefixes * a_prefix
        needed = needed_samples(settings.total_variation, FREEDOM, settings.alpha / TESTS, settings.power) or 0
        more = 1.0 if exact else MORE_SAMPLES
        assert paces.samples is not None
        found[SAMPLES] = more * needed / settings.batch_size * paces.samples.batch(settings.batch_size, 0)
    found[FORWARDS] = settings.trees * stock.batch(LEAVES, tokens / 2 + LEAVES)
    return found
