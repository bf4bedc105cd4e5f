"""The audit from end to end: its checks, their inputs, and their order."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

from rich.console import Console

from outdraft.api.draft_settings import DraftKeywords, DraftSettings, resolve
from outdraft.api.generation import SpeculativeModel
from outdraft.api.prompts import encode, read_prompts
from outdraft.api.settings import model_settings, sampling_settings
from outdraft.control import Costs, Pacer
from outdraft.core.sampling_settings import SamplingSettings
from outdraft.data.provenance import environment
from outdraft.errors import UserError
from outdraft.evaluation.audit import forecast
from outdraft.evaluation.audit.equality import comparable, greedy_finding, plain_finding, seeded_finding
from outdraft.evaluation.audit.findings import Audit, AuditSettings, Finding, judge
from outdraft.evaluation.audit.goodness_of_fit import Ranks, scipy_stats
from outdraft.evaluation.audit.progress import Course, Stage
from outdraft.evaluation.audit.proposals import Draws, declared_finding, draws_finding, twice_finding
from outdraft.evaluation.audit.rounds import Recorder, Trees, Watch, forwards_finding
from outdraft.evaluation.audit.sampled import (
    beginnings_finding,
    chosen_prefixes,
    decoded,
    plan,
    rank_tokens,
    sampled_texts,
    samples_finding,
    tokens_finding,
)
from outdraft.evaluation.audit.stock import NOISE_PASSES, Noise, StockProbs, measured_noise
from outdraft.evaluation.audit.store import Store, facts_of
from outdraft.reference import load_prompts
from outdraft.training.progress import duration

OFFSETS = (0, 2, 5, 9)
"""The numbers of new tokens that extend prompts to prefixes, so that not all prefixes end where a prompt does."""

BATCH = 8
"""The number of prompts of a greedy batch: rows of different lengths are part of the check."""
EAGER = Costs.fixed(begin=0.05, step=0.03, verify_base=1.0, verify_per_node=0.01)
"""What drafts cost beside a large target. Where no controller is named, the default one decides by these and not by
measured seconds: beside a small target, in a batch, it might let the drafter rest, and nothing of it would be seen."""


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
    facts = environment(model.target)
    own = {name: value for name, value in asdict(settings).items() if name not in ("limit", "data", "output_dir")}
    named = {"model": model.target.config.name_or_path, **(about or {}), "method": model.method}
    store = Store(settings.output_dir, facts_of(own, named, facts, encoded))
    audit = _Running(model, settings, encoded, remarks, store)
    course, stopped = audit.course, None
    try:
        audit.check_everything()
    except KeyboardInterrupt:
        if len(store):
            line = f"kept in {settings.output_dir}; the same command goes on from there"
            remarks.print(line, markup=False, soft_wrap=True)
        if not audit.findings:
            raise KeyboardInterrupt("interrupted before any check was finished") from None
        stopped = course.title or "the next one"
    judge(audit.findings, settings.alpha)
    shown = {
        **(about or {}),
        "method": model.method,
        "prompts": len(encoded),
        **own,
        "data": None if settings.data is None else str(settings.data),
    }
    seconds = course.earlier + time.perf_counter() - start
    told = course.earlier + audit.forecast
    return Audit(shown, facts, audit.findings, audit.noise, settings.alpha, seconds, told, stopped)


def _prompts(model: SpeculativeModel, settings: AuditSettings) -> list[list[int]]:
    if settings.data is not None:
        return encode(read_prompts(settings.data, settings.limit), model.target)
    return encode(load_prompts("heldout")[: settings.limit], model.target)


class _Running:
    """The state of one audit."""

    def __init__(
        self,
        model: SpeculativeModel,
        settings: AuditSettings,
        prompts: Sequence[list[int]],
        remarks: Console,
        store: Store,
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
        self.unwarped = StockProbs(model.target, greedy, warped=False, own=True)
        self.probs = StockProbs(model.target, settings.sampling, own=True)
        self.exact = model.target.dtype.itemsize >= 4
        self.trees = Trees(settings.trees, model.target.context_length, settings.seed_for("trees"))
        self.findings: list[Finding] = []
        self.noise = Noise()
        self.course = Course(remarks, self._expected(), store)
        store.collect("trees", self.trees)
        self.forecast = self.course.rest()
        self._tell()

    def _expected(self) -> dict[str, float]:
        """Forecast the seconds of every check, as if none were done."""
        self.paces = forecast.Paces.timed(self.model, self.probs, self.prompts, self.settings)
        return self._seconds(self.settings)

    def _seconds(self, settings: AuditSettings) -> dict[str, float]:
        found = forecast.expected(settings, self.paces, list(map(len, self.prompts)), self.samples, self.exact)
        if not comparable(self.probs):
            found.pop(forecast.SEEDED, None)
        return found

    def _tell(self) -> None:
        """Show the forecast before the first check begins."""
        kept, settings = len(self.course.store), self.settings
        if kept:
            line = f"{settings.output_dir}: {self.course.done():.0%} is there already"
            self.remarks.print(line, markup=False, soft_wrap=True)
        line = f"expected to take about {duration(self.forecast)} here; Ctrl-C ends it and keeps what was found"
        if settings.output_dir is None:
            line += ", and with --output-dir it can go on later"
        if not settings.quick and not kept:
            quick = sum(self._seconds(settings.made_quick()).values())
            line += f"; --quick, which sees larger errors only, about {duration(quick)}"
        self.remarks.print(line, style="dim", markup=False, soft_wrap=True)

    def check_everything(self) -> None:
        if self.settings.greedy or not self.samples:
            self.check_greedy()
        if self.samples:
            self.check_sampled()
        with self.stage(forecast.FORWARDS, len(self.trees.kept)) as stage:
            if self.trees.kept:
                self.find(stage, lambda: forwards_finding(self.unwarped, self.trees, self.noise, stage))

    def find(self, stage: Stage, *makes: Callable[[], Finding | None]) -> None:
        """Add the findings of a check, from the store if they were made before."""
        for number, make in enumerate(makes):

            def stored(make: Callable[[], Finding | None] = make) -> dict[str, Any] | None:
                found = make()
                return None if found is None else asdict(found)

            if (found := stage.part(f"finding {number + 1}", stored)) is not None:
                self.findings.append(Finding(**found))

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

    def eagerly(self) -> dict[str, Any]:
        """Return the controller that greedy texts are decoded with, if measured seconds would decide by default."""
        draft = DraftSettings.taken(dict(self.settings.greedy_generation))
        pacer = resolve(draft, self.drafter, self.model.target.device, rows=BATCH).pacer
        return {} if pacer is None or draft.controller is not None else {"controller": Pacer(pacer.settings, EAGER)}

    @contextmanager
    def stage(self, shown: str, total: int) -> Iterator[Stage]:
        """Show a bar; findings that are added within get its seconds."""
        before = len(self.findings)
        with self.course.stage(shown, total) as stage:
            yield stage
        for finding in self.findings[before:]:
            finding.seconds = self.course.seconds[shown]

    def check_greedy(self) -> None:
        settings = self.settings
        generation = {**settings.greedy_generation, **self.eagerly(), "max_new_tokens": settings.max_new_tokens}
        plain_generation = _undrafted(generation)
        few = self.prompts[: forecast.NOISE_PROMPTS]
        batches = [(self.prompts[start : start + BATCH], None) for start in range(0, len(self.prompts), BATCH)]
        with self.stage(forecast.PLAIN, len(self.prompts)) as stage:
            texts, _ = decoded(self.plain, batches, plain_generation, stage)
            plain = [text for batch in texts for text in batch]
        self.measure_noise(plain)
        with self.stage(forecast.STOCK, len(few)) as stage:
            self.find(stage, lambda: plain_finding(self.unwarped, few, plain[: len(few)], self.noise, stage))
        with self.stage(forecast.DRAFTED, 2 * len(self.prompts)) as stage:
            texts, statistics = decoded(self.drafted(listeners=[self.trees]), batches, generation, stage)
            found = [text for batch in texts for text in batch]
            compared = (self.unwarped, self.prompts, plain, found, statistics, self.noise, settings.alpha, stage)
            self.find(stage, lambda: greedy_finding(*compared))
        self.check_twice("candidates_greedy", generation, forecast.TWICE)

    def measure_noise(self, plain: Sequence[list[int]]) -> None:
        few = self.prompts[: min(forecast.NOISE_PROMPTS, len(plain))]
        with self.stage(forecast.NOISE, NOISE_PASSES * len(few)) as stage:
            self.noise = Noise(
                **stage.part("noise", lambda: asdict(measured_noise(self.unwarped, few, plain[: len(few)], stage)))
            )

    def check_twice(self, name: str, generation: dict[str, Any], shown: str) -> None:
        few = self.prompts[: forecast.TWICE_PROMPTS]
        with self.stage(shown, 2) as stage:
            self.find(stage, lambda: twice_finding(self.model, few, generation, self.settings, name, stage))

    def check_sampled(self) -> None:
        settings, target, probs = self.settings, self.model.target, self.probs
        level = settings.alpha / forecast.TESTS
        drafted_generation = {**settings.generation, "max_new_tokens": settings.max_new_tokens}
        self.check_twice("candidates", drafted_generation, forecast.TWICE_SAMPLED)
        prompts = self.prompts[: settings.text_prompts]
        with self.stage(forecast.PLAIN_SAMPLED, len(prompts) * settings.texts) as stage:
            plain_settings = replace(settings, generation=_undrafted(settings.generation))
            plain, _ = sampled_texts(self.plain, prompts, plain_settings, "plain texts", stage)
        if not self.noise.positions:
            self.measure_noise([own[0] for own in plain])
        draws = Draws(Ranks(settings.seed_for("ranks of draws")))
        self.course.store.collect("draws", draws)
        with self.stage(forecast.DRAFTED_SAMPLED, len(prompts) * settings.texts) as stage:
            watched = self.drafted(listeners=[self.trees, draws], chance=Recorder)
            drafted, statistics = sampled_texts(watched, prompts, settings, "drafted texts", stage)
            self.find(
                stage,
                lambda: declared_finding(draws),
                lambda: draws_finding(draws, settings, level),
                lambda: samples_finding(plain, drafted, target.vocab_size, settings),
            )
        ranks = Ranks(settings.seed_for("ranks of tokens"))
        self.course.store.collect("ranks", ranks)
        with self.stage(forecast.LAWS, sum(max(map(len, own)) for own in drafted)) as stage:
            rank_tokens(ranks, probs, prompts, drafted, stage)
            self.find(stage, lambda: tokens_finding(ranks, statistics, settings, level, self.exact))
        if comparable(probs):
            with self.stage(forecast.SEEDED, len(prompts) * (1 + 2 * settings.seeds)) as stage:
                self.find(stage, lambda: seeded_finding(self.model, probs, prompts, settings, stage))
        candidates = list(_prefixes(self.prompts, plain, forecast.CANDIDATES * settings.prefixes))
        with self.stage(forecast.CELLS, len(candidates)) as stage:
            prefixes = chosen_prefixes(probs, candidates, settings, stage)
        planned = plan(prefixes, settings, level)
        with self.stage(forecast.SAMPLES, planned.each * len(prefixes)) as stage:
            self.find(stage, lambda: beginnings_finding(self.model, prefixes, planned, settings, stage))


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
