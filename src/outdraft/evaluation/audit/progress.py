"""The duration of an audit: a forecast from a few rounds that are timed before it begins, and the progress by it.

The forecast is no promise: texts may end early, and the number of samples that rounding asks for is not known yet.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from outdraft.api.generation import SpeculativeModel
from outdraft.evaluation.audit.findings import AuditSettings
from outdraft.evaluation.audit.goodness_of_fit import needed_samples
from outdraft.training.progress import duration

PROBE_TOKENS = 8
FEW, MANY = 1, 8
"""The rows of the two batches that are timed."""

NOISE_PROMPTS = 8
TWICE_PROMPTS = 4
CANDIDATES = 3
"""The number of candidate prefixes for each chosen one."""
TESTS = 4
"""The most statistical tests, which sets the first of Holm's levels for sample sizes."""

FREEDOM = 28
"""The approximate degrees of freedom of the test of the first tokens."""

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


@dataclass(frozen=True)
class Pace:
    """The seconds of a new token for a batch, linear in the rows, and of a prompt."""

    one: float
    row: float
    """The seconds that each further row adds."""
    prefill: float

    def step(self, rows: int) -> float:
        return self.one + self.row * (rows - 1)

    @classmethod
    def timed(cls, model: SpeculativeModel, prompts: Sequence[list[int]], generation: dict[str, Any]) -> Pace:
        """Time short texts of the shortest prompt, one row and several; the first text warms up."""
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


def expected(settings: AuditSettings, plain: Pace, drafted: Pace, prompts: int, samples: bool) -> dict[str, float]:
    """Forecast the seconds of every check, by its name.

    Args:
        samples: True if the settings sample.
    """
    count, tokens = min(prompts, settings.limit), settings.max_new_tokens
    few, batches = min(NOISE_PROMPTS, count), -(-count // MANY)
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
        found[SEEDED] = asked * (settings.seeds * a_text + tokens * drafted.step(settings.seeds))
        # Cells are split one forward at a time over the whole prefix, and looked at again in two other ways.
        found[CELLS] = CANDIDATES * settings.prefixes * 2 * settings.cells * (plain.prefill + plain.one)
        needed = needed_samples(settings.total_variation, FREEDOM, settings.alpha / TESTS, settings.power) or 0
        found[SAMPLES] = needed / settings.batch_size * settings.first_tokens * drafted.step(settings.batch_size)
    found[FORWARDS] = settings.trees * (tokens / 2 + 4) * plain.step(4)
    return found


Stage = Callable[[int], None]
"""A function that advances a check by a number of steps."""

KNOWN = 0.05
"""The share of the work from which on the time left is estimated from the elapsed time."""


class Course:
    """The progress of an audit's checks, one after the other."""

    def __init__(self, console: Console, expected: Mapping[str, float]):
        self.console, self.expected = console, expected
        self.total = sum(expected.values()) or 1.0
        self.done, self.began = 0.0, time.perf_counter()
        self.title: str | None = None
        """The running check; after an interruption, the interrupted one."""

    @contextmanager
    def stage(self, title: str, steps: int) -> Iterator[Stage]:
        """Yield a function that advances the check."""
        self.title = title
        weight, advanced = self.expected.get(title, 0.0), 0
        if not self.console.is_terminal:
            self.console.print(f"{title} ... ({self.done / self.total:.0%} done)", style="dim", markup=False)
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.percentage:.0f}% of all, {task.fields[left]} left"),
        )
        with Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal) as bar:
            task = bar.add_task(title, total=self.total, left=self.left(self.done))
            bar.update(task, completed=self.done)

            def advance(count: int) -> None:
                nonlocal advanced
                advanced += count
                now = self.done + weight * min(1.0, advanced / max(1, steps))
                shown = f"{title} {advanced}/{steps}"
                bar.update(task, description=shown, completed=now, left=self.left(now))

            yield advance
        self.done += weight
        self.title = None

    def left(self, done: float) -> str:
        """Estimate the time left, after work that was expected to take `done` seconds."""
        rest = max(0.0, self.total - done)
        if done > KNOWN * self.total:
            rest *= (time.perf_counter() - self.began) / done
        return f"about {duration(rest)}"
