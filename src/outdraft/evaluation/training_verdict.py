"""The last word on a drafter that was just trained: how fast it is expected to be here, and what would lift that.

Times its draft and the target's pass (`rounds.py`), takes tau from the end of the run and the rest from the record that
lies beside the weights. Trains nothing.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from outdraft.api.draft_settings import DraftSettings
from outdraft.api.loading import load_drafter_for
from outdraft.api.resolved_draft import resolve
from outdraft.evaluation.measure import PLAIN
from outdraft.evaluation.rounds import NOTHING, RoundCost, Way, head_seconds, timed
from outdraft.target.target import Target
from outdraft.training.preparation import ADVISED_EXAMPLES

MANY_PASSES, FEW_PASSES = 10, 4
"""Passes over the data from which on more of them bring little, and below which they bring much."""

LARGE_VOCABULARY = 32_000
"""From which on drafting over all of it is worth a thought."""

SECONDS = 20.0
"""For the timing."""


@dataclass(frozen=True)
class TrainingVerdict:
    """What a drafter is worth here.

    Attributes:
        tau: at the end of training, with the trees that are timed.
        cost: of its rounds.
        lifts: what would make it faster, a clause each, the most promising first.
    """

    tau: float
    cost: RoundCost
    lifts: list[str]

    @property
    def speedup(self) -> float:
        """Expected, over plain decoding."""
        return self.cost.speedup(self.tau)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
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
    target: Target, folder: Path, tau: float | None, best_step: int, rows: int = 1
) -> TrainingVerdict | None:
    """Judge the drafter in `folder`; None where no tau was measured.

    Args:
        target: on the backend that decodes.
        folder: of the finished run.
        tau: at its end.
        best_step: whose weights were saved.
        rows: that were decoded together for tau, on which the trees depend.
    """
    if tau is None or not math.isfinite(tau):
        return None
    drafter = load_drafter_for(target, folder, backend=target.backend)
    assert drafter is not None  # the run has saved one
    record = json.loads((folder / "provenance.json").read_text(encoding="utf-8"))
    tokens = min(32, target.context_length // 4)
    prompt = [place % target.vocab_size for place in range(tokens)]
    shape = resolve(DraftSettings(controller="fixed"), drafter, target.device, rows=rows).shape
    ways: dict[str, Way] = {PLAIN: (None, NOTHING), drafter.method: (drafter, shape)}
    laps = timed(target, ways, prompt, end=time.perf_counter() + SECONDS)
    cost = RoundCost.of(laps[PLAIN], laps[drafter.method], shape)
    whole = getattr(drafter, "vocabulary", ()) is None and target.vocab_size >= LARGE_VOCABULARY
    head = head_seconds(target) / cost.step_seconds if whole else None
    return TrainingVerdict(tau, cost, lifts(record, best_step, head))


def lifts(record: Mapping[str, Any], best_step: int, head_share: float | None) -> list[str]:
    """What would make a drafter faster.

    Args:
        record: `provenance.json` of the run.
        best_step: whose weights were saved.
        head_share: of a draft step that the target's whole output layer takes, where a draft vocabulary would cut it.
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
