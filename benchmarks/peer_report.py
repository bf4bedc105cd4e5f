"""The tables and the JSON of `peers.py`: contenders beside our plain decoding and llama.cpp's. Measures nothing."""

from __future__ import annotations

import math
import statistics
from typing import Any

from outdraft.evaluation.bench.result import BenchResult, Comparison, temperature_name
from outdraft.evaluation.bench.summary import Summary, paired
from outdraft.output import number

LLAMA = "llama.cpp bf16"
"""The contender that ratios are given to, beside our plain decoding."""
NAN = float("nan")


def over_llama(one: Comparison, group: str | None = None) -> dict[str, tuple[float, tuple[float, float]]]:
    """By contender, how much faster it is than llama.cpp on the same weights, with its interval; nan without that."""
    places = {i for i, question in enumerate(one.questions) if group in (None, question.group)}
    runs = {name: [run for run in own if run.prompt in places] for name, own in one.runs.items()}
    none = (NAN, (NAN, NAN))
    return {name: paired(own, runs[LLAMA]) if LLAMA in runs else none for name, own in runs.items()}


def ratio(value: float, spread: tuple[float, float]) -> str:
    """With its interval; a dash where there is none."""
    return f"{number(value)}x [{number(spread[0])}, {number(spread[1])}]" if math.isfinite(value) else "-"


def agreement(summary: Summary) -> str:
    """How many answers are those of our plain decoding, and how far the others go with it."""
    if summary.divergences is None:
        return "-"
    parted = summary.divergences
    text = f"{summary.questions - len(parted)} of {summary.questions}"
    if parted:
        median = statistics.median(one.position for one in parted)
        text += f"; others part after {median:.0f} tokens (median), {sum(one.tie for one in parted)} at near-ties"
    return text


def markdown(result: BenchResult) -> str:
    """All tables."""
    facts, settings = result.environment, result.settings
    lines = [
        "# What else there is",
        "",
        f"`{settings['model']}`, {facts['dtype']}, {facts['cpu']}, {facts['threads']} threads; ours on the "
        f"{facts['backend']} backend. {settings['prompts']} questions ({settings['suite']}), "
        f"{settings['repetitions']} repetitions, {settings['max_new_tokens']} new tokens at most, contenders in "
        "rotating order. "
        f"Load average before {facts['load_average']}, after {facts['load_average_at_the_end']}.",
        "",
        "Tokens/s are medians over questions, the prefill included; then after the first token, over all questions. "
        "Ratios are medians over pairs of the same question, with bootstrap 95% intervals; tau is tokens a target "
        "forward. An engine that rounds elsewhere (llama.cpp keeps activations in float32) parts from bfloat16 at "
        "near-ties, which says nothing of which is nearer to the weights.",
    ]
    for one in result.comparisons:
        against = over_llama(one)
        lines += [
            "",
            f"## {temperature_name(one.temperature)}",
            "",
            f"| | tau | tokens/s | after the first | first token, ms | over plain | over {LLAMA} | answers as plain |",
            "|---|---|---|---|---|---|---|---|",
        ]
        lines += [
            f"| {s.name} | {number(s.statistics.tau)} | {number(s.median_tokens_per_second, '.1f')} "
            f"| {number(s.decode_tokens_per_second, '.1f')} | {number(1000 * s.first_token_seconds, '.0f')} "
            f"| {ratio(s.speedup, s.speedup_interval)} | {ratio(*against[s.name])} | {agreement(s)} |"
            for s in one.summaries
        ]
        if len(one.groups) > 1:
            lines += ["", *by_task(one)]
    for left in result.left_out:
        lines += ["", f"Left out: {left.source}: {left.reason}"]
    return "\n".join(lines) + "\n"


def by_task(one: Comparison) -> list[str]:
    """Tokens a second and the ratio to llama.cpp of every task."""
    heads = [f"{group} ({summaries[0].questions})" for group, summaries in one.groups.items()]
    against = {group: over_llama(one, group) for group in one.groups}
    compared = LLAMA in one.runs
    title = f"tokens/s (over {LLAMA})" if compared else "tokens/s"
    lines = [f"| {title} | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for place, summary in enumerate(one.summaries):
        cells = [
            f"{summaries[place].median_tokens_per_second:.1f}"
            + (f" ({against[group][summary.name][0]:.2f}x)" if compared else "")
            for group, summaries in one.groups.items()
        ]
        lines.append(f"| {summary.name} | {' | '.join(cells)} |")
    return lines


def as_json(result: BenchResult, engines: dict[str, Any]) -> dict[str, Any]:
    """Everything, the engines' own facts and the ratios to llama.cpp included."""
    found = result.as_dict()
    found["environment"]["engines"] = engines
    for one, record in zip(result.comparisons, found["results"], strict=True):
        for name, (value, spread) in over_llama(one).items():
            record["methods"][name] |= {"speedup_over_llama": value, "speedup_over_llama_interval": list(spread)}
    return found
