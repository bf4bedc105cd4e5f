"""Several ways of decoding over the same prompts, in turns.

For each prompt and repetition every contender decodes once, in rotating order, so that whatever slows the machine down
for a while slows all of them down. Knows how to run and to time; figures are made in `summary.py`, judgements on texts
in `identity.py`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from outdraft.drafters.base import Drafter
from outdraft.generation import SpeculativeModel
from outdraft.statistics import Statistics
from outdraft.target import Target

PLAIN = "plain"
"""The contender that all others are compared with: the target alone, in the same loop."""

WARM_UP_TOKENS = 16


@dataclass
class Answer:
    """One prompt decoded once."""

    tokens: list[int]
    seconds: float
    """Wall-clock, prefill included."""
    statistics: Statistics
    accepted: list[bool] = field(default_factory=list)
    """For every token, whether a drafter had guessed it."""


@dataclass(frozen=True)
class Contender:
    """One way of decoding."""

    name: str
    decode: Callable[[list[int], dict[str, Any]], Answer]
    """Token ids of a prompt, settings of `generate` -> answer."""
    method: str
    parameters: int = 0
    """Of its drafter."""


@dataclass
class Run:
    """An answer and where it belongs."""

    prompt: int
    repetition: int
    answer: Answer


def speculative(name: str, target: Target, drafter: Drafter | None, **tree: Any) -> Contender:
    """Our decoding with a drafter, or plainly with None; `tree` as in `generate`."""
    model = SpeculativeModel(target, drafter)

    def decode(prompt: list[int], settings: dict[str, Any]) -> Answer:
        output = model.generate(prompt, **settings, **tree)
        return Answer(output.tokens[0], output.seconds, output.statistics, output.accepted[0])

    return Contender(name, decode, model.method, drafter.num_parameters if drafter is not None else 0)


def stock(target: Target) -> Contender:
    """The `generate` of transformers on the same model object, backend included."""
    model: Any = target.model
    ends = target.eos_token_ids

    def decode(prompt: list[int], settings: dict[str, Any]) -> Answer:
        ids = torch.tensor([prompt], device=target.device)
        temperature = settings.get("temperature", 0)
        chosen = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
        most = min(settings["max_new_tokens"], target.context_length - len(prompt))
        with torch.random.fork_rng(devices=[target.device] if target.device.type == "cuda" else []):
            torch.manual_seed(settings.get("seed", 0))
            start = time.perf_counter()
            output = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=most,
                eos_token_id=ends or None,
                pad_token_id=ends[0] if ends else 0,
                **chosen,
            )
            tokens = output[0, len(prompt) :].tolist()
            seconds = time.perf_counter() - start
        counts = Statistics(rounds=len(tokens) - 1, emitted=len(tokens) - 1)
        return Answer(tokens, seconds, counts, [False] * len(tokens))

    return Contender("transformers generate", decode, "none")


def compare(
    contenders: Sequence[Contender],
    prompts: Sequence[list[int]],
    *,
    repetitions: int = 1,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    progress: Callable[[], None] = lambda: None,
) -> dict[str, list[Run]]:
    """Let every contender decode every prompt `repetitions` times, after a short warm-up that does not count.

    Args:
        contenders: by distinct names.
        prompts: token ids.
        repetitions: of every pair.
        max_new_tokens: of every answer.
        temperature: 0 is greedy.
        seed: the same draws begin with the same seed for all.
        progress: called after every answer.

    Returns:
        Runs by the contender's name, in the same order of prompts and repetitions for all.
    """
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature}
    for contender in contenders:
        contender.decode(prompts[0], {**settings, "max_new_tokens": min(WARM_UP_TOKENS, max_new_tokens), "seed": seed})
    runs: dict[str, list[Run]] = {contender.name: [] for contender in contenders}
    for turn in range(len(prompts) * repetitions):
        place, repetition = divmod(turn, repetitions)
        first = turn % len(contenders)
        for contender in (*contenders[first:], *contenders[:first]):
            answer = contender.decode(prompts[place], {**settings, "seed": seed + repetition})
            runs[contender.name].append(Run(place, repetition, answer))
            progress()
    return runs
