"""Measurements of several ways of decoding over the same prompts, in turns, and how their greedy texts differ.

For each prompt and repetition every contender decodes once, in rotating order, so that a temporary slow-down of the
machine hits all of them. `summary.py` computes figures, `baselines.py` has the stock library's own ways of decoding.

In low precision a forward over many tokens rounds differently from one over a single token, so that texts can diverge
where the two best tokens are nearly equal. A divergence is called a tie only if the gap lies within that measured
noise. Gaps and noise come from the stock model's own forward (`audit/stock.py`), which uses no cache, tree or mask of
outdraft.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from outdraft.api.generation import SpeculativeModel
from outdraft.core.statistics import Statistics
from outdraft.data.text import common_length
from outdraft.drafting.base import Drafter
from outdraft.evaluation.audit.stock import Divergence, Noise, StockProbs, measured_noise, stock_logits
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


NOISE_TEXTS = 8
"""The number of plain texts with a divergence over which rounding is measured, as many as in the audit."""


@dataclass(frozen=True)
class Difference:
    """Two different texts after one prompt."""

    prompt: int
    """The prompt's number, from 0."""
    ids: list[int]
    """The prompt's token ids."""
    plain: list[int]
    """The new tokens of plain decoding."""
    other: list[int]
    turn: int = 0
    """The turn of the conversation, from 0."""

    @property
    def position(self) -> int:
        """The index of the first new token that differs; the shorter text's length where that text ends."""
        return common_length(self.plain, self.other)


@torch.inference_mode()
def divergences(target: Target, differences: Sequence[Difference]) -> list[Divergence]:
    """Judge differing texts, all against the same noise.

    Args:
        differences: differences of all prompts and contenders; those from one plain text share one run over it.

    Returns:
        One divergence for every difference, in their order.
    """
    leaving: dict[tuple[int, int], list[int]] = defaultdict(list)
    for index, one in enumerate(differences):
        leaving[one.prompt, one.turn].append(index)
    left = [differences[indices[0]] for indices in leaving.values()]
    few = left[:NOISE_TEXTS]
    probs = StockProbs(target, {}, warped=False)
    noise = measured_noise(probs, [one.ids for one in few], [one.plain for one in few], lambda _: None)
    found: dict[int, Divergence] = {}
    for text, indices in zip(left, leaving.values(), strict=True):
        positions = {differences[index].position for index in indices}
        steps = stock_logits(target, text.ids, [text.plain[: max(positions)]])
        logits = {position: row[0] for position, row in enumerate(steps) if position in positions}
        for index in indices:
            one = differences[index]
            found[index] = _judged(one, logits[one.position], noise)
    return [found[index] for index in range(len(differences))]


def _judged(one: Difference, logits: Tensor, noise: Noise) -> Divergence:
    """Judge one difference by the `(vocab,)` logits of one-token forwards where it begins."""
    place = one.position
    expected, found = (text[place] if place < len(text) else None for text in (one.plain, one.other))
    if expected is None or found is None:
        return Divergence(one.prompt, place, math.nan, noise.gap, expected, found, one.turn)
    own, other = logits[expected], logits[found]
    # The model hands logits over rounded to its precision. Sums that differ by next to nothing can round to adjacent
    # numbers, so a gap of one unit in the last place is no evidence of anything, even where the few positions measured
    # happened to round alike. In float32 that unit is a ten-millionth of the logit: it excuses no defect there.
    noise_here = max(noise.gap, last_place(max(abs(float(own)), abs(float(other))), logits.dtype))
    return Divergence(one.prompt, place, float(own) - float(other), noise_here, expected, found, one.turn)


def last_place(magnitude: float, dtype: torch.dtype) -> float:
    """Return the distance of neighbouring numbers of this size and precision; 0.0625 at 8 to 16 in bfloat16."""
    return math.ldexp(torch.finfo(dtype).eps, math.frexp(magnitude)[1] - 1)


def divergences_by_method(
    target: Target, prompts: Sequence[list[int] | Script], plain: Sequence[Run], others: Mapping[str, Sequence[Run]]
) -> dict[str, list[Divergence]]:
    """Return divergences by contender: one for every conversation whose answers differ, in its first such turn.

    Repetition 0 stands for all. All contenders are judged together, against the same noise.
    """
    differing = {
        name: [
            one
            for base, own in zip(plain, runs, strict=True)
            if base.repetition == 0 and (one := difference(prompts[base.prompt], base, own)) is not None
        ]
        for name, runs in others.items()
    }
    judged = iter(divergences(target, [one for found in differing.values() for one in found]))
    return {name: [next(judged) for _ in found] for name, found in differing.items()}


def difference(prompt: list[int] | Script, base: Run, own: Run) -> Difference | None:
    """Return the difference in the first turn whose answers differ; None without one."""
    texts: list[list[int]] = []
    for turn, (expected, said) in enumerate(zip(base.answers, own.answers, strict=False)):
        if expected.tokens != said.tokens:
            ids = script_of(prompt)(texts)
            assert ids is not None
            return Difference(base.prompt, ids, expected.tokens, said.tokens, turn)
        texts.append(expected.tokens)
    return None
