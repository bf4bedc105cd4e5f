"""Prompts kept out of training, and the real acceptance length on them.

Splits a training set into what is trained on and the last few prompts; measures a drafter in the making by decoding
those. Knows nothing of how it is trained.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from outdraft.drafters.feature_drafting import FeatureDrafter
from outdraft.drafters.feature_head import FeatureHead
from outdraft.evaluation.prompts import Prompt, encode, prompt_of
from outdraft.generation import SpeculativeModel
from outdraft.target import Target
from outdraft.training.conversations import Conversation, OnBadLine, read_conversations

SMALLEST_SPLIT = 10
"""Below so many conversations none is held out."""

LONGEST_BEGINNING = 64
"""Tokens of a plain text that serve as its prompt, at most; a quarter of it otherwise."""


def hold_out(
    data: Path, folder: Path, count: int, on_bad_line: OnBadLine = "error", note: Callable[[str], None] = print
) -> tuple[Path, list[Prompt]]:
    """Training data without its last `count` conversations, written to `folder`, and those conversations' prompts.

    Args:
        data: as for training.
        folder: gets `train.jsonl` and `held_out.jsonl`; equal data give equal files.
        count: at most a tenth of the data; none of very small data, whose first prompts are then measured on.
        on_bad_line: as in `read_conversations`.
        note: told what the user should know.

    Raises:
        UserError: data that cannot be used.
    """
    found = read_conversations(data, on_bad_line)
    if found.skipped:
        note(f"{len(found.skipped)} lines could not be used (first: {found.skipped[0]})")
    everything = found.conversations
    kept_out = 0 if len(everything) < SMALLEST_SPLIT else min(count, max(1, len(everything) // 10))
    if not kept_out:
        if count:
            note(f"{len(everything)} conversations are too few to hold any out: tau is measured on trained prompts")
        return data, [prompt_of(_record(conversation)) for conversation in everything[: max(count, 1)]]
    split = len(everything) - kept_out
    note(f"the last {kept_out} conversations are held out for measuring tau")
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "held_out.jsonl", everything[split:])
    _write(folder / "train.jsonl", everything[:split])
    return folder / "train.jsonl", [prompt_of(_record(conversation)) for conversation in everything[split:]]


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
) -> Callable[[FeatureHead], dict[str, float]]:
    """A function that decodes the prompts greedily, all at once, with a drafter as it is.

    The drafter is copied, in the target's precision: training goes on with the original untouched.
    """

    def measure(head: FeatureHead) -> dict[str, float]:
        drafter = FeatureDrafter(copy.deepcopy(head).to(target.dtype).eval().requires_grad_(False), target)
        found = SpeculativeModel(target, drafter).generate(list(prompts), max_new_tokens=max_new_tokens).statistics
        return {"tau": found.tau, "acceptance_rate": found.acceptance_rate} if found.rounds else {}

    return measure


def _record(conversation: Conversation) -> dict[str, Any]:
    return {"messages": list(conversation.messages)} if conversation.text is None else {"text": conversation.text}


def _write(path: Path, conversations: Sequence[Conversation]) -> None:
    """Written aside and renamed: several processes may do this at once."""
    aside = path.with_suffix(f".{os.getpid()}.partial")
    lines = (json.dumps(_record(conversation), ensure_ascii=False) for conversation in conversations)
    aside.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    os.replace(aside, path)
