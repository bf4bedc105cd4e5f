"""The evaluation of a training run: held-out prompts, tau on them during training, and the final verdict."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from outdraft.api.draft_settings import DraftSettings, resolve
from outdraft.api.generation import SpeculativeModel
from outdraft.api.loading import load_drafter_for
from outdraft.api.prompts import Prompt, encode, prompt_of
from outdraft.data.conversations import Conversation, OnBadLine, read_conversations
from outdraft.data.records import json_lines
from outdraft.evaluation.bench.measure import PLAIN
from outdraft.evaluation.rounds import NOTHING, RoundCost, Way, head_seconds, timed
from outdraft.methods.checkpoint import Network
from outdraft.output import write_whole
from outdraft.target.target import Target
from outdraft.training.preparation import ADVISED_EXAMPLES

HELD_OUT = 32
"""The default number of held-out conversations."""

SMALLEST_SPLIT = 10
"""The fewest conversations of which some are held out."""

LONGEST_BEGINNING = 64
"""The most tokens of a plain text that serve as its prompt; a quarter of a shorter text."""


@dataclass
class Split:
    """A divided training set, before anything is written."""

    data: Path
    """The file that was divided."""
    trained: list[Conversation]
    held_out: list[Conversation]
    notes: list[str]
    """The remarks for the user, a line each."""

    @property
    def prompts(self) -> list[Prompt]:
        """The prompts to measure tau on: held-out ones, else some of the training data."""
        return [prompt_of(conversation.record()) for conversation in self.held_out or self.trained[:HELD_OUT]]

    def write(self, folder: Path) -> Path:
        """Write `train.jsonl` and `held_out.jsonl` to the folder, and return the file to train on; without held-out
        data this is the original.

        Equal data give equal files.
        """
        if not self.held_out:
            return self.data
        folder.mkdir(parents=True, exist_ok=True)
        for name, conversations in (("held_out", self.held_out), ("train", self.trained)):
            write_whole(folder / f"{name}.jsonl", json_lines(one.record() for one in conversations))
        return folder / "train.jsonl"


def hold_out(data: Path, count: int = HELD_OUT, on_bad_line: OnBadLine = "error") -> Split:
    """Keep the last `count` conversations out of training, but at most a tenth, and none of very small data.

    Several answers to one prompt that follow each other, as `regenerate` writes them, are kept together.
    """
    found = read_conversations(data, on_bad_line)
    everything, notes = found.conversations, []
    if found.skipped:
        notes.append(f"{len(found.skipped)} lines could not be used (first: {found.skipped[0]})")
    kept = 0 if len(everything) < SMALLEST_SPLIT else min(count, len(everything) // 10)
    while 0 < kept < len(everything) and _same_prompt(everything[-kept - 1], everything[-kept]):
        kept += 1
    kept = 0 if kept == len(everything) else kept
    if kept:
        notes.append(f"held out for measuring tau: the last {kept} of {len(everything)} conversations")
    else:
        notes.append("no conversation is held out: tau is measured on prompts that are trained on")
    split = len(everything) - kept
    return Split(data, everything[:split], everything[split:], notes)


def _same_prompt(one: Conversation, other: Conversation) -> bool:
    return one.text is None and other.text is None and one.questions == other.questions


def beginnings(prompts: Sequence[Prompt], target: Target, switches: Mapping[str, Any] | None = None) -> list[list[int]]:
    """Return the prompts' token ids; a plain text is cut to its first tokens, so that a continuation is left."""
    encoded = []
    for prompt in prompts:
        if isinstance(prompt, str) and target.tokenizer is not None:
            ids = list(target.tokenizer(prompt).input_ids)
            encoded.append(ids[: max(2, min(LONGEST_BEGINNING, len(ids) // 4))])
        else:
            encoded += encode([prompt], target, switches)
    return encoded


def tau_meter(
    target: Target, prompts: Sequence[list[int]], max_new_tokens: int = 64
) -> Callable[[Network], dict[str, float]]:
    """Build a function that decodes the prompts greedily, in one batch, with the current drafter.

    The drafter is copied, in the target's precision: training goes on with the original untouched.
    """

    # Of the network alone, and as far as it drafts when nobody stops it.
    settings: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "prompt_lookup_min": 0,
        "do_sample": False,
        "controller": "fixed",
    }

    def measure(network: Network) -> dict[str, float]:
        drafter = load_drafter_for(target, network, backend=target.backend)
        found = SpeculativeModel(target, drafter).generate(list(prompts), **settings).statistics
        if not found.rounds:
            return {}
        measured = {"tau": found.tau, "acceptance_rate": found.acceptance_rate}
        if found.drafted == sum(found.depths):  # chains, whose positions `outdraft doctor` compares with its own
            shares = enumerate(found.acceptance_by_position, start=1)
            measured |= {f"acceptance_at_{position}": share for position, share in shares}
        return measured

    return measure


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
