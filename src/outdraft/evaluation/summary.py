"""Figures from runs: tau, acceptance, speed and its interval. Words as in the field; knows nothing of models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from outdraft.evaluation.identity import Divergence
from outdraft.evaluation.measure import Run
from outdraft.statistics import Statistics

RESAMPLES = 2000


@dataclass
class Summary:
    """What one way of decoding did over all prompts."""

    name: str
    method: str
    parameters: int
    statistics: Statistics
    """Of all runs added up."""
    tokens: int
    tokens_per_second: float
    """All new tokens over all seconds, prefill included."""
    median_tokens_per_second: float
    """Of single answers."""
    decode_tokens_per_second: float
    """Tokens after each answer's first one over the seconds after the prefill; nan where these were not taken apart."""
    first_token_seconds: float
    """Median time to the first token; nan where it was not taken apart."""
    speedup: float
    """Median, over pairs of the same prompt and repetition, of the ratio of tokens per second to plain decoding's."""
    speedup_interval: tuple[float, float]
    """Bootstrap 95% interval of the speed-up, drawn over prompts."""
    divergences: list[Divergence] | None
    """Where greedy texts part from plain ones; None when sampling, where texts need not be equal."""

    @property
    def identical(self) -> bool | list[dict[str, Any]] | None:
        """True, or the list of divergences; None when sampling."""
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
        """Everything, for JSON."""
        return {
            **self.headline(),
            "method": self.method,
            "drafter_parameters": self.parameters,
            "speedup_interval": list(self.speedup_interval),
            "median_tokens_per_second": self.median_tokens_per_second,
            "decode_tokens_per_second": self.decode_tokens_per_second,
            "first_token_seconds": self.first_token_seconds,
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
    """The figures of one contender's runs against the plain runs of the same prompts and repetitions."""
    statistics = Statistics.sum(run.answer.statistics for run in runs)
    seconds, tokens = sum(run.answer.seconds for run in runs), sum(len(run.answer.tokens) for run in runs)
    prefills = [run.answer.statistics.prefill_seconds for run in runs]
    timed = statistics.prefill_seconds > 0
    ratios = np.array([_rate(own) / _rate(base) for own, base in zip(runs, plain, strict=True)])
    return Summary(
        name=name,
        method=method,
        parameters=parameters,
        statistics=statistics,
        tokens=tokens,
        tokens_per_second=tokens / seconds,
        median_tokens_per_second=float(np.median([_rate(run) for run in runs])),
        decode_tokens_per_second=statistics.emitted / statistics.decode_seconds
        if timed and statistics.rounds
        else _NAN,
        first_token_seconds=float(np.median(prefills)) if timed else _NAN,
        speedup=float(np.median(ratios)),
        speedup_interval=interval(ratios, [run.prompt for run in runs]),
        divergences=divergences,
    )


_NAN = float("nan")


def interval(ratios: np.ndarray, prompts: Sequence[int], seed: int = 0) -> tuple[float, float]:
    """Bootstrap 95% interval of the median; the repetitions of a prompt are drawn together."""
    groups = [ratios[np.array(prompts) == prompt] for prompt in sorted(set(prompts))]
    draws = np.random.default_rng(seed).integers(len(groups), size=(RESAMPLES, len(groups)))
    medians = [np.median(np.concatenate([groups[i] for i in draw])) for draw in draws]
    low, high = np.percentile(medians, [2.5, 97.5])
    return float(low), float(high)


def _rate(run: Run) -> float:
    """Tokens per second of one answer."""
    return len(run.answer.tokens) / run.answer.seconds
