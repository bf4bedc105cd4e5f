"""Where contenders' greedy answers to conversations part from plain ones, turn by turn.

After a turn that parts, the later prompts differ too, since they hold the answer; those turns are not compared. What a
parting is, and when it is a tie, is `identity.py`'s business.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from outdraft.evaluation.identity import Difference, Divergence, divergences
from outdraft.evaluation.measure import Run, Script, script_of
from outdraft.target.target import Target


def partings(
    target: Target, prompts: Sequence[list[int] | Script], plain: Sequence[Run], others: Mapping[str, Sequence[Run]]
) -> dict[str, list[Divergence]]:
    """By contender, one for every conversation whose answers differ, in its first turn that does.

    Repetition 0 stands for all. The contenders are judged together, so that all are held against the same noise.
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
    """The first turn whose answers differ."""
    texts: list[list[int]] = []
    for turn, (expected, said) in enumerate(zip(base.answers, own.answers, strict=False)):
        if expected.tokens != said.tokens:
            ids = script_of(prompt)(texts)
            assert ids is not None
            return Difference(base.prompt, ids, expected.tokens, said.tokens, turn)
        texts.append(expected.tokens)
    return None
