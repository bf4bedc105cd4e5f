"""Measurements of several ways of decoding over the same prompts, in turns.

For each prompt and repetition every contender decodes once, in rotating order, so that a temporary slow-down of the
machine hits all of them. `summary.py` computes figures, `divergences.py` judges texts, `baselines.py` has the stock
library's own ways of decoding.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from outdraft.api.generation import SpeculativeModel
from outdraft.core.statistics import Statistics
from outdraft.drafting.base import Drafter
from outdraft.target.target import Target

PLAIN = "plain"
"""The name of the contender that all others are compared with: the target without a drafter, in the same loop."""

WARM_UP_TOKENS = 16


@dataclass
class Answer:
    """The answer of one decoding of a prompt."""

    tokens: list[int]
    seconds: float
    """The wall-clock time, prefill included."""
    statistics: Statistics
    accepted: list[bool] = field(default_factory=list)
    """A flag for every token: True if it was an accepted draft token."""


@dataclass(frozen=True)
class Contender:
    """A way of decoding that is compared."""

    name: str
    decode: Callable[[list[int], dict[str, Any]], Answer]
    """The function from a prompt's token ids and settings of `generate` to an answer."""
    method: str
    parameters: int = 0
    """The number of parameters of its drafter."""


@dataclass
class Run:
    """One contender's answers to one prompt in one repetition."""

    prompt: int
    repetition: int
    answer: Answer
    """The answer to the first turn, as a rule the only one."""
    later: list[Answer] = field(default_factory=list)
    """The answers to the turns after it."""

    @property
    def answers(self) -> list[Answer]:
        """The answers to every turn."""
        return [self.answer, *self.later]

    @property
    def tokens(self) -> int:
        """The number of new tokens of all turns, an end-of-sequence token included."""
        return sum(len(answer.tokens) for answer in self.answers)

    @property
    def seconds(self) -> float:
        return sum(answer.seconds for answer in self.answers)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


Script = Callable[[list[list[int]]], list[int] | None]
"""A conversation, as a function from the answers' tokens so far to the next prompt's token ids, None at the end."""

Pair = Mapping[str, Run]
"""The runs of all contenders on one prompt and repetition, by name."""


def speculative(name: str, target: Target, drafter: Drafter | None, *, ngrams: bool = False, **tree: Any) -> Contender:
    """Make a contender of outdraft's decoding with a drafter, or plain with None.

    Args:
        ngrams: True for n-gram drafts in its place where texts repeat, as `generate` does by default.
        **tree: as in `generate`.
    """
    model = SpeculativeModel(target, drafter)
    if drafter is not None and not drafter.limits.looks_back and not ngrams:
        tree["prompt_lookup_min"] = 0

    def decode(prompt: list[int], settings: dict[str, Any]) -> Answer:
        output = model.generate(prompt, **settings, **tree)
        return Answer(output.tokens[0], output.seconds, output.statistics, output.accepted[0])

    return Contender(name, decode, model.method, drafter.num_parameters if drafter is not None else 0)


def compare(
    contenders: Sequence[Contender],
    prompts: Sequence[list[int] | Script],
    *,
    repetitions: int = 1,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    progress: Callable[[], None] = lambda: None,
    known: Mapping[tuple[int, int], Pair] | None = None,
    completed: Callable[[int, int, Pair], None] = lambda prompt, repetition, pair: None,
    end: float | None = None,
) -> dict[str, list[Run]]:
    """Let every contender decode every prompt `repetitions` times, after a short warm-up that does not count.

    Args:
        contenders: contenders with distinct names.
        prompts: token ids, or conversations whose later prompts depend on a contender's own answers.
        seed: the same draws begin with the same seed for all.
        progress: called after every contender's run.
        known: pairs measured before, by prompt and repetition, which are not measured again.
        completed: called as soon as all contenders have answered a prompt in a repetition.
        end: deadline by `time.perf_counter`; no pair but the first begins after it. None is no deadline.

    Returns:
        Runs by the contender's name, in the same order of prompts and repetitions for all.
    """
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature}
    scripts = [script_of(prompt) for prompt in prompts]
    known = known or {}
    turns = [divmod(turn, repetitions) for turn in range(len(prompts) * repetitions)]
    if any(place not in known for place in turns):
        short = {**settings, "max_new_tokens": min(WARM_UP_TOKENS, max_new_tokens), "seed": seed}
        first_prompt = scripts[0]([])
        assert first_prompt is not None
        for contender in contenders:
            contender.decode(first_prompt, short)
    runs: dict[str, list[Run]] = {contender.name: [] for contender in contenders}
    for turn, (place, repetition) in enumerate(turns):
        if end is not None and turn > 0 and time.perf_counter() > end:
            break
        pair = dict(known.get((place, repetition), {}))
        if not pair:
            first = turn % len(contenders)
            for contender in (*contenders[first:], *contenders[:first]):
                answers = converse(contender, scripts[place], {**settings, "seed": seed + repetition})
                pair[contender.name] = Run(place, repetition, answers[0], answers[1:])
                progress()
            completed(place, repetition, pair)
        for name, own in runs.items():
            own.append(pair[name])
    return runs


def script_of(prompt: list[int] | Script) -> Script:
    """Turn a single prompt into a conversation of one turn."""
    if callable(prompt):
        return prompt
    return lambda answers: None if answers else prompt


def converse(contender: Contender, script: Script, settings: dict[str, Any]) -> list[Answer]:
    """Answer every turn of a conversation, each after the contender's own answers to those before it."""
    answers: list[Answer] = []
    while (prompt := script([answer.tokens for answer in answers])) is not None:
        answers.append(contender.decode(prompt, settings))
    return answers
