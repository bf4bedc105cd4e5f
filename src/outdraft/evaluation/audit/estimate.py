"""How long an audit will take, from a few rounds that are timed before it begins. A forecast, not a promise: texts may
end early, and nobody knows yet how many samples rounding will ask for.

The names of the checks are the keys that progress counts by. Checks nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from outdraft.api.generation import SpeculativeModel
from outdraft.evaluation.audit.chi_square import needed_samples
from outdraft.evaluation.audit.settings import AuditSettings

PROBE_TOKENS = 8
FEW, MANY = 1, 8
"""Rows of the two batches that are timed."""

NOISE_PROMPTS = 8
TWICE_PROMPTS = 4
CANDIDATES = 3
"""Prefixes looked at for each that is chosen."""
TESTS = 4
"""Statistical tests at most, for sizes: the first of Holm's levels."""

FREEDOM = 28
"""Degrees of freedom that the test of the first tokens has, about."""

(PLAIN, NOISE, STOCK, DRAFTED, TWICE, TWICE_SAMPLED, PLAIN_SAMPLED, DRAFTED_SAMPLED, LAWS, CELLS, SAMPLES, FORWARDS) = (
    "plain greedy texts",
    "rounding noise of the stock model",
    "plain decoding against the stock model",
    "drafted greedy texts",
    "candidates drafted twice",
    "sampled candidates drafted twice",
    "plain sampled texts",
    "drafted sampled texts",
    "exact probabilities along the texts",
    "exact probabilities of the first tokens",
    "samples of the first tokens",
    "trees node by node",
)


@dataclass(frozen=True)
class Pace:
    """Seconds of a new token for all rows of a batch, as a line in the rows, and of a prompt."""

    one: float
    row: float
    """Of each further row."""
    prefill: float

    def step(self, rows: int) -> float:
        return self.one + self.row * (rows - 1)

    @classmethod
    def timed(cls, model: SpeculativeModel, prompts: Sequence[list[int]], generation: dict[str, Any]) -> Pace:
        """From short texts of the shortest prompt, one row and several; the first text warms up."""
        prompt = min(prompts, key=len)
        fresh = SpeculativeModel(model.target, model.drafter)  # what controllers learn here is not taken into the audit
        settings = {**generation, "max_new_tokens": PROBE_TOKENS, "seed": 0}
        seconds, prefill = {}, 0.0
        for rows in (FEW, FEW, MANY):
            found = fresh.generate([prompt] * rows, **settings)
            steps = max(1, max(map(len, found.tokens)) - 1)
            seconds[rows] = found.statistics.decode_seconds / (steps if found.statistics.rounds else 1)
            prefill = prefill or found.statistics.prefill_seconds
        return cls(seconds[FEW], max(0.0, (seconds[MANY] - seconds[FEW]) / (MANY - FEW)), prefill)


@dataclass(frozen=True)
class Paces:
    """How fast the parts of an audit are here."""

    plain: Pace
    drafted: Pace

    @classmethod
    def timed(cls, model: SpeculativeModel, settings: AuditSettings, prompts: Sequence[list[int]]) -> Paces:
        """A few rounds without the drafter and with it."""
        alone = model.with_drafter(None)
        return cls(Pace.timed(alone, prompts, settings.sampling), Pace.timed(model, prompts, settings.generation))


def expected(settings: AuditSettings, paces: Paces, prompts: int, samples: bool) -> dict[str, float]:
    """Seconds of every check, by its name.

    Args:
        settings: of the audit.
        paces: measured.
        prompts: how many there are.
        samples: whether the settings sample.
    """
    count, tokens = min(prompts, settings.limit), settings.max_new_tokens
    few, batches = min(NOISE_PROMPTS, count), -(-count // MANY)
    plain, drafted = paces.plain, paces.drafted
    a_text = tokens * plain.one + plain.prefill  # one row, token by token
    rows = min(MANY, count)
    twice = 2 * tokens * drafted.step(min(TWICE_PROMPTS, count))
    found: dict[str, float] = {}
    if settings.greedy or not samples:
        found[PLAIN] = batches * tokens * plain.step(rows)
        found[NOISE] = few * 1.3 * a_text
        found[STOCK] = few * a_text
        found[DRAFTED] = batches * tokens * drafted.step(rows)
        found[TWICE] = twice
    if samples:
        asked, each = min(settings.text_prompts, count), settings.texts
        found[TWICE_SAMPLED] = twice
        found[PLAIN_SAMPLED] = asked * tokens * plain.step(each)
        found.setdefault(NOISE, few * 1.3 * a_text)
        found[DRAFTED_SAMPLED] = asked * tokens * drafted.step(each)
        found[LAWS] = asked * tokens * plain.step(each)
        # Cells are split one forward at a time over the whole prefix, and looked at again in two other ways.
        found[CELLS] = CANDIDATES * settings.prefixes * 2 * settings.cells * (plain.prefill + plain.one)
        needed = needed_samples(settings.total_variation, FREEDOM, settings.alpha / TESTS, settings.power) or 0
        found[SAMPLES] = needed / settings.batch_size * settings.first_tokens * drafted.step(settings.batch_size)
    found[FORWARDS] = settings.trees * (tokens / 2 + 4) * plain.step(4)
    return found


def whole(seconds: Mapping[str, float]) -> float:
    """Of all checks together."""
    return sum(seconds.values())
