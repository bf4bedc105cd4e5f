"""Which controller to decode with: all of them in simulated time, on made-up and on recorded drafts.

    OMP_NUM_THREADS=1 python benchmarks/controllers.py [--quick] [--replay drafts.json ...] [--json F] [--plot F]
    OMP_NUM_THREADS=2 python benchmarks/controllers.py --record drafts.json [--model M --draft-model D --temperature T]

Nothing is timed, so the machine may be busy. Every controller meets the same answers (a long draft and its verdict for
every position) and pays the same costs. Regret is how much longer a token takes, in percent, than with the best fixed
length, chosen afterwards, and than with an oracle that knows every verdict beforehand.

A file to replay is a JSON list of {"confidences": [...], "accepted": n}, one long draft for every token position, with
an optional "row" that tells answers apart.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from simulation import Answer, Draft, Run, decode, oracle

from outdraft.api.generation import load
from outdraft.control import Controller, ControlSettings, Costs, Experience, Pacer
from outdraft.control.base import Evidence, FixedController
from outdraft.control.thompson import LEAST, BetaController, CalibratedController, expit, logit
from outdraft.errors import UserError
from outdraft.reference import load_prompts

LIMIT = 8
TOKENS = 128  # of an answer
STEPS = (0.05, 0.1, 0.2, 0.4)  # a draft step, as a share of a one-node pass
SLOPES = (0.01, 0.03)  # a further node, likewise
T_95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 8: 2.36, 10: 2.26}  # two-sided, by repetitions


@dataclass(frozen=True)
class Process:
    """Made-up drafts: levels of varying difficulty around a mean that may move, and what the drafter knows of it."""

    kind: str
    acceptance: float = 0.7  # of a level of middling difficulty; ignored by drifting and bursty
    informed: float = 0.7  # correlation of the confidence's logit with the acceptance's
    spread: float = 1.5  # standard deviation of the acceptance's logit
    shift: float = -1.0  # of the confidence's logit: how far the drafter underrates itself

    def answers(self, count: int, rng: random.Random) -> list[Answer]:
        middle = self._middle(rng)
        return [self._answer(middle, rng) for _ in range(count)]

    def _answer(self, middle: Iterator[float], rng: random.Random) -> Answer:
        """Difficulty belongs to the token position, so that overlapping drafts agree on it."""
        chances, confidences = [], []
        for _ in range(TOKENS + LIMIT):
            centre, own, noise = next(middle), rng.gauss(0, 1), rng.gauss(0, 1)
            chances.append(expit(centre + self.spread * own))
            known = self.informed * own + math.sqrt(1 - self.informed**2) * noise
            confidences.append(expit(centre + self.shift + self.spread * known))
        answer = []
        for position in range(TOKENS):
            accepted = 0
            while accepted < LIMIT and rng.random() < chances[position + accepted]:
                accepted += 1
            answer.append(Draft(confidences[position : position + LIMIT], accepted))
        return answer

    def _middle(self, rng: random.Random) -> Iterator[float]:
        """The logit of a middling level's acceptance, position by position."""
        position, easy, phase = 0, rng.random() < 0.5, rng.uniform(0, 2 * math.pi)
        while True:
            if self.kind == "drifting":  # between 0.18 and 0.92, over about four answers
                yield 0.5 + 2.0 * math.sin(phase + 2 * math.pi * position / 500)
            elif self.kind == "bursty":  # 0.2 or 0.9, changing every 25 tokens on average
                easy ^= rng.random() < 1 / 25
                yield 2.2 if easy else -1.4
            else:
                yield logit(self.acceptance)
            position += 1


PROCESSES = {
    "useless 0.02": Process("stationary", 0.02, informed=0.0, spread=0.5),
    "stationary 0.4": Process("stationary", 0.4),
    "stationary 0.7": Process("stationary", 0.7),
    "stationary 0.9": Process("stationary", 0.9),
    "0.7, uninformed": Process("stationary", 0.7, informed=0.0),
    "0.7, well informed": Process("stationary", 0.7, informed=1.0, shift=0.0),
    "drifting": Process("drifting"),
    "bursty": Process("bursty"),
    "bursty, uninformed": Process("bursty", informed=0.0),
}


class Bernoulli(BetaController):
    """Drafts on with probability theta, whatever a level costs: a rule that was tried."""

    def wants(self, confidences: Sequence[float], nodes: float) -> bool:
        self.theta = self.draw_theta(confidences)
        return torch.rand((), dtype=torch.float64, generator=self.generator).item() < self.theta


class Isotonic:
    """Counts in bins of confidence in place of Platt's line: any rising curve can be learned.

    Adjacent violators are pooled, so that the curve never falls; between bins it is interpolated.

    Args:
        evidence: successes of each bin, then trials; `PRIOR` at first.
    """

    BINS = 12
    PRIOR = (*((k + 0.5) / 12 for k in range(12)), *(1.0,) * BINS)

    def __init__(self, evidence: Evidence):
        self.evidence = evidence

    def levels(self) -> list[float]:
        """The probability at the middle of every bin."""
        pools: list[tuple[float, float, int]] = []  # successes, trials, bins
        for k in range(self.BINS):
            pool = (self.evidence[k], self.evidence[self.BINS + k], 1)
            while pools and pools[-1][0] * pool[1] >= pool[0] * pools[-1][1]:
                above = pools.pop()
                pool = (above[0] + pool[0], above[1] + pool[1], above[2] + pool[2])
            pools.append(pool)
        return [successes / trials for successes, trials, bins in pools for _ in range(bins)]

    def probability(self, confidence: float) -> float:
        levels = self.levels()
        place = min(max(confidence * self.BINS - 0.5, 0.0), self.BINS - 1.0)
        below = min(int(place), self.BINS - 2)
        p = levels[below] + (place - below) * (levels[below + 1] - levels[below])
        return min(max(p, LEAST), 1 - LEAST)

    def observe(self, confidence: float, accepted: bool) -> None:
        k = min(max(int(confidence * self.BINS), 0), self.BINS - 1)
        self.evidence.add(k, float(accepted))
        self.evidence.add(self.BINS + k, 1.0)


class CalibratedByBins(CalibratedController):
    """`calibrated` with isotonic counts."""

    def __init__(self, *given: Any, **options: Any):
        super().__init__(*given, **options)
        self.calibration = Isotonic(self.evidence("isotonic", Isotonic.PRIOR))  # type: ignore[assignment]


CONTENDERS: dict[str, tuple[ControlSettings, type[Controller] | None]] = {
    **{f"fixed {length}": (ControlSettings("fixed"), None) for length in range(1, LIMIT + 1)},
    "confidence": (ControlSettings("confidence"), None),
    "beta worth": (ControlSettings("beta"), None),
    "beta bernoulli": (ControlSettings("beta"), Bernoulli),
    "calibrated platt": (ControlSettings("calibrated"), None),
    "calibrated isotonic": (ControlSettings("calibrated"), CalibratedByBins),
}
"""Name -> settings, and a class that is not the package's."""


def costs_of(step: float, slope: float) -> Costs:
    """In units of a one-node pass; taking in what was decided costs a quarter of a step more."""
    return Costs.fixed(begin=1.25 * step, step=step, verify_base=1.0, verify_per_node=slope, rest=0.03)


def decode_all(name: str, answers: list[Answer], limit: int, truth: Costs, seed: int) -> Run:
    """Answer after answer, each as a row of its own that starts from the experience of those before."""
    total, experience = Run(), Experience()
    settings, kind = CONTENDERS[name]
    for number, answer in enumerate(answers):
        generator = torch.Generator().manual_seed(1000 * seed + number)
        total.add(decode(settings.make(truth, limit, generator, experience, kind), answer, truth))
    return total


def compare(answers: list[Answer], truth: Costs, seed: int) -> dict[str, tuple[float, float, float]]:
    """Of every contender: percent of time per token beyond the best fixed length and beyond the oracle; speed-up."""
    runs = {}
    for name in CONTENDERS:
        limit = int(name.split()[1]) if name.startswith("fixed") else LIMIT
        runs[name] = decode_all(name, answers, limit, truth, seed).seconds_per_token
    plain = truth.plain()
    fixed = min(plain, *(seconds for name, seconds in runs.items() if name.startswith("fixed")))
    known = Run()
    for answer in answers:
        known.add(oracle(answer, LIMIT, truth))
    least = known.seconds_per_token
    return {
        name: (100 * (seconds / fixed - 1), 100 * (seconds / least - 1), plain / seconds)
        for name, seconds in runs.items()
    }


@dataclass
class Finding:
    """One contender on one kind of answers at one cost ratio; means over repetitions, with half a 95% interval."""

    answers: str
    step: float
    slope: float
    contender: str
    over_fixed: float
    over_fixed_interval: float
    over_oracle: float
    over_oracle_interval: float
    speedup: float


def findings(
    name: str, answers: Callable[[int], list[Answer]], repetitions: int, ratios: list[tuple[float, float]]
) -> Iterator[Finding]:
    for step, slope in ratios:
        truth = costs_of(step, slope)
        runs = [compare(answers(seed), truth, seed) for seed in range(repetitions)]
        for contender in CONTENDERS:
            over_fixed, over_oracle, speedup = zip(*(run[contender] for run in runs), strict=True)
            parts = (mean(over_fixed), half_interval(over_fixed), mean(over_oracle), half_interval(over_oracle))
            yield Finding(name, step, slope, contender, *parts, mean(speedup))


def half_interval(values: tuple[float, ...]) -> float:
    """Of the mean, 95%, by Student's t; not a number for a single repetition."""
    count = len(values)
    return T_95.get(count, 2.0) * stdev(values) / math.sqrt(count) if count > 1 else math.nan


def recorded(path: Path) -> list[Answer]:
    """The answers of a file of recorded drafts."""
    try:
        rounds = json.loads(path.read_text())
        rows: dict[Any, list[Draft]] = {}
        for entry in rounds:
            draft = Draft([float(c) for c in entry["confidences"]], int(entry["accepted"]))
            rows.setdefault(entry.get("row"), []).append(draft)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as problem:
        raise UserError(f"{path} is no list of confidences and accepted; see --help ({problem})") from None
    return list(rows.values())


class Recorder(FixedController):
    """Drafts to its limit; keeps what became of the first round."""

    first: Draft | None = None

    def observe(self, confidences: Sequence[float], accepted: int, tokens: int, seconds: float) -> None:
        self.first = self.first or Draft([round(confidence, 3) for confidence in confidences], accepted)


class RecordingPacer(Pacer):
    """Hands out recorders and keeps them."""

    def __init__(self) -> None:
        super().__init__(ControlSettings())
        self.recorders: list[Recorder] = []

    def controller(self, limit: int, seed: int | None = None) -> Controller:
        self.recorders.append(Recorder(self.costs, limit, torch.Generator()))
        return self.recorders[-1]


def record(path: Path, model: str, draft_model: str, temperature: float, count: int) -> None:
    """Answers to held-out prompts, and from every position of them a draft of LIMIT levels with its verdict."""
    speculative, entries = load(model, draft_model), []
    prompts = load_prompts("heldout")
    for row, prompt in enumerate(prompts[:: max(1, len(prompts) // count)][:count]):
        output = speculative.generate(prompt, max_new_tokens=TOKENS, temperature=temperature, seed=row)
        pacer = RecordingPacer()
        prefixes = [output.prompts[0] + output.tokens[0][:position] for position in range(len(output.tokens[0]))]
        for start in range(0, len(prefixes), 16):
            speculative.generate(
                prefixes[start : start + 16],
                max_new_tokens=2,  # the prefill's and one round
                temperature=temperature,
                seed=1000 * row + start,
                num_speculative_tokens=LIMIT,
                candidates="sampled" if temperature else "top-k",
                controller=pacer,
            )
        drafts = [recorder.first for recorder in pacer.recorders if recorder.first]
        entries += [{"row": row, **asdict(draft)} for draft in drafts]
        path.write_text(json.dumps(entries, separators=(",", ":")))


def print_tables(found: list[Finding], console: Console) -> None:
    """A table for every kind of answers: contenders by cost ratios, regret against the best fixed length."""
    for answers in dict.fromkeys(finding.answers for finding in found):
        own = [finding for finding in found if finding.answers == answers]
        ratios = list(dict.fromkeys((finding.step, finding.slope) for finding in own))
        table = Table(title=f"{answers}: % over best fixed length, mean over costs and by step/slope")
        for column in ("controller", "mean", "over oracle", *(f"{step:g}/{slope:g}" for step, slope in ratios)):
            table.add_column(column, justify="left" if column == "controller" else "right")
        for contender in CONTENDERS:
            cells = {(f.step, f.slope): f for f in own if f.contender == contender}
            shown = [f"{cells[r].over_fixed:.1f} ± {cells[r].over_fixed_interval:.1f}" for r in ratios]
            overall = (mean(f.over_fixed for f in cells.values()), mean(f.over_oracle for f in cells.values()))
            table.add_row(contender, *(f"{value:.1f}" for value in overall), *shown)
        console.print(table)


def plot(found: list[Finding], path: Path) -> None:
    """Regret against the best fixed length, bars for every kind of answers; HTML, or an image by its suffix."""
    try:
        from plotly import graph_objects, subplots
    except ImportError:
        raise UserError("plots need plotly: pip install 'outdraft[report]'") from None
    kinds = list(dict.fromkeys(finding.answers for finding in found))
    figure = subplots.make_subplots(rows=len(kinds), cols=1, subplot_titles=kinds, shared_xaxes=True)
    for row, kind in enumerate(kinds, start=1):
        for step in dict.fromkeys(finding.step for finding in found):
            heights = [
                mean(f.over_fixed for f in found if (f.answers, f.step, f.contender) == (kind, step, contender))
                for contender in CONTENDERS
            ]
            bars = graph_objects.Bar(name=f"step {step:g}", x=list(CONTENDERS), y=heights, showlegend=row == 1)
            figure.add_trace(bars, row=row, col=1)
        figure.update_yaxes(title_text="% over best fixed", range=[-15, 60], row=row, col=1)
    figure.update_layout(height=260 * len(kinds), title="Time per token over the best fixed length")
    if path.suffix == ".html":
        figure.write_html(path, include_plotlyjs="cdn")
    else:
        figure.write_image(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replay", type=Path, nargs="+", default=[], help="recorded drafts, beside the made-up ones")
    parser.add_argument("--record", type=Path, help="record drafts of a real model there, and do nothing else")
    parser.add_argument("--model", default="reference")
    parser.add_argument("--draft-model", default="reference")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--only-replay", action="store_true")
    parser.add_argument("--answers", type=int, default=24, help="made-up answers a repetition, or answers recorded")
    parser.add_argument("--repetitions", type=int, default=4)
    parser.add_argument("--quick", action="store_true", help="one cost ratio, two repetitions, few answers")
    parser.add_argument("--without-experience", action="store_true", help="every answer starts afresh")
    parser.add_argument("--json", type=Path, help="write all figures there")
    parser.add_argument("--plot", type=Path, help="write a plot there: .html, or an image with kaleido installed")
    given = parser.parse_args()
    ratios = [(0.1, 0.01)] if given.quick else [(step, slope) for step in STEPS for slope in SLOPES]
    repetitions, count = (2, 8) if given.quick else (given.repetitions, given.answers)
    if given.without_experience:
        CONTENDERS.update({name: (replace(settings, memory=0), kind) for name, (settings, kind) in CONTENDERS.items()})
    try:
        if given.record:
            record(given.record, given.model, given.draft_model, given.temperature, given.answers)
            return
        found: list[Finding] = []
        for path in given.replay:
            drafts = recorded(path)
            found += findings(path.stem, lambda seed, drafts=drafts: drafts, repetitions, ratios)  # type: ignore[misc]
        for name, process in {} if given.only_replay else PROCESSES.items():
            make = lambda seed, process=process: process.answers(count, random.Random(seed))  # noqa: E731
            found += findings(name, make, repetitions, ratios)
        print_tables(found, Console())
        if given.json:
            given.json.write_text(json.dumps([asdict(finding) for finding in found], indent=1))
        if given.plot:
            plot(found, given.plot)
    except UserError as problem:
        raise SystemExit(f"error: {problem}") from None


if __name__ == "__main__":
    main()
