"""The audit from end to end: which checks run on what, in which order, and the verdict.

Ties the rooms of the audit together; every decision is made in one of them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

from rich.console import Console

from outdraft.errors import UserError
from outdraft.evaluation.audit.beginnings import beginnings_finding, chosen_places, plan
from outdraft.evaluation.audit.findings import Finding, judge
from outdraft.evaluation.audit.forwards import Trees, forwards_finding
from outdraft.evaluation.audit.greedy import greedy_finding, plain_finding, texts
from outdraft.evaluation.audit.noise import Noise, measured_noise
from outdraft.evaluation.audit.progress import Stage, stage
from outdraft.evaluation.audit.proposals import Draws, draws_findings, twice_finding
from outdraft.evaluation.audit.ranks import Ranks
from outdraft.evaluation.audit.settings import AuditSettings
from outdraft.evaluation.audit.stock import Laws
from outdraft.evaluation.audit.texts import sampled_texts, samples_finding, token_ranks, tokens_finding
from outdraft.evaluation.audit.watch import Recorder, Watch
from outdraft.evaluation.environment import environment
from outdraft.evaluation.prompts import encode, read_prompts
from outdraft.generation import SpeculativeModel
from outdraft.reference import load_prompts
from outdraft.sampling import SamplingSettings
from outdraft.settings import (
    LOOKUP_SETTINGS,
    TREE_SETTINGS,
    model_settings,
    pacer_of,
    repeats_of,
    sampling_settings,
    tree_shape,
)

NOISE_PROMPTS = 8
TWICE_PROMPTS = 4
CANDIDATES = 3
"""Prefixes looked at for each that is chosen."""
OFFSETS = (0, 2, 5, 9)
"""New tokens of a plain text that prefixes take along, so that not all of them end where a prompt does."""
TESTS = 4
"""Statistical tests at most, for sizes: the first of Holm's levels."""


@dataclass
class Audit:
    """What was found, and the verdict.

    Attributes:
        settings: of the audit and the model, for reports.
        environment: machine, versions, precision, backend.
        findings: in the order of the checks.
        noise: of this model, precision and backend.
        alpha: level of the statistical tests together.
        seconds: of the whole audit.
    """

    settings: dict[str, Any]
    environment: dict[str, Any]
    findings: list[Finding]
    noise: Noise
    alpha: float
    seconds: float

    @property
    def kept(self) -> bool:
        """Whether every check passed."""
        return all(finding.passed for finding in self.findings)

    @property
    def verdict(self) -> str:
        """In one sentence."""
        if self.kept:
            return f"KEPT: no check found the output to differ from what the target alone gives.{self._unseen}"
        failed = [finding.name for finding in self.findings if not finding.passed]
        return f"NOT KEPT: the output differs from what the target alone gives ({', '.join(failed)})."

    @property
    def _unseen(self) -> str:
        """A warning where too little happened to be seen."""
        runs = [finding.figures["drafting"] for finding in self.findings if "drafting" in finding.figures]
        if not any(run["drafted"] for run in runs):
            return " But nothing was drafted, so this says nothing of the drafter."
        if not any(run["accepted"] for run in runs):
            return " But no candidate was ever accepted, so this says little: try a better drafter or other prompts."
        return ""

    def __getitem__(self, name: str) -> Finding:
        return next(finding for finding in self.findings if finding.name == name)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "kept": self.kept,
            "verdict": self.verdict,
            "alpha": self.alpha,
            "seconds": self.seconds,
            "checks": {finding.name: finding.as_dict() for finding in self.findings},
            "noise": self.noise.as_dict(),
            "settings": self.settings,
            "environment": self.environment,
        }


def run_audit(
    model: SpeculativeModel,
    settings: AuditSettings,
    remarks: Console | None = None,
    prompts: Sequence[list[int]] | None = None,
    about: dict[str, Any] | None = None,
) -> Audit:
    """Check whether `model` with these settings gives what its target alone would.

    Args:
        model: target and drafter.
        settings: what to check.
        remarks: where progress goes; nowhere when None.
        prompts: token ids, in place of those that the settings name.
        about: names for the report, such as the model's.

    Raises:
        UserError: there is no drafter, or the prompts or settings cannot work.
    """
    if model.drafter is None:
        raise UserError("there is no drafter to verify; give --draft-model, or --method prompt-lookup")
    start = time.perf_counter()
    encoded = list(prompts[: settings.limit]) if prompts is not None else _prompts(model, settings)
    audit = _Running(model, settings, encoded, remarks or Console(quiet=True))
    if settings.greedy or not audit.samples:
        audit.check_greedy()
    if audit.samples:
        audit.check_sampled()
    audit.check_forwards()
    judge(audit.findings, settings.alpha)
    shown = {
        **(about or {}),
        "method": model.method,
        "prompts": len(encoded),
        **{name: value for name, value in asdict(settings).items() if name != "limit"},
        "data": None if settings.data is None else str(settings.data),
    }
    seconds = time.perf_counter() - start
    return Audit(shown, environment(model.target), audit.findings, audit.noise, settings.alpha, seconds)


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
        greedy = {name: value for name, value in settings.greedy_generation.items() if name in settings.sampling}
        self.unwarped = Laws(model.target, greedy, warped=False)
        self.trees = Trees(settings.trees, model.target.context_length, settings.seed)
        self.findings: list[Finding] = []
        self.noise = Noise()

    def _checked(self) -> SamplingSettings:
        """The sampling settings; whatever is wrong with any setting is said before anything runs."""
        generation = dict(self.settings.generation)
        tree = {name: generation.pop(name) for name in TREE_SETTINGS if name in generation}
        lookup = {name: generation.pop(name) for name in LOOKUP_SETTINGS if name in generation}
        repeats_of(self.drafter, lookup)
        controlled = pacer_of(generation.pop("controller", None), tree) is not None
        sampling = sampling_settings(generation, model_settings(self.model.target))
        tree_shape(self.drafter, self.model.target.device, tree, sampling.temperature > 0, controlled)
        return sampling

    def drafted(self, **watching: Any) -> SpeculativeModel:
        """The model with its drafter under watch; what controllers learn stays with it."""
        watched = self.model.with_drafter(Watch(self.drafter, **watching))
        watched._pacers = self.model._pacers
        return watched

    @contextmanager
    def stage(self, title: str, total: int) -> Iterator[Stage]:
        """A bar; findings that are added within have its seconds."""
        before, start = len(self.findings), time.perf_counter()
        with stage(self.remarks, title, total) as advance:
            yield advance
        for finding in self.findings[before:]:
            finding.seconds = time.perf_counter() - start

    def check_greedy(self) -> None:
        settings = self.settings
        generation = {**settings.greedy_generation, "max_new_tokens": settings.max_new_tokens}
        plain_generation = _without_tree(generation)
        few = self.prompts[:NOISE_PROMPTS]
        with self.stage("plain greedy texts", len(self.prompts)) as advance:
            plain, _ = texts(self.plain, self.prompts, plain_generation, advance)
        self.measure_noise(plain)
        with self.stage("plain decoding against the stock model", len(few)) as advance:
            self.findings.append(plain_finding(self.unwarped, few, plain[: len(few)], self.noise, advance))
        with self.stage("drafted greedy texts", 2 * len(self.prompts)) as advance:
            found, statistics = texts(self.drafted(listeners=[self.trees]), self.prompts, generation, advance)
            self.findings.append(
                greedy_finding(
                    self.unwarped, self.prompts, plain, found, statistics, self.noise, settings.alpha, advance
                )
            )
        self.check_twice("candidates_greedy", generation)

    def measure_noise(self, plain: Sequence[list[int]]) -> None:
        few = self.prompts[: min(NOISE_PROMPTS, len(plain))]
        with self.stage("rounding noise of the stock model", len(few)) as advance:
            self.noise = measured_noise(self.unwarped, few, plain[: len(few)], lambda: advance(1))

    def check_twice(self, name: str, generation: dict[str, Any]) -> None:
        with self.stage("candidates drafted twice", 2) as advance:
            found = twice_finding(
                self.model, self.prompts[:TWICE_PROMPTS], generation, self.settings.seed, name, advance
            )
            if found is not None:
                self.findings.append(found)

    def check_sampled(self) -> None:
        settings, target = self.settings, self.model.target
        laws = Laws(target, settings.sampling)
        level = settings.alpha / TESTS
        self.check_twice("candidates", {**settings.generation, "max_new_tokens": settings.max_new_tokens})
        prompts = self.prompts[: settings.text_prompts]
        with self.stage("plain sampled texts", len(prompts)) as advance:
            plain_settings = replace(settings, generation=_without_tree(settings.generation))
            plain, _ = sampled_texts(self.plain, prompts, plain_settings, settings.seed, advance)
        if not self.noise.positions:
            self.measure_noise([own[0] for own in plain])
        draws = Draws(Ranks(settings.seed + 5))
        with self.stage("drafted sampled texts", len(prompts)) as advance:
            watched = self.drafted(listeners=[self.trees, draws], chance=Recorder)
            drafted, statistics = sampled_texts(watched, prompts, settings, settings.seed + 7_000_003, advance)
            self.findings += draws_findings(draws, settings, level)
            self.findings.append(samples_finding(plain, drafted, target.vocab_size, settings))
        with self.stage("exact laws along the texts", len(prompts)) as advance:
            ranks = token_ranks(laws, prompts, drafted, settings.seed + 6, advance)
            exact = target.dtype.itemsize >= 4
            self.findings.append(tokens_finding(ranks, statistics, settings, level, exact))
        self.check_beginnings(laws, plain, level)

    def check_beginnings(self, laws: Laws, plain: Sequence[list[list[int]]], level: float) -> None:
        settings = self.settings
        candidates = list(_prefixes(self.prompts, plain, CANDIDATES * settings.prefixes))
        with self.stage("exact laws of the first tokens", len(candidates)) as advance:
            places = chosen_places(laws, candidates, settings, advance)
        planned = plan(places, settings, level)
        with self.stage("samples of the first tokens", planned.each * len(places)) as advance:
            self.findings.append(beginnings_finding(self.model, places, planned, settings, advance))

    def check_forwards(self) -> None:
        with self.stage("trees node by node", len(self.trees.kept)) as advance:
            if self.trees.kept:
                self.findings.append(forwards_finding(self.unwarped, self.trees, self.noise, advance))


def _prefixes(prompts: Sequence[list[int]], plain: Sequence[list[list[int]]], most: int) -> Iterator[list[int]]:
    """Prompts, shortest first as they cost least, some of them with the beginning of a plain text."""
    order = sorted(range(len(plain)), key=lambda i: len(prompts[i]))
    for number in range(most):
        place = order[number % len(order)]
        turn = number // len(order)
        text = plain[place][turn % len(plain[place])]
        offset = OFFSETS[(number + turn) % len(OFFSETS)]
        yield [*prompts[place], *text[: min(offset, max(0, len(text) - 1))]]


def _without_tree(generation: dict[str, Any]) -> dict[str, Any]:
    """What plain decoding takes of the settings."""
    return {
        name: value
        for name, value in generation.items()
        if name not in (*TREE_SETTINGS, *LOOKUP_SETTINGS, "controller")
    }
