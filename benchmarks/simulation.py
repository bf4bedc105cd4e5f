"""Controllers in simulated time: what an answer would have taken, from drafts recorded or made up beforehand.

An answer is one long draft for every token position; decoding from a position looks at as much of its draft as the
controller asks for. So every controller meets the same text and the same verdicts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from outdraft.control import Controller, Costs


@dataclass(frozen=True)
class Draft:
    """The long draft that starts at one position, and its verdict."""

    confidences: Sequence[float]
    accepted: int


Answer = Sequence[Draft]


@dataclass
class Run:
    """What decoding took, in simulated seconds."""

    seconds: float = 0.0
    tokens: int = 0
    rounds: int = 0
    drafted: int = 0

    @property
    def seconds_per_token(self) -> float:
        return self.seconds / self.tokens

    def add(self, other: Run) -> None:
        self.seconds += other.seconds
        self.tokens += other.tokens
        self.rounds += other.rounds
        self.drafted += other.drafted


def round_seconds(costs: Costs, levels: int) -> float:
    """Seconds of a round that drafts a chain of so many levels."""
    return costs.round(levels, 1 + levels)


def decode(controller: Controller, answer: Answer, truth: Costs) -> Run:
    """One answer under this controller, at costs which hold in truth and which its own may have to learn."""
    run = Run()
    while run.tokens < len(answer):
        draft = answer[run.tokens]
        seen: list[float] = []
        while len(seen) < len(draft.confidences) and controller.decide(seen, nodes=1):
            seen.append(draft.confidences[len(seen)])
        accepted = min(len(seen), draft.accepted)
        seconds = round_seconds(truth, len(seen))
        if seen:
            controller.costs.observe_draft(truth.begin(), [truth.step()] * (len(seen) - 1))
        controller.costs.observe_round(1 + len(seen), truth.verify(1 + len(seen)), truth.rest())
        tokens = min(1 + accepted, len(answer) - run.tokens)
        controller.observe(seen, accepted, tokens, seconds)
        run.add(Run(seconds, tokens, 1, len(seen)))
    controller.finish()
    return run


def oracle(answer: Answer, limit: int, truth: Costs) -> Run:
    """The least that the answer can take with drafts of at most `limit` levels, every verdict known beforehand."""
    best = [Run() for _ in range(len(answer) + 1)]  # from each position to the end
    for position in reversed(range(len(answer))):
        left = len(answer) - position
        options = []
        # A level that is rejected earns nothing: only drafts that are accepted as a whole can be best.
        for levels in range(min(limit, answer[position].accepted) + 1):
            tokens = min(1 + levels, left)
            option = Run(round_seconds(truth, levels), tokens, 1, levels)
            option.add(best[position + tokens])
            options.append(option)
        best[position] = min(options, key=lambda option: option.seconds)
    return best[0]
