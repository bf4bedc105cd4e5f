"""Prompts kept out of training, and the real acceptance length on them.

Splits a training set into what is trained on and the last few prompts; measures a drafter in the making by decoding
those. Knows nothing of how it is trained.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from outdraft.api.generation import SpeculativeModel
from outdraft.api.loading import load_drafter_for
from outdraft.data.conversations import Conversation, OnBadLine, read_conversations
from outdraft.evaluation.prompts import Prompt, encode, prompt_of
from outdraft.methods.checkpoint import Network
from outdraft.target.target import Target

HELD_OUT = 32
"""Conversations held out, unless said otherwise."""

SMALLEST_SPLIT = 10
"""Below so many conversations none is held out."""

LONGEST_BEGINNING = 64
"""Tokens of a plain text that serve as its prompt, at most; a quarter of it otherwise."""


@dataclass
class Split:
    """A training set divided; nothing is written yet."""

    data: Path
    """Where it came from."""
    trained: list[Conversation]
    held_out: list[Conversation]
    notes: list[str]
    """What the user should know, a line each."""

    @property
    def prompts(self) -> list[Prompt]:
        """What to measure tau on: what is held out, else some of what is trained on."""
        return [prompt_of(conversation.record()) for conversation in self.held_out or self.trained[:HELD_OUT]]

    def write(self, folder: Path) -> Path:
        """The data to train on: `folder/train.jsonl`, beside `held_out.jsonl`; what it came from if all is trained on.

        Equal data give equal files.
        """
        if not self.held_out:
            return self.data
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / "held_out.jsonl", self.held_out)
        _write(folder / "train.jsonl", self.trained)
        return folder / "train.jsonl"


def hold_out(data: Path, count: int = HELD_OUT, on_bad_line: OnBadLine = "error") -> Split:
    """Keep the last `count` conversations out of training, but at most a tenth, and none of very small data.

    Several answers to one prompt that follow each other, as `regenerate` writes them, are kept together.

    Raises:
        UserError: data that cannot be used.
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


def beginnings(prompts: Sequence[Prompt], target: Target) -> list[list[int]]:
    """Token ids of the prompts; of plain texts only a beginning, which leaves something to go on with."""
    encoded = []
    for prompt in prompts:
        if isinstance(prompt, str) and target.tokenizer is not None:
            ids = list(target.tokenizer(prompt).input_ids)
            encoded.append(ids[: max(2, min(LONGEST_BEGINNING, len(ids) // 4))])
        else:
            encoded += encode([prompt], target)
    return encoded


def tau_meter(
    target: Target, prompts: Sequence[list[int]], max_new_tokens: int = 64
) -> Callable[[Network], dict[str, float]]:
    """A function that decodes the prompts greedily, all at once, with a drafter as it is.

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
        return {"tau": found.tau, "acceptance_rate": found.acceptance_rate} if found.rounds else {}

    return measure


def _write(path: Path, conversations: Sequence[Conversation]) -> None:
    """Written aside and renamed: several processes may do this at once."""
    aside = path.with_suffix(f".{os.getpid()}.partial")
    lines = (json.dumps(conversation.record(), ensure_ascii=False) for conversation in conversations)
    aside.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    os.replace(aside, path)
