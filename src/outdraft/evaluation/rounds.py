"""The cost of a round's parts on this machine, timed in the decoding loop itself, the resulting speed, and the verdict
on a trained drafter by them.

The unit of cost is a plain round's time. A round that drafts costs 1 + draft + verify, where `draft` is the time of
drafting and `verify` the time that checking the candidates adds to the pass. It brings tau tokens, so the speed-up over
plain decoding is tau / (1 + draft + verify), and drafting pays where tau is above that sum. The prompt's own pass is
left out.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from outdraft.api.draft_settings import DraftSettings, resolve
from outdraft.api.generation import SpeculativeModel
from outdraft.api.loading import load_drafter_for
from outdraft.core.shape import TreeShape
from outdraft.core.tensors import now
from outdraft.core.tree import Tree
from outdraft.drafting.base import Drafter, DraftState, Limits, RowContext, Update
from outdraft.engine.round import decode
from outdraft.evaluation.bench.measure import PLAIN
from outdraft.target.runner import ModelRunner
from outdraft.target.target import Target
from outdraft.training.preparation import ADVISED_EXAMPLES

NOTHING = TreeShape(0, 1, 1)
"""The shape of plain decoding."""

WARM_UP = 2
"""The number of first rounds of a text that do not count: the drafter takes in the prompt, caches are cold."""


@dataclass
class Lap:
    """The seconds of a round's parts, or their medians over several rounds."""

    draft: float
    verify: float
    """The time of the target's pass, its output layer included."""
    rest: float
    """The time of acceptance and bookkeeping."""

    @property
    def whole(self) -> float:
        return self.draft + self.verify + self.rest

    @classmethod
    def median(cls, laps: Sequence[Lap]) -> Lap:
        return cls(*(median(getattr(lap, part) for lap in laps) for part in ("draft", "verify", "rest")))


@dataclass(frozen=True)
class RoundCost:
    """The costs of a way of drafting, in plain rounds."""

    draft: float
    """The time of drafting, in plain rounds."""
    verify: float
    """The time that checking the candidates adds to the pass, in plain rounds; negative where the draft has done a part
    of the pass (EESD)."""
    step_seconds: float
    """The seconds of drafting one level."""

    @classmethod
    def of(cls, plain: Lap, drafted: Lap, shape: TreeShape) -> RoundCost:
        """Return the cost of a round that drafts trees of this shape, relative to a plain one."""
        added = drafted.verify + drafted.rest - plain.whole
        return cls(drafted.draft / plain.whole, added / plain.whole, drafted.draft / (shape.depth + 1))

    @property
    def tau_to_pay(self) -> float:
        """The tokens a round above which drafting is faster than plain decoding."""
        return 1 + self.draft + self.verify

    def speedup(self, tau: float) -> float:
        return tau / self.tau_to_pay

    def as_dict(self) -> dict[str, float]:
        return {**asdict(self), "tau_to_pay": self.tau_to_pay}


class Guesses(Drafter):
    """A drafter of arbitrary chains at no cost, which measures a pass over their tokens."""

    method = "guesses"
    limits = Limits(stepwise=False, probs=False)

    def begin(self, prompts: Sequence[Tensor], run: ModelRunner) -> _GuessState:
        return _GuessState()


class _GuessState(DraftState):
    def propose(self, update: Update, shape: TreeShape, rows: RowContext) -> Tree:
        guesses = [[root, *[0] * (shape.size - 1)] for root in update.roots.tolist()]
        return Tree.listed(guesses, update.tokens.device)

    def select_rows(self, rows: Sequence[int]) -> None:
        pass


Way = tuple[Drafter | None, TreeShape]
"""A drafter and the shape of its trees; plain decoding is (None, NOTHING)."""


def timed(
    target: Target,
    ways: Mapping[str, Way],
    prompt: list[int],
    *,
    rounds: int = 4,
    turns: int = 10,
    end: float | None = None,
    progress: Callable[[], None] = lambda: None,
) -> dict[str, Lap]:
    """Return the median lap of every way. The ways take turns, each turn beginning with another one, so that a
    temporary slow-down hits all of them. A first turn and the first rounds of every text do not count.

    Args:
        rounds: counted rounds of a text.
        turns: most turns that count.
        end: deadline by `time.perf_counter`; no turn but the first that counts begins after it.
        progress: called after every text.
    """
    laps: dict[str, list[Lap]] = {name: [] for name in ways}
    for turn in range(turns + 1):
        if turn > 1 and end is not None and time.perf_counter() > end:
            break
        names = list(ways)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            found = _laps(target, *ways[name], prompt, WARM_UP + (rounds if turn else 1))
            laps[name] += found if turn else []
            progress()
    return {name: Lap.median(own) for name, own in laps.items()}


def _laps(target: Target, drafter: Drafter | None, shape: TreeShape, prompt: list[int], rounds: int) -> list[Lap]:
    """Time the laps of a text's rounds, those of the warm-up left out."""
    settings: dict[str, Any] = {"max_new_tokens": (shape.depth + 2) * rounds + 1, "eos_token_id": []}
    if drafter is not None:
        settings |= {"controller": "fixed"} | ({} if drafter.limits.looks_back else {"prompt_lookup_min": 0})
    (row,), _ = SpeculativeModel(target, drafter)._rows(prompt, settings)
    parts, found = ("draft_seconds", "verify_seconds", "rest_seconds"), [Lap(0.0, 0.0, 0.0)]
    for done, _ in enumerate(decode(target, drafter, [row], shape)):
        if done:
            found.append(Lap(*(getattr(row.statistics, part) for part in parts)))
        if done == rounds:
            break
    return [
        Lap(after.draft - before.draft, after.verify - before.verify, after.rest - before.rest)
        for before, after in zip(found[WARM_UP:], found[WARM_UP + 1 :], strict=False)
    ]


@torch.inference_mode()
def head_seconds(target: Target, times: int = 9) -> float:
    """Time the output layer over one token: the median seconds, the first calls left out."""
    features = torch.zeros(1, 1, target.hidden_size, dtype=target.dtype, device=target.device)
    found = []
    for _ in range(WARM_UP + times):
        start = now(target.device)
        target.head(features)
        found.append(now(target.device) - start)
    return median(found[WARM_UP:])


MANY_PASSES, FEW_PASSES = 10, 4
"""The passes over the data above which more bring little, and below which more bring much."""

LARGE_VOCABULARY = 32_000
"""The size from which on a vocabulary is worth reducing for the draft."""

SECONDS = 20.0
"""The time limit of the timing."""


@dataclass(frozen=True)
class TrainingVerdict:
    """The expected speed of a drafter here.

    Attributes:
        tau: mean acceptance length at the end of training, with the timed trees.
        cost: cost of its rounds.
        lifts: changes that would make it faster, a clause each, the most promising first.
    """

    tau: float
    cost: RoundCost
    lifts: list[str]

    @property
    def speedup(self) -> float:
        return self.cost.speedup(self.tau)

    def as_dict(self) -> dict[str, Any]:
        return {
            "tau": self.tau,
            "expected_speedup": self.speedup,
            **self.cost.as_dict(),
            "what_would_lift_it": self.lifts,
        }

    def __str__(self) -> str:
        cost = self.cost
        if cost.tau_to_pay < 1:  # a round with drafts took less time than one without
            busy = "the machine was too busy to tell what that is worth; `outdraft bench` does"
            return f"Verdict: tau {self.tau:.2f}; {busy}."
        worth = "faster than" if self.speedup > 1 else "not faster than"
        text = (
            f"Verdict: at tau {self.tau:.2f} about {self.speedup:.2f}x of plain decoding here, {worth} the target "
            f"alone: its draft costs {cost.draft:.2f} of a plain round, checking it {cost.verify:.2f} "
            f"more, so it pays from tau {cost.tau_to_pay:.2f} on."
        )
        return text + (f" What would lift it: {'; '.join(self.lifts)}." if self.lifts else "")


def training_verdict(
    target: Target, folder: Path, tau: float | None, best_step: int, prompts: Sequence[list[int]]
) -> TrainingVerdict | None:
    """Judge the drafter in `folder`; None where no tau was measured.

    Args:
        target: the target, on the backend that decodes.
        tau: mean acceptance length at its end.
        best_step: the step whose weights were saved.
        prompts: token ids of the prompts that were decoded together for tau; trees depend on their number, and rounds
            are timed after the first one.
    """
    if tau is None or not math.isfinite(tau):
        return None
    drafter = load_drafter_for(target, folder, backend=target.backend)
    assert drafter is not None  # the run has saved one
    record = json.loads((folder / "provenance.json").read_text(encoding="utf-8"))
    prompt = prompts[0][: min(32, target.context_length // 4)]
    shape = resolve(DraftSettings(controller="fixed"), drafter, target.device, rows=len(prompts)).shape
    ways: dict[str, Way] = {PLAIN: (None, NOTHING), drafter.method: (drafter, shape)}
    laps = timed(target, ways, prompt, end=time.perf_counter() + SECONDS)
    cost = RoundCost.of(laps[PLAIN], laps[drafter.method], shape)
    whole = getattr(drafter, "vocabulary", ()) is None and target.vocab_size >= LARGE_VOCABULARY
    head = head_seconds(target) / cost.step_seconds if whole else None
    return TrainingVerdict(tau, cost, lifts(record, best_step, head))


def lifts(record: Mapping[str, Any], best_step: int, head_share: float | None) -> list[str]:
    """Return the changes that would make a drafter faster, a clause each.

    Args:
        record: `provenance.json` of the run.
        best_step: the step whose weights were saved.
        head_share: share of a draft step in the target's output layer, where a draft vocabulary would reduce it.
    """
    examples, steps = record["examples"], record["steps"]
    passes = steps * record["config"]["batch_size"] * record.get("processes", 1) / examples
    found = []
    if passes < FEW_PASSES:
        found.append(f"longer training ({passes:.1f} passes over the data were made, {FEW_PASSES} or more are usual)")
    elif best_step < steps:
        found.append(f"not longer training, for step {best_step} of {steps} was the best, but more answers")
    elif passes >= MANY_PASSES:
        found.append(f"more answers rather than more steps, after {passes:.0f} passes over the same ones")
    if examples < ADVISED_EXAMPLES:
        found.append(f"more data ({examples:,} answers were learned from, {ADVISED_EXAMPLES:,} are advised)")
    if head_share is not None:
        found.append(
            f"a draft vocabulary (draft_vocab_size=auto; the output layer is {head_share:.0%} of a draft step)"
        )
    return found
