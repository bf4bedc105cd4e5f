"""The figures of runs: tau, acceptance, speed and its interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from outdraft.core.statistics import Statistics
from outdraft.evaluation.audit.stock import Divergence
from outdraft.evaluation.bench.measure import PLAIN, Run

RESAMPLES = 2000

QUIET = 0.2
"""The largest interquartile range of a round's cost, relative to the median, on a quiet machine."""
FEWEST_PAIRS = 4
"""The fewest pairs that allow to judge the scatter."""

_NAN = float("nan")


@dataclass
class Summary:
    """The figures of one way of decoding over all prompts."""

    name: str
    method: str
    parameters: int
    statistics: Statistics
    """The statistics of all runs added up."""
    tokens: int
    tokens_per_second: float
    """The ratio of all new tokens to all seconds, prefill included."""
    median_tokens_per_second: float
    """The median rate over single answers."""
    decode_tokens_per_second: float
    """The rate of tokens after each answer's first one, prefill excluded; nan where it was not timed apart."""
    first_token_seconds: float
    """The median time to the first token; nan where it was not timed apart."""
    speedup: float
    """The median ratio of tokens per second to plain decoding's, over pairs of the same prompt and repetition."""
    speedup_interval: tuple[float, float]
    """The bootstrap 95% interval of the speed-up, drawn over prompts."""
    mean_rate_speedup: float
    """The ratio of the mean rates over answers, with tokens counted alike on both sides."""
    divergences: list[Divergence] | None
    """The divergences of greedy texts from plain ones; None when sampling, where texts need not be equal."""
    questions: int = 0
    spec_bench_speedup: float = _NAN
    """Spec-Bench's speed-up: the ratio of mean rates, with plain decoding's tokens counted by tokenizing its texts
    anew."""
    over_stock: float = _NAN
    """The speed-up over the `generate` of transformers; nan where that was not in the run."""
    over_stock_interval: tuple[float, float] = (_NAN, _NAN)

    @property
    def timed(self) -> bool:
        """True if the seconds of a round are timed by parts; the stock library's are not."""
        return self.statistics.verify_seconds > 0

    @property
    def milliseconds_per_round(self) -> dict[str, float]:
        """The milliseconds of drafting, verifying and the rest; nan where they are not timed apart."""
        counts = self.statistics
        parts = {"draft": counts.draft_seconds, "verify": counts.verify_seconds, "rest": counts.rest_seconds}
        known = self.timed and counts.rounds > 0
        return {name: 1000 * seconds / counts.rounds if known else _NAN for name, seconds in parts.items()}

    @property
    def identical(self) -> bool | list[dict[str, Any]] | None:
        """True for identical texts, else the list of divergences; None when sampling."""
        if self.divergences is None:
            return None
        return [divergence.as_dict() for divergence in self.divergences] or True

    def headline(self) -> dict[str, Any]:
        """The four figures that matter."""
        return {
            "tau": self.statistics.tau,
            "tokens_per_second": self.tokens_per_second,
            "speedup": self.speedup,
            "identical": self.identical,
        }

    def as_dict(self) -> dict[str, Any]:
        return {
            **self.headline(),
            "method": self.method,
            "drafter_parameters": self.parameters,
            "speedup_interval": list(self.speedup_interval),
            "mean_rate_speedup": self.mean_rate_speedup,
            "spec_bench_speedup": self.spec_bench_speedup,
            "speedup_over_stock": self.over_stock,
            "speedup_over_stock_interval": list(self.over_stock_interval),
            "questions": self.questions,
            "median_tokens_per_second": self.median_tokens_per_second,
            "decode_tokens_per_second": self.decode_tokens_per_second,
            "first_token_seconds": self.first_token_seconds,
            "milliseconds_per_round": self.milliseconds_per_round,
            "tokens": self.tokens,
            **self.statistics.as_dict(),
        }


def summarise(
    name: str,
    method: str,
    parameters: int,
    runs: Sequence[Run],
    plain: Sequence[Run],
    divergences: list[Divergence] | None,
) -> Summary:
    """Compute a contender's figures against the plain runs of the same prompts and repetitions.

    Args:
        plain: the plain runs, in the same order.
        divergences: divergences of its greedy texts; None when sampling.
    """
    answers = [answer for run in runs for answer in run.answers]
    statistics = Statistics.sum(answer.statistics for answer in answers)
    seconds, tokens = sum(run.seconds for run in runs), sum(run.tokens for run in runs)
    prefills = [answer.statistics.prefill_seconds for answer in answers]
    timed = statistics.prefill_seconds > 0
    rates = np.array([run.tokens_per_second for run in runs])
    base = np.array([run.tokens_per_second for run in plain])
    speedup, spread = paired(runs, plain)
    return Summary(
        name=name,
        method=method,
        parameters=parameters,
        statistics=statistics,
        tokens=tokens,
        tokens_per_second=tokens / seconds,
        median_tokens_per_second=float(np.median(rates)),
        decode_tokens_per_second=statistics.emitted / statistics.decode_seconds
        if timed and statistics.rounds
        else _NAN,
        first_token_seconds=float(np.median(prefills)) if timed else _NAN,
        speedup=speedup,
        speedup_interval=spread,
        mean_rate_speedup=float(rates.mean() / base.mean()),
        divergences=divergences,
        questions=len({run.prompt for run in runs}),
    )


def paired(runs: Sequence[Run], base: Sequence[Run]) -> tuple[float, tuple[float, float]]:
    """Compute the speed-up of runs over others of the same prompts and repetitions, in the same order: median over
    pairs, and interval."""
    ratios = np.array([run.tokens_per_second / other.tokens_per_second for run, other in zip(runs, base, strict=True)])
    return float(np.median(ratios)), interval(ratios, [run.prompt for run in runs])


def scattered(runs: Mapping[str, Sequence[Run]]) -> str | None:
    """Return a note where paired rounds scatter more than on a quiet machine.

    The cost of a round, in plain rounds of the same pair, hardly depends on the question, unlike tau. So a wide
    interquartile range of even the steadiest contender means that other load has disturbed the timing.
    """
    spreads = []
    for name, own in runs.items():
        if name == PLAIN:
            continue
        pairs = [(_round_seconds(run), _round_seconds(plain)) for run, plain in zip(own, runs[PLAIN], strict=True)]
        ratios = [one / plain for one, plain in pairs if one and plain]
        if len(ratios) >= FEWEST_PAIRS:
            low, middle, high = np.percentile(ratios, [25, 50, 75])
            spreads.append(float((high - low) / middle))
    if not spreads or min(spreads) <= QUIET:
        return None
    return (
        f"The machine was busy: the time of a round varies by {min(spreads):.0%} or more between prompts. "
        "Close other programs and run it again."
    )


def _round_seconds(run: Run) -> float:
    """Return the seconds of a round; 0 where they were not timed apart."""
    counts = Statistics.sum(answer.statistics for answer in run.answers)
    return counts.decode_seconds / counts.rounds if counts.rounds else 0.0


def interval(ratios: np.ndarray, prompts: Sequence[int]) -> tuple[float, float]:
    """Compute the bootstrap 95% interval of the median; the repetitions of a prompt are drawn together.

    The interval of a single prompt is nan, since it says nothing about others.
    """
    groups = [ratios[np.array(prompts) == prompt] for prompt in sorted(set(prompts))]
    if len(groups) < 2:
        return _NAN, _NAN
    draws = np.random.default_rng(0).integers(len(groups), size=(RESAMPLES, len(groups)))
    if len({len(group) for group in groups}) == 1:
        medians = np.median(np.stack(groups)[draws].reshape(RESAMPLES, -1), axis=1)
    else:
        medians = np.array([np.median(np.concatenate([groups[i] for i in draw])) for draw in draws])
    low, high = np.percentile(medians, [2.5, 97.5])
    return float(low), float(high)
