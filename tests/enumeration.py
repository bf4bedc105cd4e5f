"""All random runs of a function at once, each with its exact probability.

The library draws nothing but through `Chance`, so a function of some chances can be replayed with scripted decisions:
first the first possible answer to every question, then the next answer to the last question, and so on until every
branch of positive probability was walked. What comes out is not a sample but the law.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field

from torch import Tensor

Law = dict[tuple[int, ...], float]
"""Sequences of tokens and their probabilities."""


@dataclass
class Script:
    """The decisions of one run, in the order in which they were asked for, and which runs come after it."""

    options: list[list[tuple[int, float]]] = field(default_factory=list)  # of every question: answers, probabilities
    taken: list[int] = field(default_factory=list)
    place: int = 0

    def decide(self, options: list[tuple[int, float]]) -> int:
        if self.place == len(self.options):
            self.options.append([option for option in options if option[1] > 0])
            self.taken.append(0)
        answer, _ = self.options[self.place][self.taken[self.place]]
        self.place += 1
        return answer

    @property
    def probability(self) -> float:
        product = 1.0
        for options, taken in zip(self.options, self.taken, strict=True):
            product *= options[taken][1]
        return product

    def advance(self) -> bool:
        """Turn to the next run; False when there is none."""
        self.place = 0
        while self.taken:
            self.taken[-1] += 1
            if self.taken[-1] < len(self.options[-1]):
                return True
            self.options.pop()
            self.taken.pop()
        return False


class ScriptedChance:
    """`Chance` that does what the script says; several of them may share one script."""

    def __init__(self, script: Script):
        self.script = script

    def accept(self, probability: float) -> bool:
        assert -1e-12 <= probability <= 1 + 1e-12, "a probability"
        return bool(self.script.decide([(1, probability), (0, 1 - probability)]))

    def draw(self, law: Tensor) -> int:
        assert (law >= 0).all() and law.sum() > 0, "a law"
        return self.script.decide(list(enumerate((law.double() / law.double().sum()).tolist())))


def all_runs(run: Callable[[Callable[[], ScriptedChance]], Hashable]) -> Iterator[tuple[Hashable, float]]:
    """Every outcome of `run(new_chance)`, with the probability of the way that led there."""
    script = Script()
    while True:
        outcome = run(lambda: ScriptedChance(script))
        assert script.place == len(script.options), "a replay must ask the same questions"
        yield outcome, script.probability
        if not script.advance():
            return


def law_of(run: Callable[[Callable[[], ScriptedChance]], Hashable]) -> dict[Hashable, float]:
    """Outcomes of `run` and their probabilities, ways to the same outcome added up."""
    law: dict[Hashable, float] = defaultdict(float)
    for outcome, probability in all_runs(run):
        law[outcome] += probability
    return dict(law)


def sequence_law(
    next_law: Callable[[tuple[int, ...]], Tensor],
    length: int,
    ends: frozenset[int] = frozenset(),
    start: tuple[int, ...] = (),
) -> Law:
    """The law of `length` tokens after `start`, each drawn from `next_law(tokens so far)`; ends end them earlier."""
    if len(start) >= length or (start and start[-1] in ends):
        return {start: 1.0}
    result: Law = {}
    for token, probability in enumerate(next_law(start).tolist()):
        if probability > 0:
            for sequence, rest in sequence_law(next_law, length, ends, (*start, token)).items():
                result[sequence] = probability * rest
    return result


def distance(one: dict, other: dict) -> float:
    """The largest difference of two laws, over all outcomes of either."""
    return max(abs(one.get(outcome, 0.0) - other.get(outcome, 0.0)) for outcome in one.keys() | other.keys())
