"""The audit from end to end: its checks, their inputs, and their order."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

from rich.console import Console

from outdraft.api.draft_settings import DraftKeywords, DraftSettings, resolve
from outdraft.api.generation import SpeculativeModel
from outdraft.api.prompts import encode, read_prompts
from outdraft.api.settings import model_settings, sampling_settings
from outdraft.core.sampling_settings import SamplingSettings
from outdraft.data.provenance import environment
from outdraft.errors import UserError
from outdraft.evaluation.audit import progress
from outdraft.evaluation.audit.equality import comparable, greedy_finding, plain_finding, seeded_finding
from outdraft.evaluation.audit.findings import Audit, AuditSettings, Finding, judge
from outdraft.evaluation.audit.goodness_of_fit import Ranks, scipy_stats
from outdraft.evaluation.audit.proposals import Draws, draws_findings, twice_finding
from outdraft.evaluation.audit.rounds import Recorder, Trees, Watch, forwards_finding
from outdraft.evaluation.audit.sampled import (
    beginnings_finding,
    chosen_prefixes,
    decoded,
    plan,
    sampled_texts,
    samples_finding,
    token_ranks,
    tokens_finding,
)
from outdraft.evaluation.audit.stock import Noise, StockProbs, measured_noise
from outdraft.reference import load_prompts
from outdraft.training.progress import duration

OFFSETS = (0, 2, 5, 9)
"""The numbers of new tokens that extend prompts to prefixes, so that not all prefixes end where a prompt does."""

BATCH = 8
"""The number of prompts of a greedy batch: rows of different lengths are part of the check."""


def run_audit(
    model: SpeculativeModel,
    settings: AuditSettings,
    remarks: Console | None = None,
    prompts: Sequence[list[int]] | None = None,
    about: dict[str, Any] | None = None,
) -> Audit:
    """Check whether `model` with these settings keeps its target's output distribution.

    Args:
        remarks: where progress goes; nowhere when None.
        prompts: token ids, in place of the settings' prompts.
        about: names for the report, such as the model's.

    Raises:
        UserError: the model has no drafter, the prompts or settings cannot work, or they sample and scipy is missing.
        KeyboardInterrupt: the user stopped before any check was finished; later, the findings so far are returned.
    """
    if model.drafter is None:
        raise UserError("there is no drafter to verify; give --draft-model, or --method prompt-lookup")
    start, remarks = time.perf_counter(), remarks or Console(quiet=True)
    encoded = list(prompts[: settings.limit]) if prompts is not None else _prompts(model, settings)
    audit = _Running(model, settings, encoded, remarks)
    stopped = None
    try:
        audit.check_everything()
    except KeyboardInterrupt:
        if not audit.findings:
            raise KeyboardInterrupt("interrupted before any check was finished") from None
        stopped = audit.course.title or "the next one"
    judge(audit.findings, settings.alpha)
    shown = {
        **(about or {}),
        "method": model.method,
        "prompts": len(encoded),
        **{name: value for name, value in asdict(settings).items() if name != "limit"},
        "data": None if settings.data is None else str(settings.data),
    }
    seconds = time.perf_counter() - start
    facts, told = environment(model.target), sum(audit.expected.values())
    return Audit(shown, facts, audit.findings, audit.noise, settings.alpha, seconds, told, stopped)


def _prompts(model: SpeculativeModel, settings: AuditSettings) -> list[list[int]]:
    if settings.data is not None:
        return encode(read_prompts(settings.data, settings.limit), model.target)
    return encode(load_prompts("heldout")[: settings.limit], model.target)


class _Running:
    """The state of one audit."""

    def __init__(
        self, model: SpeculativeModel, settings: AuditSettings, prompts: Sequence[list[int]], remarks: Console
    ):
        assert model.drafter is not None
        self.model, self.settings, self.remarks = model, settings, remarks
        self.plain = model.with_drafter(None)
        self.drafter = model.drafter
        room = model.target.context_length - settings.max_new_tokens
        self.prompts = [prompt for prompt in prompts if len(prompt) <= room]
        if not self.prompts:
            raise UserError(f"no prompt leaves room for {settings.max_new_tokens} new tokens; lower --max-new-tokens")
        self.samples = self._checked().temperature > 0
        if self.samples:
            scipy_stats()  # where it is missing, that is said before anything runs
        greedy = {name: value for name, value in settings.greedy_generation.items() if name in settings.sampling}
        self.unwarped = StockProbs(model.target, greedy, warped=False)
        self.trees = Trees(settings.trees, model.target.context_length, settings.seed_for("trees"))
        self.findings: list[Finding] = []
        self.noise = Noise()
        self.expected = self._forecast()
        self.course = progress.Course(remarks, self.expected)

    def _forecast(self) -> dict[str, float]:
        """Forecast the seconds of every check, and show them before the first begins."""
        plain = progress.Pace.timed(self.plain, self.prompts, self.settings.sampling)
        drafted = progress.Pace.timed(self.model, self.prompts, self.settings.generation)
        found = progress.expected(self.settings, plain, drafted, len(self.prompts), self.samples)
        line = f"expected to take about {duration(sum(found.values()))} here; Ctrl-C ends it and keeps what was found"
        if not self.settings.quick:
            quick = progress.expected(self.settings.made_quick(), plain, drafted, len(self.prompts), self.samples)
            line += f"; --quick, which sees larger errors only, about {duration(sum(quick.values()))}"
        self.remarks.print(line, style="dim", markup=False, soft_wrap=True)
        return found

    def check_everything(self) -> None:
        if self.settings.greedy or not self.samples:
            self.check_greedy()
        if self.samples:
            self.check_sampled()
        with self.stage(progress.FORWARDS, len(self.trees.kept)) as advance:
            if self.trees.kept:
                self.findings.append(forwards_finding(self.unwarped, self.trees, self.noise, advance))

    def _checked(self) -> SamplingSettings:
        """Return the sampling settings; invalid settings of any kind raise before anything runs."""
        generation = dict(self.settings.generation)
        draft = DraftSettings.taken(generation)
        sampling = sampling_settings(generation, model_settings(self.model.target))
        resolve(draft, self.drafter, self.model.target.device, sampling=sampling.temperature > 0)
        return sampling

    def drafted(self, **watching: Any) -> SpeculativeModel:
        """Return the model with its drafter watched; the controllers' learned state stays with it."""
        watched = self.model.with_drafter(Watch(self.drafter, **watching))
        watched._pacers = self.model._pacers
        return watched

    @contextmanager
    def stage(self, shown: str, total: int) -> Iterator[progress.Stage]:
        """Show a bar; findings that are added within get its seconds."""
        before, start = len(self.findings), time.perf_counter()
        with self.course.stage(shown, total) as advance:
            yield advance
        for finding in self.findings[before:]:
            finding.seconds = time.perf_counter() - start

    def check_greedy(self) -> None:
        settings = self.settings
        generation = {**settings.greedy_generation, "max_new_tokens": settings.max_new_tokens}
        plain_generation = _undrafted(generation)
        few = self.prompts[: progress.NOISE_PROMPTS]
        batches = [(self.prompts[start : start + BATCH], None) for start in range(0, len(self.prompts), BATCH)]
        with self.stage(progress.PLAIN, len(self.prompts)) as advance:
            texts, _ = decoded(self.plain, batches, plain_generation, advance)
            plain = [text for batch in texts for text in batch]
        self.measure_noise(plain)
        with self.stage(progress.STOCK, len(few)) as advance:
            self.findings.append(plain_finding(self.unwarped, few, plain[: len(few)], self.noise, advance))
        with self.stage(progress.DRAFTED, 2 * len(self.prompts)) as advance:
            texts, statistics = decoded(self.drafted(listeners=[self.trees]), batches, generation, advance)
            found = [text for batch in texts for text in batch]
            compared = (self.unwarped, self.prompts, plain, found, statistics, self.noise, settings.alpha, advance)
            self.findings.append(greedy_finding(*compared))
        self.check_twice("candidates_greedy", generation, progress.TWICE)

    def measure_noise(self, plain: Sequence[list[int]]) -> None:
        few = self.prompts[: min(progress.NOISE_PROMPTS, len(plain))]
        with self.stage(progress.NOISE, len(few)) as advance:
            self.noise = measured_noise(self.unwarped, few, plain[: len(few)], lambda: advance(1))

    def check_twice(self, name: str, generation: dict[str, Any], shown: str) -> None:
        with self.stage(shown, 2) as advance:
            found = twice_finding(
                self.model, self.prompts[: progress.TWICE_PROMPTS], generation, self.settings, name, advance
            )
            if found is not None:
                self.findings.append(found)

    def check_sampled(self) -> None:
        settings, target = self.settings, self.model.target
        probs = StockProbs(target, settings.sampling)
        level = settings.alpha / progress.TESTS
        drafted_generation = {**settings.generation, "max_new_tokens": settings.max_new_tokens}
        self.check_twice("candidates", drafted_generation, progress.TWICE_SAMPLED)
        prompts = self.prompts[: settings.text_prompts]
        with self.stage(progress.PLAIN_SAMPLED, len(prompts) * settings.texts) as advance:
            plain_settings = replace(settings, generation=_undrafted(settings.generation))
            plain, _ = sampled_texts(self.plain, prompts, plain_settings, "plain texts", advance)
        if not self.noise.positions:
            self.measure_noise([own[0] for own in plain])
        draws = Draws(Ranks(settings.seed_for("ranks of draws")))
        with self.stage(progress.DRAFTED_SAMPLED, len(prompts) * settings.texts) as advance:
            watched = self.drafted(listeners=[self.trees, draws], chance=Recorder)
            drafted, statistics = sampled_texts(watched, prompts, settings, "drafted texts", advance)
            self.findings += draws_findings(draws, settings, level)
            self.findings.append(samples_finding(plain, drafted, target.vocab_size, settings))
        with self.stage(progress.LAWS, len(prompts)) as advance:
            ranks = token_ranks(probs, prompts, drafted, settings.seed_for("ranks of tokens"), advance)
            exact = target.dtype.itemsize >= 4
            self.findings.append(tokens_finding(ranks, statistics, settings, level, exact))
        if comparable(probs):
            with self.stage(progress.SEEDED, len(prompts)) as advance:
                self.findings.append(seeded_finding(self.model, probs, prompts, settings, advance))
        candidates = list(_prefixes(self.prompts, plain, progress.CANDIDATES * settings.prefixes))
        with self.stage(progress.CELLS, len(candidates)) as advance:
            prefixes = chosen_prefixes(probs, candidates, settings, advance)
        planned = plan(prefixes, settings, level)
        with self.stage(progress.SAMPLES, planned.each * len(prefixes)) as advance:
            self.findings.append(beginnings_finding(self.model, prefixes, planned, settings, advance))


def _prefixes(prompts: Sequence[list[int]], plain: Sequence[list[list[int]]], most: int) -> Iterator[list[int]]:
    """Yield prefixes: prompts, shortest (cheapest) first, some of them extended by tokens of a plain text."""
    order = sorted(range(len(plain)), key=lambda i: len(prompts[i]))
    for number in range(most):
        place = order[number % len(order)]
        turn = number // len(order)
        text = plain[place][turn % len(plain[place])]
        offset = OFFSETS[(number + turn) % len(OFFSETS)]
        yield [*prompts[place], *text[: min(offset, max(0, len(text) - 1))]]


def _undrafted(generation: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that plain decoding takes."""
    drafting = DraftKeywords.__annotations__.keys() - {"coupling"}
    return {name: value for name, value in generation.items() if name not in drafting}
