"""Where a contender's greedy answers to conversations part from plain ones, turn by turn.

After a turn that parts, the later prompts differ too, since they hold the answer; those turns are not compared. What a
parting is, and when it is a tie, is `identity.py`'s business.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from outdraft.evaluation.identity import Divergence, divergence
from outdraft.evaluation.measure import Run, Script, script_of
from outdraft.target import Target


@dataclass(frozen=True)
class Parting(Divergence):
    """A divergence in one turn of a conversation."""

    turn: int = 0
    """Which of the turns, from 0."""

    def as_dict(self) -> dict[str, float | int | bool]:
        return {**super().as_dict(), "turn": self.turn}


def partings(
    target: Target, prompts: Sequence[list[int] | Script], plain: Sequence[Run], others: Sequence[Run]
) -> list[Divergence]:
    """One for every conversation whose answers differ, in its first turn that does; repetition 0 stands for all."""
    found: list[Divergence] = []
    for base, own in zip(plain, others, strict=True):
        if base.repetition:
            continue
        script = script_of(prompts[base.prompt])
        texts: list[list[int]] = []
        for turn, (expected, said) in enumerate(zip(base.answers, own.answers, strict=False)):
            if expected.tokens != said.tokens:
                prompt = script(texts)
                assert prompt is not None
                one: Any = divergence(target, base.prompt, prompt, expected.tokens, said.tokens)
                found.append(Parting(**{f.name: getattr(one, f.name) for f in fields(Divergence)}, turn=turn))
                break
            texts.append(expected.tokens)
    return found
